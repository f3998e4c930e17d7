"""The guardian process: forks a launcher for each run, and ends what a launcher leaves behind.

It is a program of its own, started with an empty environment, so that nothing of the server is in
its memory. It has one thread and imports little, so that a fork is safe and fast.

Each message from the server is one byte with the open files of a run (`FILES`). The guardian exits
when the server is gone and every launcher has ended. A launcher that is killed leaves its processes
to the guardian, which kills them.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import time

from runlane_server.agents.command.launcher import KILL_TIMEOUT, run_launcher
from runlane_server.agents.command.prctl import adopt_orphans, protect_memory
from runlane_server.agents.command.process_tree import (
    children_of,
    has_children,
    reap,
    signal_descendants,
)

FILES = 5
"""Number of files of a run: its control socket, its command, and its three standard streams."""

_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_KILL_INTERVAL_MS = 20


def main() -> None:
    """Serves the server whose socket is the stdin. The argument is the grace period in seconds."""
    protect_memory()
    adopt_orphans()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _Guardian(_take_stdin(), float(sys.argv[1])).run()


class _Guardian:
    def __init__(self, server: socket.socket, grace: float) -> None:
        self._server = server
        self._grace = grace
        self._launchers: set[int] = set()
        self._wakeups, self._wakeup_writer = os.pipe()
        os.set_blocking(self._wakeups, False)
        os.set_blocking(self._wakeup_writer, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_writer, warn_on_full_buffer=False)

    def run(self) -> None:
        """Returns when the server is gone and its programs have ended."""
        poll = select.poll()
        poll.register(self._server, select.POLLIN)
        poll.register(self._wakeups, select.POLLIN)
        deadline = float("inf")
        orphans = False
        while time.monotonic() < deadline:
            waits = orphans or deadline != float("inf")
            for file, _ in poll.poll(_KILL_INTERVAL_MS if waits else None):
                if file == self._wakeups:
                    os.read(self._wakeups, 4096)
                elif not self._launch():
                    poll.unregister(self._server)
                    deadline = time.monotonic() + self._grace + KILL_TIMEOUT
            for pid, _ in reap():
                self._launchers.discard(pid)
            if orphans := not self._launchers.issuperset(children_of(os.getpid())):
                signal_descendants(signal.SIGKILL, spare=self._launchers)
            if deadline != float("inf") and not self._launchers and not orphans:
                return
        # A launcher that was stopped cannot end its processes. They are then this process's.
        while has_children():
            signal_descendants(signal.SIGKILL)
            list(reap())
            time.sleep(_KILL_INTERVAL_MS / 1000)

    def _launch(self) -> bool:
        """Forks a launcher for the next message; returns False if the server is gone."""
        try:
            data, files, _, _ = socket.recv_fds(self._server, 1, FILES)
        except OSError:
            return False
        if not data:
            return False
        try:
            for file in files:
                os.set_inheritable(file, False)
            if len(files) == FILES:  # else the kernel dropped some, as too many are open
                self._launchers.add(self._fork(files))
        except OSError as exc:
            os.write(files[0], f"failed {exc.errno or errno.EAGAIN}\n".encode())
        finally:
            for file in files:
                os.close(file)
        return True

    def _fork(self, files: list[int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            control, command, *stdio = files
            self._server.close()
            os.close(self._wakeups)
            os.close(self._wakeup_writer)
            run_launcher(socket.socket(fileno=control), command, stdio)
            code = 0
        finally:
            os._exit(code)


def _take_stdin() -> socket.socket:
    """The socket to the server. Nothing that this process starts inherits it."""
    server = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    return server
