"""Runs the command `runlane` as a process against a scripted peer."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process

from support.peer import Peer

START = ("-c", "from runlane_commands import runlane; runlane()")


async def start(peer: Peer, *arguments: str) -> Process:
    """Starts the command with arguments; the peer is its server."""
    environment = {**os.environ, "RUNLANE_SERVER": peer.target}
    return await asyncio.create_subprocess_exec(
        sys.executable, *START, *arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment
    )


async def finish(process: Process, stdin: str = "") -> tuple[int | None, str, str]:
    """Waits for the end of a command: its exit code, stdout and stderr."""
    out, err = await process.communicate(stdin.encode())
    return process.returncode, out.decode(), err.decode()
