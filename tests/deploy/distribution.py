#!/usr/bin/env python3
"""Installs the built wheel into a clean environment, and runs the commands that it brings.

python tests/deploy/distribution.py DIST     exits with 1 if something is missing in the wheel

`make build` runs it. It needs nothing but Python and pip: what it checks is that the wheel and its
extras `server` and `cli` are enough.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTRAS = "server,cli"
BASE = {
    "runlane runs": "cli",
    "runlane-conformance": "cli",
    "runlane-server": "server",
    "python -m runlane_server": "server",
}
"""Commands that need an extra after a base install, and that extra."""

EXTRA = {
    "runlane-server --store postgresql://localhost/db": "server,postgres",
    "runlane-server --agent chat:openai:small": "server,chat",
    "runlane-server --agent acp:sh": "server,acp",
    "runlane-server --otlp-endpoint http://127.0.0.1:1": "server,traces",
    "runlane-server --event-loop uvloop": "server,uvloop",
}
"""The same after an install with the extras `server` and `cli`."""

LISTENING = "runlane-server listening on "
TIMEOUT = 60.0
"""Seconds that one command of the wheel may take."""


def main() -> None:
    """Checks the only wheel of a folder."""
    parser = argparse.ArgumentParser(description="Checks a built wheel in a clean environment.")
    parser.add_argument("dist", type=Path, help="folder with one wheel")
    (wheel,) = parser.parse_args().dist.resolve().glob("*.whl")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install(wheel, folder)
        check_remedies(folder, BASE)
        commands = install(f"{wheel}[{EXTRAS}]", folder)
        check_remedies(folder, EXTRA)
        version = wheel.name.split("-")[1]
        for command in ("runlane", "runlane-server"):
            expect(run(folder, commands / command, "--version"), f"version {version}")
        with serving(folder, commands / "runlane-server") as address:
            expect(run(folder, commands / "runlane", "--server", address, "run", "Hello"), "Hello")


def check_remedies(folder: Path, remedies: Mapping[str, str]) -> None:
    """Checks that each command fails with one line that names the extra to install."""
    for command, extras in remedies.items():
        ended = subprocess.run(
            [folder / "venv" / "bin" / command.split()[0], *command.split()[1:]],
            cwd=folder,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        expect(ended.stderr, f"is not installed; run: pip install 'runlane[{extras}]'")
        if ended.returncode == 0 or ended.stderr.count("\n") != 1:
            sys.exit(f"expected one line and a failure from {command!r}")


def install(wheel: Path | str, folder: Path) -> Path:
    """Installs the wheel into an environment; returns the folder of its commands."""
    environment = folder / "venv"
    if not environment.exists():
        venv.create(environment, with_pip=True)
    commands = environment / "bin"
    subprocess.run(
        [
            *(commands / "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--constraint", ROOT / "constraints.txt", wheel),
        ],
        cwd=folder,
        env=clean_environment(),
        check=True,
    )
    return commands


def clean_environment() -> dict[str, str]:
    """The environment without settings of Runlane and without paths into this checkout."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RUNLANE_", "PYTHON"))
    }


def run(folder: Path, command: Path, *arguments: str) -> str:
    """Runs a command; returns its output."""
    ended = subprocess.run(
        [command, *arguments],
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    return ended.stdout


def expect(output: str, text: str) -> None:
    """Prints the output; exits with 1 if it does not contain the text."""
    print(output, end="")
    if text not in output:
        sys.exit(f"expected {text!r}")


@contextmanager
def serving(folder: Path, command: Path, *flags: str) -> Iterator[str]:
    """Runs a server on a free port; yields its address. It must shut down gracefully."""
    process = subprocess.Popen(
        [command, "--listen", "127.0.0.1:0", "--store", "sqlite:///runlane.db", *flags],
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        expect(line, LISTENING)
        yield line.removeprefix(LISTENING).strip()
        process.terminate()
        if (code := process.wait(TIMEOUT)) != 0:
            sys.exit(f"the server exited with code {code}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
