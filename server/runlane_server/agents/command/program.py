"""A program that runs in a launcher, and whose pipes are served by callbacks of the event loop.

asyncio's own subprocesses are not used: they read ahead into memory, whereas here a slow consumer
blocks the program through the pipe; and they know the program alone, not what it started.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import termios
import time
from collections.abc import Sequence
from dataclasses import replace

import structlog

from runlane_server.agents.command.guardian import Guardian
from runlane_server.agents.command.launcher import KILL, REMNANT_GRACE, TERMINATE, Command

TAIL_BYTES = 2048
"""Number of bytes kept of the end of stderr."""

DRAIN_IDLE = 0.5
"""Seconds without output after which processes that outlive the program are ended. They count only
while such a process holds the program's stdout."""

DRAIN_TIMEOUT = 2.0
"""Seconds after the program's exit in which such processes may write at most."""

GUARDIAN_TIMEOUT = 4.0
"""Seconds that the guardian has to start a launcher."""

START_TIMEOUT = 30.0
"""Seconds that a launcher has to start a program, which may be on a slow disk."""

_CHUNK = 1 << 16

_KILL_TIMEOUT = 1.0
"""Seconds to wait for the processes after SIGKILL; the kernel may keep them longer."""

log = structlog.get_logger()


class ProgramLost(Exception):
    """The launcher was killed, so the exit of the program is unknown."""


class Program:
    """A running program and the processes that it starts. Bound to one event loop.

    `started` must be awaited first and `end` last. A process that outlives the program is ended
    once it has closed the program's stdout, is silent for `DRAIN_IDLE`, or after `DRAIN_TIMEOUT`.
    """

    def __init__(self, guardian: Guardian, command: Command, *, stdin: bytes | None) -> None:
        """Requests the start. With None, stdin stays open for `write`. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._guardian = guardian
        self._keeps_stdin = stdin is None
        self._unwritten = bytearray(stdin or b"")
        self._tail = bytearray()
        self._partial = b""
        self._launcher: asyncio.Future[int] = self._loop.create_future()
        self._started: asyncio.Future[int] = self._loop.create_future()
        self._exit: asyncio.Future[int | None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._waiter: asyncio.Future[None] | None = None
        self._unread = 0
        self._exited_at = self._last_output = 0.0
        self._was_cut = self._ended = False
        self._cgroup = guardian.cgroups.create()
        try:
            self._launch(replace(command, cgroup=self._cgroup))
        except BaseException:
            guardian.cgroups.end_soon(self._cgroup)
            raise

    async def started(self) -> int:
        """Waits until the program runs; returns its process id. Raises OSError if it does not run,
        and ProgramLost if it may have run."""
        await asyncio.wait({self._launcher}, timeout=GUARDIAN_TIMEOUT)
        if not self._launcher.done():
            self._guardian.stop()  # it was stopped, or is stuck
            # Now it is certain whether there is a launcher, which would start the program.
            await asyncio.wait({self._launcher}, timeout=_KILL_TIMEOUT)
        if not self._launcher.done():
            raise OSError(errno.EAGAIN, "the guardian process does not answer")
        await asyncio.wait({self._started}, timeout=START_TIMEOUT)
        if not self._started.done():
            raise OSError(errno.ETIMEDOUT, "its launcher does not answer")
        return self._started.result()

    @property
    def error_tail(self) -> str:
        """The end of its stderr, at most `TAIL_BYTES` bytes."""
        return self._tail.decode(errors="replace").strip()

    @property
    def was_cut(self) -> bool:
        """Whether processes that outlived the program were ended while they were writing."""
        return self._was_cut

    @property
    def unwritten(self) -> int:
        """Number of bytes that the program has not read from its stdin's pipe, beside those that
        fit into the pipe."""
        return len(self._unwritten)

    def write(self, data: bytes) -> None:
        """Adds to its stdin, which was kept open. Nothing is written once it has closed it."""
        if self._stdin in self._open:
            if not self._unwritten:
                self._loop.add_writer(self._stdin, self._feed)
            self._unwritten += data

    async def read(self) -> bytes:
        """Waits for output and returns some of it; empty at the end of the output."""
        while not self._gone.done():
            if self._exit.done() and self._now() >= self._exited_at + DRAIN_TIMEOUT:
                is_writing = self._now() < self._last_output + DRAIN_IDLE
                self._was_cut = is_writing or _bytes_in(self._stdout) > 0
                await self._kill()
                break
            with contextlib.suppress(BlockingIOError):
                data = os.read(self._stdout, _CHUNK)
                self._last_output = self._now()
                return data
            if self._exit.done() and self._now() >= self._last_output + DRAIN_IDLE:
                await self._kill()
                break
            await self._output_or_change()
        return self._read_rest()

    async def exit_code(self) -> int:
        """Waits for its exit; returns the code, or the negative number of the fatal signal. Raises
        ProgramLost."""
        await asyncio.wait({self._exit})
        code = self._exit.result()
        if code is None:
            raise ProgramLost
        return code

    async def end(self, grace: float) -> None:
        """Ends all processes: SIGTERM, then SIGKILL after `grace` seconds or if cancelled.

        The others have `REMNANT_GRACE` once the program itself has exited.
        """
        try:
            if not self._exit.done():
                self._loop.add_reader(self._stdout, self._discard)
                self._order(TERMINATE)
                await asyncio.wait({self._exit}, timeout=grace)
                if self._exit.done():
                    await asyncio.wait({self._gone}, timeout=min(grace, REMNANT_GRACE))
            await self._kill()
            await self._guardian.cgroups.end(self._cgroup)
        finally:
            self._ended = True
            for file in (self._stdin, self._stdout, self._stderr):
                self._close(file)
            if self._gone.done():
                self._close_control()
            else:  # cancelled: the processes are not waited for, but must end
                self._order(KILL)
                self._guardian.cgroups.end_soon(self._cgroup)
                self._loop.call_later(_KILL_TIMEOUT, self._give_up)

    async def _kill(self) -> None:
        """Sends SIGKILL and waits until no process is left."""
        if not self._gone.done():
            self._order(KILL)
            await asyncio.wait({self._gone}, timeout=_KILL_TIMEOUT)
        if not self._gone.done():
            self._kill_launcher()
            await asyncio.wait({self._gone}, timeout=_KILL_TIMEOUT)

    def _kill_launcher(self) -> None:
        """Kills a launcher that does not obey: a program may have stopped it.

        Its id is valid, as it holds its socket. The guardian kills what it leaves.
        """
        if not self._gone.done() and self._launcher.done() and (pid := self._launcher.result()):
            log.warning("processes of a run remain after SIGKILL", launcher=pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @staticmethod
    def _now() -> float:
        return time.monotonic()

    # --- Start ----------------------------------------------------------------------------------

    def _launch(self, command: Command) -> None:
        with contextlib.ExitStack() as sent, contextlib.ExitStack() as kept:
            theirs = [_as_file(command.to_json(), sent)]
            ours = []
            for writes in (True, False, False):
                pipe = os.pipe()
                kept.callback(os.close, pipe[writes])
                sent.callback(os.close, pipe[not writes])
                ours.append(pipe[writes])
                theirs.append(pipe[not writes])
            control, launcher = socket.socketpair()
            kept.callback(control.close)
            sent.callback(launcher.close)
            self._guardian.launch([launcher.fileno(), *theirs])
            kept.pop_all()
        self._stdin, self._stdout, self._stderr = ours
        self._control = control
        self._open = {self._stdin, self._stdout, self._stderr}
        for file in self._open:
            os.set_blocking(file, False)
        self._control.setblocking(False)
        self._loop.add_reader(self._stderr, self._keep_tail)
        self._loop.add_writer(self._stdin, self._feed)
        self._loop.add_reader(self._control, self._on_report)

    # --- Pipes ----------------------------------------------------------------------------------

    def _feed(self) -> None:
        try:
            if self._unwritten:
                with memoryview(self._unwritten) as view:
                    written = os.write(self._stdin, view[:_CHUNK])
                del self._unwritten[:written]
        except BlockingIOError:
            return
        except OSError:  # the program does not read its input, which is fine
            self._unwritten.clear()
            self._keeps_stdin = False
        if self._unwritten:
            return
        if self._keeps_stdin:
            self._loop.remove_writer(self._stdin)
        else:
            self._close(self._stdin)

    def _keep_tail(self) -> bool:
        """Reads a chunk of stderr; returns whether there may be more."""
        try:
            data = os.read(self._stderr, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._close(self._stderr)
        self._tail += data
        del self._tail[:-TAIL_BYTES]
        return bool(data)

    def _discard(self) -> None:
        """Reads and drops output, so that a full pipe does not block a program that cleans up."""
        with contextlib.suppress(BlockingIOError):
            if not os.read(self._stdout, _CHUNK):
                self._loop.remove_reader(self._stdout)

    def _read_rest(self) -> bytes:
        """Reads what was in the pipe when all had ended: a process out of reach may write on."""
        data = os.read(self._stdout, min(_CHUNK, self._unread)) if self._unread else b""
        self._unread -= len(data)
        return data

    async def _output_or_change(self) -> None:
        """Waits for output, for the exit of a process, or until the drain may be over."""
        timeout = None
        if self._exit.done():
            until = min(self._last_output + DRAIN_IDLE, self._exited_at + DRAIN_TIMEOUT)
            timeout = max(until - self._now(), 0.0)
        waiter = self._waiter = self._loop.create_future()
        self._loop.add_reader(self._stdout, self._wake)
        try:
            await asyncio.wait({waiter}, timeout=timeout)
        finally:
            self._loop.remove_reader(self._stdout)
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _close(self, file: int) -> None:
        if file in self._open:
            self._open.discard(file)
            self._loop.remove_reader(file)
            self._loop.remove_writer(file)
            os.close(file)

    def _give_up(self) -> None:
        self._kill_launcher()
        self._close_control()

    def _close_control(self) -> None:
        if self._started.done():
            self._started.exception()  # a failure that was not awaited is not worth a log line
        if self._control.fileno() >= 0:
            self._loop.remove_reader(self._control)
            self._control.close()

    # --- The launcher ---------------------------------------------------------------------------

    def _order(self, order: bytes) -> None:
        if not self._gone.done():
            with contextlib.suppress(OSError):  # it has ended
                self._control.send(order)

    def _on_report(self) -> None:
        try:
            data = self._control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._on_line(line.decode().split())
        if not data:
            self._on_end()
        self._wake()

    def _on_line(self, words: Sequence[str]) -> None:
        match words:
            case ["launcher", pid]:
                self._launcher.set_result(int(pid))
            case ["started", program]:
                self._started.set_result(int(program))
            case ["failed", number]:
                error = OSError(int(number), os.strerror(int(number)))
                self._started.set_exception(error)
            case ["exited", code]:
                self._exited_at = self._last_output = self._now()
                self._exit.set_result(int(code))
            case ["gone"]:
                self._on_gone()

    def _on_gone(self) -> None:
        if self._gone.done():
            return
        if self._stdout in self._open:
            self._unread = _bytes_in(self._stdout)
        if self._stderr in self._open:
            for _ in range(_bytes_in(self._stderr) // _CHUNK + 1):
                if not self._keep_tail():
                    break
        self._gone.set_result(None)
        if self._ended:
            self._close_control()

    def _on_end(self) -> None:
        """The launcher has ended, or is not to come."""
        self._close_control()
        if not self._launcher.done():
            self._launcher.set_result(0)
        if not self._started.done():
            # With a launcher that could not report it any more, the program may have started. It
            # may even have killed the launcher, and must not be started twice.
            self._started.set_exception(
                ProgramLost()
                if self._launcher.result()
                # EAGAIN: the guardian was killed, or had too many open files.
                else OSError(errno.EAGAIN, "the launcher did not start")
            )
        if not self._exit.done():
            self._exit.set_result(None)
        self._on_gone()


def _as_file(data: bytes, closing: contextlib.ExitStack) -> int:
    """A file in memory with this content, which `closing` closes."""
    file = os.memfd_create("command")
    closing.callback(os.close, file)
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _bytes_in(pipe: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]
