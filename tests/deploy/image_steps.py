"""Runs the steps of the Dockerfile in a new folder, and the server that they make.

A container engine is not needed. The base image is replaced by the Python of this machine, so the
step that installs tini from the base image's distribution is left out. `make test-image` runs this;
it installs packages from the index.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from deploy.test_image import ROOT, argument_of, arguments_of
from runlane import Client, RunState
from support.server import ListeningProcess

BUILD_SECONDS = 600.0

FOLDERS = ("/opt/", "/dist")
"""The directory of what the image builds."""


def inside(place: Path, text: str) -> str:
    """A text of the Dockerfile whose folders are below `place`, and whose Python is this one."""
    for folder in FOLDERS:
        text = text.replace(f" {folder}", f" {place}{folder}")
    base = Path(sys.base_prefix) / "bin" / "python3"
    return text.replace("python -m venv", f"{base} -m venv")


def copy_context(place: Path) -> None:
    """Copies what the first stage copies, and nothing else."""
    for line in arguments_of("COPY"):
        *names, target = line.split()
        if names[0].startswith("--from"):
            continue
        for name in names:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, place / target, ignore=ignored)
            else:
                (place / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place / target)


def outside_environment(work: Path) -> dict[str, str]:
    """The environment of a container, with the settings of pip and TLS of this machine."""
    kept = {name: text for name, text in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    return {**kept, "PATH": "/usr/bin:/bin", "HOME": str(work), "LANG": "C.UTF-8"}


def run(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> str:
    """Runs a command to its end; returns what it printed."""
    return subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        timeout=BUILD_SECONDS,
        check=True,
    ).stdout


def build(place: Path, env: Mapping[str, str]) -> Path:
    """Runs the first stage; returns the program that it makes."""
    context = place / "src"
    context.mkdir()
    copy_context(context)
    steps, _tini = arguments_of("RUN")
    run(["/bin/sh", "-ec", inside(place, steps)], context, env)
    shutil.rmtree(context)  # the image has nothing of it
    program = json.loads(argument_of("ENTRYPOINT"))[-1]
    return place / Path(program).relative_to("/")


@pytest.mark.timeout(BUILD_SECONDS + 60)
async def test_the_steps_make_a_server_that_serves(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    env = outside_environment(work)
    program = str(build(tmp_path, env))
    who = ("me", "--tenant", "t", "--role", "run")
    token = run([program, "token", "new", *who, "--access", "a.toml"], work, env).strip()
    flags = ("--listen", "127.0.0.1:0", "--access", "a.toml", "--metrics-listen", "0")
    server = ListeningProcess((program, *flags), work, env=env)
    await server.start()
    try:
        async with Client(server.address, token=token) as client:
            handle = await client.run_accepted("s", "hello", allow_missing=True)
            complete = await handle.completed(30)
        assert (complete.state, complete.text.strip()) == (RunState.COMPLETED, "hello")
    finally:
        await server.stop()
