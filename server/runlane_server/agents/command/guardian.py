"""The server's side of the guardian, the process that starts all programs and outlives the server.

A server that gets SIGKILL cannot clean up, and its programs would continue without it. So another
process starts them: it forks a launcher for each run, which ends the run's processes when its
socket to the server closes; the kernel closes it however the server ends. PR_SET_PDEATHSIG would
not do: it does not reach grandchildren. A fork of the guardian is also faster and safer than one of
the server, which has threads and much memory.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from runlane_server.agents.command.run_cgroups import RunCgroups

_ROOT = Path(__file__).parents[3]

# Appended, so that nothing beside the package replaces a module of the standard library.
_SCRIPT = (
    f"import sys; sys.path.append({str(_ROOT)!r}); "
    "from runlane_server.agents.command.guardian_process import main; main()"
)


_REPLACED = {errno.EAGAIN, errno.EPIPE, errno.ECONNRESET, errno.ETOOMANYREFS}
"""Errors from a guardian that was killed or does not read. The last one: the kernel keeps as many
unread files per user as a process may open, except for root."""

_NO_VARIABLES: dict[str, str] = {}
"""The server's variables have secrets, and the guardian needs none of them."""


class Guardian:
    """Starts launchers. Not thread-safe.

    `grace` is the time in seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, *, grace: float) -> None:
        self._grace = grace
        self.cgroups = RunCgroups()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """The process id, if it was started."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the process unless it is running. Raises OSError."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # A session of its own, so that Ctrl-C on the server's terminal does not reach it.
                self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and script
                    [sys.executable, *("-I", "-S", "-X", "utf8", "-c"), _SCRIPT, str(self._grace)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=_NO_VARIABLES,
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self._socket = ours

    def launch(self, files: Sequence[int]) -> None:
        """Starts a launcher with these files (`guardian_process.FILES`). Raises OSError.

        A guardian that was killed or does not read is replaced.
        """
        try:
            self.start()
            self._send(files)
        except OSError as error:
            if error.errno not in _REPLACED:
                raise
            self.stop()
            self.start()
            self._send(files)

    def stop(self) -> None:
        """Kills the process. Launchers continue: each has its own socket to the server."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        self._close_socket()

    async def close(self) -> None:
        """Ends the process once all launchers have ended."""
        process, self._process = self._process, None
        self._close_socket()
        if process is not None:
            await asyncio.to_thread(process.wait)
        await self.cgroups.close()

    def _send(self, files: Sequence[int]) -> None:
        socket.send_fds(cast("socket.socket", self._socket), [b"\n"], list(files))

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
