"""`--workers N`: N processes that serve on one port, each a node, and the parent of them.

The parent opens no store and serves nothing. It starts the workers, holds the port, starts anew
what died, and hands signals on. A worker is a program of its own (`worker.py`), as gRPC does not
survive a fork; a session of its own, too, so that a Ctrl-C at the terminal comes once: by the
parent.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import click
import structlog

from runlane_server.config import Config
from runlane_server.core.errors import SettingsError, StartError
from runlane_server.net.addresses import of_worker, split_address
from runlane_server.process import systemd
from runlane_server.process.app import say_listening
from runlane_server.process.child import ERROR, SERVING
from runlane_server.process.security import check as check_entrance
from runlane_server.process.shared_port import held
from runlane_server.store.open import StoreUrl
from runlane_server.telemetry import logs

log = structlog.get_logger()

PAUSES = (1.0, 2.0, 5.0, 10.0)
"""Seconds until a worker is started anew: the first time, the second, and so on."""

STEADY_SECONDS = 60.0
"""After serving for so long a worker that dies counts as one that died for the first time."""


def run(config: Config) -> int:
    """Serves by several processes until a signal comes; returns the exit code.

    Raises StartError, and UsageError if the settings do not go together.
    """
    check(config)
    logs.configure(config.log_format, config.log_level, content=config.log_content)
    with held(config.listen) as address:
        return asyncio.run(Workers(replace(config, listen=address)).serve())


def check(config: Config) -> None:
    """Raises UsageError or StartError if several processes cannot serve with these settings."""
    _, port = split_address(config.listen)
    if port is None:
        raise click.UsageError(f"--workers: cannot share {config.listen}; listen on HOST:PORT")
    if not StoreUrl.parse(config.store).is_shareable:
        raise SettingsError("--workers needs a store that nodes can share: postgresql://")
    check_entrance(config)
    of_worker(config.node_address, config.workers)
    of_worker(config.metrics_listen, config.workers, "--metrics-listen")


class Workers:
    """The parent's view: keeps `config.workers` processes at work until it is told to stop."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stop = asyncio.Event()
        self._all_served = asyncio.Event()
        self._served: set[int] = set()
        self._processes: set[_Process] = set()
        self._start_error: StartError | None = None
        self._exit_code = 0

    async def serve(self) -> int:
        """Serves until a signal comes; returns the exit code. Raises StartError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        keepers = [
            asyncio.create_task(self._keep(number)) for number in range(1, self._config.workers + 1)
        ]
        announcing = asyncio.create_task(self._announce())
        # A keeper returns once it is told to stop; before that, only by a mistake of ours.
        await asyncio.wait(keepers, return_when=asyncio.FIRST_COMPLETED)
        announcing.cancel()
        if not self._stop.is_set():
            self._order_stop()
        await asyncio.wait(keepers)
        for keeper in keepers:
            keeper.result()
        if self._start_error is not None:
            raise self._start_error
        log.info("stopped", exit_code=self._exit_code)
        return self._exit_code

    async def _announce(self) -> None:
        await self._all_served.wait()
        log.info("serving", address=self._config.listen, workers=self._config.workers)
        say_listening(self._config.listen)

    def _signalled(self, number: signal.Signals) -> None:
        log.info("signal", name=number.name, again=self._stop.is_set())
        self._order_stop()

    def _order_stop(self) -> None:
        systemd.notify(systemd.STOPPING)
        self._stop.set()
        for process in self._processes:
            process.terminate()

    async def _keep(self, number: int) -> None:
        """Has the worker of that number at work until all are to stop."""
        deaths = 0
        while not self._stop.is_set():
            life = await self._live(number)
            if self._stop.is_set():
                self._exit_code |= not life.ended_well
                return
            if not self._all_served.is_set():
                self._start_error = life.start_error or StartError(
                    f"worker {number} {life.end} before all served"
                )
                self._order_stop()
                return
            deaths = 0 if life.seconds >= STEADY_SECONDS else deaths
            pause = PAUSES[min(deaths, len(PAUSES) - 1)]
            deaths += 1
            why = {"error": life.error} if life.error else {}
            log.warning("a worker died", worker=number, end=life.end, again_in_s=pause, **why)
            await self._stopped_within(pause)

    async def _live(self, number: int) -> _Life:
        """Starts a worker, and waits for its end."""
        try:
            process = await _Process.start(number, self._config)
        except OSError as error:
            return _Life(error=f"worker {number} could not be started: {error.strerror}")
        self._processes.add(process)
        log.info("worker started", worker=number, pid=process.pid)
        try:
            if self._stop.is_set():
                process.terminate()  # the order came while it was started
            return await process.live(lambda: self._serves(number))
        finally:
            self._processes.discard(process)

    def _serves(self, number: int) -> None:
        if self._all_served.is_set():
            log.info("a worker serves again", worker=number)
        self._served.add(number)
        if len(self._served) == self._config.workers:
            self._all_served.set()

    async def _stopped_within(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()


@dataclass(frozen=True, slots=True)
class _Life:
    """What became of a process: `error` is what it said of its own end, `seconds` how long it
    served."""

    code: int = 1
    seconds: float = 0.0
    error: str = ""

    @property
    def ended_well(self) -> bool:
        """Whether it went as it was told. It catches the signal as long as it has anything to lose:
        not before it takes up work, and not any more once all is written."""
        return self.code in {0, -signal.SIGTERM}

    @property
    def start_error(self) -> StartError | None:
        """Why it did not start, if it said so."""
        if not self.error:
            return None
        kind = SettingsError if self.code == SettingsError.exit_code else StartError
        return kind(self.error)

    @property
    def end(self) -> str:
        """How it ended."""
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-self.code).name}"
        return f"was ended by signal {-self.code}"


class _Process:
    """A worker, as its parent has it."""

    def __init__(self, process: Process, reader: StreamReader, writer: StreamWriter) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, number: int, config: Config) -> _Process:
        """Starts a worker with those settings. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "runlane_server.process.child", str(number)),
                    stdin=theirs.fileno(),
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours)
        # Not by its arguments, which everybody can see: the URL of a store may have a password.
        writer.write(_settings(config))
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def terminate(self) -> None:
        """Tells it to stop, or to be quick about it."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    async def live(self, serves: Callable[[], None]) -> _Life:
        """Waits for its end; `serves` is called once it serves."""
        began = None
        try:
            said = await self._line()
            if said == SERVING:
                began = time.monotonic()
                serves()
            code = await self._process.wait()
        finally:
            self._writer.close()
        seconds = 0.0 if began is None else time.monotonic() - began
        error = said.removeprefix(ERROR) if said.startswith(ERROR) else ""
        return _Life(code, seconds, error)

    async def _line(self) -> str:
        with suppress(OSError):  # it died, which its exit code tells of
            return (await self._reader.readline()).decode().rstrip("\n")
        return ""


def _settings(config: Config) -> bytes:
    options = asdict(config)
    options |= options.pop("limits")
    return json.dumps(options).encode() + b"\n"
