"""Ends the programs of a server that was killed.

A server that gets SIGKILL cannot clean up, and its programs would continue without it. So a small
helper process knows their process groups and ends them when the pipe from the server closes; the
kernel closes it however the server ends. PR_SET_PDEATHSIG would not do: it does not reach
grandchildren, and needs code between fork and exec, which is not safe in a process with threads.
The helper costs a run two short writes.

Between the start of a program and `watch` its group is unknown to the helper, for a few
microseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from typing import IO, cast

_SCRIPT = """
import os, signal, sys, time

def end(groups, number):
    for group in groups:
        try:
            os.killpg(group, number)
        except OSError:
            pass

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
groups = set()
while line := sys.stdin.readline():
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
if groups:
    end(groups, signal.SIGTERM)
    time.sleep(float(sys.argv[1]))
    end(groups, signal.SIGKILL)
"""


class Guardian:
    """Watches the process groups that must not outlive this process.

    `grace` is the time in seconds between SIGTERM and SIGKILL. Not thread-safe.
    """

    def __init__(self, *, grace: float) -> None:
        self._grace = grace
        self._groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the helper process unless it is running."""
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        # A session of its own, so that Ctrl-C on the server's terminal does not reach it.
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and script
            [sys.executable, "-I", "-S", "-c", _SCRIPT, str(self._grace)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            start_new_session=True,
        )
        os.set_blocking(self._pipe(), False)
        for group in self._groups:
            self._send("+", group)

    def watch(self, group: int) -> None:
        """Ends this group when this process ends."""
        self._groups.add(group)
        self._send_or_restart("+", group)

    def unwatch(self, group: int) -> None:
        """Removes a group that has ended."""
        self._groups.discard(group)
        if self._process is not None:
            self._send_or_restart("-", group)

    async def close(self) -> None:
        """Ends the helper process. No group is watched any more."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            await asyncio.to_thread(process.wait)

    def _send_or_restart(self, verb: str, group: int) -> None:
        try:
            if self._process is None:
                self.start()  # sends all groups
            else:
                self._send(verb, group)
        except OSError:  # the helper was killed, or does not read
            self._stop()
            # If no process can be started now, the next run retries.
            with contextlib.suppress(OSError):
                self.start()

    def _send(self, verb: str, group: int) -> None:
        os.write(self._pipe(), f"{verb}{group}\n".encode())

    def _pipe(self) -> int:
        process = cast("subprocess.Popen[bytes]", self._process)
        return cast("IO[bytes]", process.stdin).fileno()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            # Killed before its pipe closes, so that it does not end the groups that it watches.
            process.kill()
            process.stdin.close()
            process.wait()
