"""Keeps one process of an agent running."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from runlane_server.agents.processes.protocol import BEAT, ERROR, LOADED, READY, START
from runlane_server.agents.worker.workers import Workers
from runlane_server.core.errors import SettingsError, StartError

log = structlog.get_logger()

BACKOFF = (0.1, 1.0, 2.0, 5.0, 10.0)
"""Seconds before the first restart, the second, and so on."""

STABLE_SECONDS = 60.0
"""A process that exits after it was ready for so long is restarted with the first backoff again."""

SILENCE = 2.0
"""Seconds without a beat after which a process gets no further run."""

BLOCKED_LIMIT = 10.0
"""Seconds without a beat after which a process is killed, if no run in it could still end well."""

TICK = 0.5
"""Seconds between two looks at a process."""

CLOSE_GRACE = 3.0
"""Seconds that a process has to exit when the server stops."""

MAX_LINE = 1 << 16
"""Bytes of a line of a process."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """How to start a process: its arguments, the line with its settings, and the name with which
    its slots are offered."""

    argv: Sequence[str]
    settings: str
    worker_id: str


class AgentProcess:
    """Process `number` of an agent. `on_change` is called when its state has changed."""

    def __init__(
        self,
        agent: str,
        number: int,
        spec: ProcessSpec,
        workers: Workers,
        on_change: Callable[[], None],
    ) -> None:
        self.is_loaded = False
        self.is_ready = False
        self.error: StartError | None = None
        """Why the process could not load the agent or get it ready, until it is set to None."""
        self._names = {"agent": agent, "agent_process": number}
        self._spec = spec
        self._workers = workers
        self._on_change = on_change
        self._process: Process | None = None
        self._writer: StreamWriter | None = None
        self._may_start = self._is_closing = self._is_paused = False
        self._beat_at = self._ready_at = 0.0
        self._supervising: asyncio.Task[None] | None = None

    def launch(self) -> None:
        """Starts the process, unless it was started before."""
        if self._supervising is None and not self._is_closing:
            self._supervising = asyncio.create_task(self._supervise())

    def allow_start(self) -> None:
        """Lets the process start the agent and offer its slots."""
        if not self._may_start:
            self._may_start = True
            self._send_start()

    def send(self, line: str) -> None:
        """Sends the process a line, if it runs."""
        if self._writer is not None:
            self._writer.write(f"{line}\n".encode())

    def _send_start(self) -> None:
        if self._may_start:
            self.send(START)

    async def close(self) -> None:
        """Ends the process: it has `CLOSE_GRACE` seconds to close the agent."""
        self._is_closing = True
        if self._supervising is None:
            return
        if self._writer is not None:
            self._writer.close()
        _, late = await asyncio.wait({self._supervising}, timeout=CLOSE_GRACE)
        if late:
            self._kill()
            self._supervising.cancel()
            await asyncio.wait({self._supervising})

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    # --- The life of the process --------------------------------------------------------------

    async def _supervise(self) -> None:
        deaths = 0
        while True:
            end = await self._run_once()
            lasted = time.monotonic() - self._ready_at if self.is_ready else 0.0
            self.is_loaded = self.is_ready = False
            if self._is_closing:
                return
            deaths = 0 if lasted >= STABLE_SECONDS else deaths
            backoff = BACKOFF[min(deaths, len(BACKOFF) - 1)]
            deaths += 1
            log.warning("agent process exited", **self._names, end=end, restart_in_s=backoff)
            await asyncio.sleep(backoff)

    async def _run_once(self) -> str:
        """Starts the process and waits until it has exited; returns how that went."""
        try:
            process, reader, writer = await self._start()
        except OSError as error:
            self._set_error(StartError(f"its process could not be started: {error.strerror}"))
            return f"could not be started: {error.strerror}"
        self._process, self._writer = process, writer
        watching = asyncio.create_task(self._watch())
        try:
            await self._read(reader)
            # It has closed its end. One that does not exit is of no use.
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_GRACE):
                    await process.wait()
            self._kill()
            return _describe(await process.wait())
        finally:
            watching.cancel()
            writer.close()
            self._process = self._writer = None
            self._pause(blocked=False)

    async def _start(self) -> tuple[Process, StreamReader, StreamWriter]:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._spec.argv, stdin=theirs.fileno(), start_new_session=True
                )
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE)
        # Not as arguments, which every user can read.
        writer.write(f"{self._spec.settings}\n".encode())
        self._writer = writer
        self._send_start()
        return process, reader, writer

    async def _read(self, reader: StreamReader) -> None:
        with suppress(OSError, ValueError):  # it died, or wrote nonsense
            while line := (await reader.readline()).decode(errors="replace"):
                self._take(line.rstrip("\n"))

    def _take(self, line: str) -> None:
        self._beat_at = time.monotonic()
        kind, _, rest = line.partition(" ")
        match kind:
            case _ if kind == BEAT:
                return
            case _ if kind == LOADED:
                self.is_loaded = True
            case _ if kind == READY:
                self.is_ready, self._ready_at = True, self._beat_at
                pid = None if self._process is None else self._process.pid
                log.info("agent process ready", **self._names, pid=pid)
            case _ if kind == ERROR:
                code, _, why = rest.partition(" ")
                self._set_error(SettingsError(why) if code == "2" else StartError(why))
        self._on_change()

    def _set_error(self, error: StartError) -> None:
        self.error = error
        self._on_change()

    # --- Blocked processes --------------------------------------------------------------------

    async def _watch(self) -> None:
        """Keeps runs away from a process whose event loop is blocked, and kills it if no run in it
        could still end well."""
        while True:
            await asyncio.sleep(TICK)
            if not self.is_ready:
                continue
            silent = time.monotonic() - self._beat_at
            self._pause(blocked=silent > SILENCE)
            held = self._workers.held_by(self._spec.worker_id)
            is_hopeless = silent > BLOCKED_LIMIT and (held.stuck > 0 or held.active == 0)
            is_leaking = held.stuck > 0 and held.active == 0 and held.stuck_for > BLOCKED_LIMIT
            if is_hopeless or is_leaking:
                log.error(
                    "agent process killed: its code does not return",
                    **self._names,
                    silent_s=round(silent, 1),
                    stuck_runs=held.stuck,
                    lost_runs=held.active,
                )
                self._kill()
                return

    def _pause(self, *, blocked: bool) -> None:
        if blocked == self._is_paused:
            return
        self._is_paused = blocked
        if blocked:
            log.warning("agent process does not respond; it gets no runs", **self._names)
            self._workers.pause(self._spec.worker_id)
        else:
            log.info("agent process gets runs again", **self._names)
            self._workers.unpause(self._spec.worker_id)


def _describe(code: int) -> str:
    """How a process ended: `exited with code 1`, `was killed by SIGKILL`."""
    if code >= 0:
        return f"exited with code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
