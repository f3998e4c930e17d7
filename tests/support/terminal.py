"""Runs a command on a pseudo-terminal, as a person would."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from support.staging import SECONDS

CTRL_C = b"\x03"

# Makes the terminal on stdin the controlling one, so that Ctrl-C typed there is a signal.
_AT_TERMINAL = "import os, sys; os.login_tty(os.dup(0)); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A screen, with everything that was written to it, and a keyboard."""

    def __init__(self, master: int, process: Process) -> None:
        self._master = master
        self._process = process
        self._written = b""
        self._more = asyncio.Event()

    @property
    def screen(self) -> str:
        """Everything that was written, escape sequences included."""
        return self._written.decode(errors="replace")

    async def shows(self, text: str, times: int = 1) -> None:
        """Returns once the text was written this often."""
        try:
            async with asyncio.timeout(SECONDS):
                while self.screen.count(text) < times:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"no {text!r} in {self.screen!r}") from None

    def type(self, keys: bytes) -> None:
        """Sends key presses."""
        os.write(self._master, keys)

    async def wait(self) -> int:
        """Waits for the end of the command; returns its exit code."""
        async with asyncio.timeout(SECONDS):
            code = await self._process.wait()
        self.take()
        return code

    def take(self) -> None:
        """Reads everything that is available."""
        try:
            while data := os.read(self._master, 65536):
                self._written += data
        except (BlockingIOError, OSError):  # nothing to read, or the other end is closed
            pass
        self._more.set()


@asynccontextmanager
async def at_terminal(argv: Sequence[str], env: Mapping[str, str]) -> AsyncIterator[Terminal]:
    """Starts a command on a terminal; it is killed at the end."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _AT_TERMINAL, *argv),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**env, "TERM": "xterm"},
    )
    terminal = Terminal(master, process)
    loop = asyncio.get_running_loop()
    loop.add_reader(master, terminal.take)
    try:
        yield terminal
    finally:
        loop.remove_reader(master)
        if process.returncode is None:
            process.kill()
        await process.wait()
        os.close(slave)
        os.close(master)
