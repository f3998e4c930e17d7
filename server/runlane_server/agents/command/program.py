"""A program in its own process group, whose pipes are served by callbacks of the event loop.

asyncio's own subprocesses are not used, for two reasons. They reap a program as soon as it exits,
and from then on its group id may belong to others; here the group is ended while the exited program
still holds the id. And they read ahead into memory; here a slow consumer blocks the program through
the pipe.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import termios
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

TAIL_BYTES = 2048
"""Number of bytes kept of the end of stderr."""

_CHUNK = 1 << 16

_REAP_TIMEOUT = 1.0
"""Seconds to wait for a program after SIGKILL; the kernel may keep it longer."""


class Program:
    """A running program, bound to one event loop. Finally `end` must be awaited.

    The group gets SIGKILL as soon as the program itself exits: background processes are not part of
    the turn. A process that moved to another session is out of reach.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: bytes,
        cwd: Path | None = None,
        on_exit: Callable[[int], None] = lambda _group: None,
    ) -> None:
        """Starts the program. Raises OSError or ValueError.

        `cwd` is its working directory, by default that of this process. `on_exit` is called with
        the id of its group when the program has ended. It inherits no open file except its three
        pipes.
        """
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self._process = subprocess.Popen(  # noqa: S603 - a list, and no shell
            argv,
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            close_fds=True,
            start_new_session=True,
        )
        self._stdin = cast("IO[bytes]", self._process.stdin)
        self._stdout = cast("IO[bytes]", self._process.stdout)
        self._stderr = cast("IO[bytes]", self._process.stderr)
        self._unwritten = memoryview(stdin)
        self._tail = bytearray()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._waiter: asyncio.Future[None] | None = None
        self._unread = 0
        try:
            self._watch_pipes()
            self._watch_exit()
        except BaseException:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._close_pipes()
            raise

    @property
    def group(self) -> int:
        """The id of its process group, which is also the process id of the program."""
        return self._process.pid

    @property
    def error_tail(self) -> str:
        """The end of its stderr, at most `TAIL_BYTES` bytes."""
        return self._tail.decode(errors="replace").strip()

    async def read(self) -> bytes:
        """Waits for output and returns some of it; empty at the end of the output."""
        while True:
            if self._exit.done():
                return self._read_rest()
            with contextlib.suppress(BlockingIOError):
                return os.read(self._stdout.fileno(), _CHUNK)
            await self._output_or_exit()

    async def exit_code(self) -> int:
        """Waits for its exit; returns the code, or the negative number of the fatal signal."""
        await asyncio.wait({self._exit})
        return self._exit.result()

    async def end(self, grace: float) -> None:
        """Ends the group: SIGTERM, then SIGKILL after `grace` seconds or if cancelled."""
        try:
            if not self._exit.done():
                self._loop.add_reader(self._stdout.fileno(), self._discard)
                self._signal(signal.SIGTERM)
                await asyncio.wait({self._exit}, timeout=grace)
            if not self._exit.done():
                self._signal(signal.SIGKILL)
                await asyncio.wait({self._exit}, timeout=_REAP_TIMEOUT)
        finally:
            if not self._exit.done():
                self._signal(signal.SIGKILL)
            self._close_pipes()

    # --- Pipes ----------------------------------------------------------------------------------

    def _watch_pipes(self) -> None:
        for pipe in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(pipe.fileno(), False)
        self._loop.add_reader(self._stderr.fileno(), self._keep_tail)
        self._loop.add_writer(self._stdin.fileno(), self._feed)

    def _feed(self) -> None:
        try:
            if self._unwritten:
                written = os.write(self._stdin.fileno(), self._unwritten[:_CHUNK])
                self._unwritten = self._unwritten[written:]
        except BlockingIOError:
            return
        except OSError:  # the program does not read its input, which is fine
            self._unwritten = memoryview(b"")
        if not self._unwritten:
            self._loop.remove_writer(self._stdin.fileno())
            self._stdin.close()

    def _keep_tail(self) -> bool:
        """Reads a chunk of stderr; returns whether there may be more."""
        try:
            data = os.read(self._stderr.fileno(), _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._stderr.fileno())
            self._stderr.close()
        self._tail += data
        del self._tail[:-TAIL_BYTES]
        return bool(data)

    def _discard(self) -> None:
        """Reads and drops output, so that a full pipe does not block a program that cleans up."""
        with contextlib.suppress(BlockingIOError):
            if not os.read(self._stdout.fileno(), _CHUNK):
                self._loop.remove_reader(self._stdout.fileno())

    def _read_rest(self) -> bytes:
        """Reads what was in the pipe at the exit and no more: a background process may write on."""
        data = os.read(self._stdout.fileno(), min(_CHUNK, self._unread)) if self._unread else b""
        self._unread -= len(data)
        return data

    async def _output_or_exit(self) -> None:
        self._waiter = self._loop.create_future()
        self._loop.add_reader(self._stdout.fileno(), self._wake)
        try:
            await self._waiter
        finally:
            self._loop.remove_reader(self._stdout.fileno())
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _close_pipes(self) -> None:
        for pipe in (self._stdin, self._stdout, self._stderr):
            if not pipe.closed:
                self._loop.remove_reader(pipe.fileno())
                self._loop.remove_writer(pipe.fileno())
                pipe.close()

    # --- Exit -----------------------------------------------------------------------------------

    def _watch_exit(self) -> None:
        try:
            pidfd = os.pidfd_open(self.group)
        except (AttributeError, OSError):  # not Linux, or an old or a restricted kernel
            threading.Thread(target=self._await_exit, daemon=True).start()
        else:
            self._loop.add_reader(pidfd, self._exited, pidfd)

    def _await_exit(self) -> None:
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self.group, os.WEXITED | os.WNOWAIT)
        else:
            self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._exited)

    def _exited(self, pidfd: int | None = None) -> None:
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        # Not reaped yet, so no other group can have its id.
        self._signal(signal.SIGKILL)
        code = self._process.wait()
        self._on_exit(self.group)
        if not self._stdout.closed:
            self._unread = _bytes_in(self._stdout)
        if not self._stderr.closed:
            for _ in range(_bytes_in(self._stderr) // _CHUNK + 1):
                if not self._keep_tail():
                    break
        self._exit.set_result(code)
        self._wake()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, number)


def _bytes_in(pipe: IO[bytes]) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]
