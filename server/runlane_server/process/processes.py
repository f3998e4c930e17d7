"""`--processes N`: a parent and N server processes on one port, each of them a node.

The parent opens no store and serves no calls. It reserves the port, starts the processes, restarts
those that die, and forwards signals. Each process is a new program (`child.py`), because gRPC does
not survive a fork. Each has its own session, so that Ctrl-C at the terminal reaches it only once,
through the parent.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import click
import structlog

from runlane_server.config import Config
from runlane_server.core.errors import SettingsError, StartError
from runlane_server.net.addresses import Address
from runlane_server.process import systemd
from runlane_server.process.app import announce_listening
from runlane_server.process.child import ERROR, SERVING
from runlane_server.process.http_door import check_http
from runlane_server.process.security import check_security
from runlane_server.process.shared_port import reserved_port
from runlane_server.process.terminal import ControllingTerminal
from runlane_server.telemetry import logs

log = structlog.get_logger()

BACKOFF = (1.0, 2.0, 5.0, 10.0)
"""Seconds before the first restart of a process, the second, and so on."""

STABLE_SECONDS = 60.0
"""A process that dies after serving for so long is restarted with the first backoff again."""


def run(config: Config) -> int:
    """Serves with several processes until a signal arrives; returns the exit code.

    Raises StartError, and UsageError if the settings contradict each other.
    """
    check(config)
    check_security(config)
    logs.configure(config.log_format, config.log_level, content=config.log_content)
    with reserved_port(config.listen) as address:
        return asyncio.run(ProcessSupervisor(replace(config, listen=address)).serve())


def check(config: Config) -> None:
    """Raises UsageError or StartError if several processes cannot serve with these settings."""
    if config.listen.is_unix:
        raise click.UsageError(
            f"--processes: {config.listen} cannot be shared; listen on HOST:PORT"
        )
    if not config.store_url.is_shareable:
        raise SettingsError("--processes needs a store that nodes can share: postgresql://")
    check_http(config)
    config_of_process(config, config.processes)


def config_of_process(config: Config, number: int) -> Config:
    """The configuration of one of several processes. `number` counts from 1.

    Each process has addresses of its own: the first has the configured ports, each further one the
    next port. Port 0 remains any free port. Raises StartError if there is no such port.
    """
    return replace(
        config,
        node_address=_own_address("--node-address", config.node_address, number),
        metrics_listen=_own_address("--metrics-listen", config.metrics_listen, number),
    )


def _own_address(flag: str, first: Address | None, number: int) -> Address | None:
    if first is None or not first.port:
        return first
    try:
        return first.with_port(first.port + number - 1)
    except ValueError:
        raise SettingsError(f"{flag} {first}: has no port for process {number}") from None


class ProcessSupervisor:
    """Keeps `config.processes` server processes running until a shutdown is requested."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stop = asyncio.Event()
        self._all_served = asyncio.Event()
        self._served: set[int] = set()
        self._processes: set[_ServerProcess] = set()
        self._start_error: StartError | None = None
        self._exit_code = 0
        self._terminal = ControllingTerminal()

    async def serve(self) -> int:
        """Serves until a signal arrives; returns the exit code. Raises StartError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as with nohup
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        supervising = [
            asyncio.create_task(self._supervise(number))
            for number in range(1, self._config.processes + 1)
        ]
        announcing = asyncio.create_task(self._announce())
        # These tasks return after a shutdown request. Before one, only a defect of ours ends them.
        await asyncio.wait(supervising, return_when=asyncio.FIRST_COMPLETED)
        announcing.cancel()
        if not self._stop.is_set():
            self._request_stop()
        await asyncio.wait(supervising)
        for task in supervising:
            task.result()
        if self._start_error is not None:
            raise self._start_error
        log.info("stopped", exit_code=self._exit_code)
        return self._exit_code

    async def _announce(self) -> None:
        await self._all_served.wait()
        log.info("serving", address=str(self._config.listen), processes=self._config.processes)
        announce_listening(self._config.listen)

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("signal", name=number.name, again=self._stop.is_set())
        self._request_stop()

    def _on_hangup(self) -> None:
        """Stops if the terminal is lost; else the processes reload their files."""
        if self._terminal.is_lost:
            self._on_signal(signal.SIGHUP)
            return
        for process in self._processes:
            process.reload()

    def _request_stop(self) -> None:
        systemd.notify(systemd.STOPPING)
        self._stop.set()
        for process in self._processes:
            process.terminate()

    async def _supervise(self, number: int) -> None:
        """Keeps the process of that number running until a shutdown is requested."""
        deaths = 0
        while not self._stop.is_set():
            ended = await self._run_once(number)
            if self._stop.is_set():
                self._exit_code |= not ended.is_graceful
                return
            if not self._all_served.is_set():
                self._start_error = ended.start_error or StartError(
                    f"process {number} {ended.description} before all processes served"
                )
                self._request_stop()
                return
            deaths = 0 if ended.seconds >= STABLE_SECONDS else deaths
            backoff = BACKOFF[min(deaths, len(BACKOFF) - 1)]
            deaths += 1
            reason = {"error": ended.error} if ended.error else {}
            log.warning(
                "process exited",
                process=number,
                end=ended.description,
                restart_in_s=backoff,
                **reason,
            )
            await self._wait_for_stop(backoff)

    async def _run_once(self, number: int) -> _ProcessExit:
        """Starts a process, and waits until it exits."""
        try:
            process = await _ServerProcess.start(number, config_of_process(self._config, number))
        except OSError as error:
            return _ProcessExit(error=f"process {number} could not be started: {error.strerror}")
        self._processes.add(process)
        log.info("process started", process=number, pid=process.pid)
        try:
            if self._stop.is_set():
                process.terminate()  # the request came during the start
            return await process.wait(on_serving=lambda: self._note_serving(number))
        finally:
            self._processes.discard(process)

    def _note_serving(self, number: int) -> None:
        if self._all_served.is_set():
            log.info("process serving again", process=number)
        self._served.add(number)
        if len(self._served) == self._config.processes:
            self._all_served.set()

    async def _wait_for_stop(self, timeout: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._stop.wait()


@dataclass(frozen=True, slots=True)
class _ProcessExit:
    """How a process ended: its exit code, the error it reported, and how long it served."""

    code: int = 1
    seconds: float = 0.0
    error: str = ""

    @property
    def is_graceful(self) -> bool:
        """Whether it ended as requested.

        It handles SIGTERM while it has anything to lose: not before it takes up work, and no longer
        once everything is written. Then the signal ends it, which loses nothing either.
        """
        return self.code in {0, -signal.SIGTERM}

    @property
    def start_error(self) -> StartError | None:
        """Why it did not start, if it reported a reason."""
        if not self.error:
            return None
        kind = SettingsError if self.code == SettingsError.exit_code else StartError
        return kind(self.error)

    @property
    def description(self) -> str:
        """`exited with code 1`, `was killed by SIGKILL`."""
        if self.code >= 0:
            return f"exited with code {self.code}"
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"was killed by signal {-self.code}"


class _ServerProcess:
    """One server process, seen from its parent."""

    def __init__(self, process: Process, reader: StreamReader, writer: StreamWriter) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._serves = False

    @classmethod
    async def start(cls, number: int, config: Config) -> _ServerProcess:
        """Starts a process with these settings. Raises OSError."""
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
        # Not as arguments, which every user can read: the URL of a store may contain a password.
        writer.write(config.to_json().encode() + b"\n")
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def terminate(self) -> None:
        """Requests a graceful shutdown; the second time, an immediate one."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def reload(self) -> None:
        """Requests to reload its files, once it serves: before, the signal would end it."""
        if self._serves:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGHUP)

    async def wait(self, on_serving: Callable[[], None]) -> _ProcessExit:
        """Waits until it exits. Calls `on_serving` once it serves."""
        serving_since = None
        try:
            report = await self._read_report()
            if report == SERVING:
                serving_since = time.monotonic()
                self._serves = True
                on_serving()
            code = await self._process.wait()
        finally:
            self._writer.close()
        seconds = 0.0 if serving_since is None else time.monotonic() - serving_since
        error = report.removeprefix(ERROR) if report.startswith(ERROR) else ""
        return _ProcessExit(code, seconds, error)

    async def _read_report(self) -> str:
        with suppress(OSError):  # it died: its exit code is the report
            return (await self._reader.readline()).decode().rstrip("\n")
        return ""
