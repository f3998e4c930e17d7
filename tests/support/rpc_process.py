"""A server as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAM = (sys.executable, "-m", "runlane_server")

PREFIX = "runlane-server listening on "


def environment() -> dict[str, str]:
    """That of this process, without settings of its own, and with what it can import."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RUNLANE_")}
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path)}


@dataclass
class Server:
    """A server that serves; its log is in `log`."""

    process: subprocess.Popen[str]
    address: str
    log: Path

    def leave(self, timeout: float = 30) -> int:
        """Waits for its end; returns the exit code."""
        return self.process.wait(timeout)


@contextmanager
def server(folder: Path, *flags: str, listen: str = "127.0.0.1:0") -> Iterator[Server]:
    """Starts a server in a folder; it is killed at the end if it is still there."""
    log = folder / "server.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*PROGRAM, "--listen", listen, *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=folder,
            env=environment(),
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(PREFIX), log.read_text()
        yield Server(process, line.removeprefix(PREFIX).strip(), log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def start_fails(folder: Path, *flags: str) -> tuple[int, str]:
    """The exit code and what is on stderr of a server that cannot start."""
    ended = subprocess.run(
        [*PROGRAM, *flags],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(),
        timeout=30,
        check=False,
    )
    assert ended.stdout == ""
    return ended.returncode, ended.stderr
