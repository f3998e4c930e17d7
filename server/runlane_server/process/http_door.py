"""The HTTP door: the process `runlane-web` beside the server, kept running as long as it serves.

The server holds the listening sockets, so that between two of these processes nobody else can
listen there and read tokens. Connections that come meanwhile wait for the next process.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from runlane.targets import is_local
from runlane_server.config import Config
from runlane_server.core.errors import SettingsError, StartError, start_error
from runlane_server.extras import require
from runlane_server.net.addresses import Address

log = structlog.get_logger()

START_TIMEOUT = 30.0
"""Seconds that the process has to say that it serves; then it is killed."""

BACKLOG = 1024
"""Maximum number of connections that wait to be accepted."""

STOP_TIMEOUT = 8.0
"""Seconds that the process has to end; open requests get a part of it."""

BACKOFF = (0.5, 1.0, 2.0, 5.0)
"""Seconds before the first restart, the second, and so on."""

STABLE_SECONDS = 60.0
"""A process that ends after serving for so long is restarted with the first backoff again."""


_KEPT = frozenset({"PATH", "HOME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV"})
_KEPT_PREFIXES = ("LC_", "PYTHON", "GRPC_", "SSL_CERT_")


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that the process needs; the rest has passwords and keys."""
    return {
        name: value
        for name, value in environment.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }


def check_http(config: Config) -> None:
    """Raises SettingsError if HTTP cannot be served with these settings."""
    if config.a2a:
        _check_a2a(config)
    if config.http is None:
        return
    require("uvicorn", "--http")
    require("sse_starlette", "--http")
    if not is_local(str(config.http)):
        raise SettingsError(
            f"--http {config.http}: is not on this machine; for other machines run runlane-web, "
            "with TLS"
        )
    if config.processes > 1:
        raise SettingsError(
            "--http: serves one process only; with --processes run runlane-web beside them"
        )


def _check_a2a(config: Config) -> None:
    if config.http is None:
        raise SettingsError("--a2a: needs --http")
    parts = urlsplit(config.a2a)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise SettingsError(
            f"--a2a: {config.a2a!r} must be an address such as http://127.0.0.1:8080"
        )
    require("a2a", "--a2a")


@dataclass(frozen=True, slots=True)
class DoorSockets:
    """The addresses of the door: its own, and that of the server.

    Attributes:
        listen: The address that `sockets` listen on.
        sockets: Listening sockets, one for each IP address of the host.
        server: The socket of the server, which only this user reaches.
    """

    listen: Address
    sockets: tuple[socket.socket, ...]
    server: Address


async def _ignore(is_serving: bool) -> None:
    pass


class HttpDoor:
    """Runs `runlane-web` for the server behind a private socket.

    Args:
        sockets: The sockets of the door.
        own_token: True if callers need a token of the door's own, because the server checks none.
        on_health: Called with whether a process serves, whenever that changes.
        start_timeout: Seconds that a process has to say that it serves.
        a2a: The address of the door as callers of A2A see it; empty: A2A is not served.
    """

    def __init__(
        self,
        sockets: DoorSockets,
        *,
        own_token: bool,
        on_health: Callable[[bool], Awaitable[None]] = _ignore,
        start_timeout: float = START_TIMEOUT,
        a2a: str = "",
    ) -> None:
        self._sockets = sockets
        self._a2a = a2a
        self._on_health = on_health
        self._start_timeout = start_timeout
        given = os.environ.get("RUNLANE_WEB_TOKEN", "").strip()
        self._token = (given or secrets.token_urlsafe(32)) if own_token else ""
        self._lines = 2 if own_token and not given else 1
        self._process: Process | None = None
        self._supervising: asyncio.Task[None] | None = None

    async def start(self) -> list[str]:
        """Starts the process; returns the lines that it says about itself. Raises StartError."""
        try:
            process, lines = await self._launch()
        except OSError as error:
            raise start_error(f"--http {self._sockets.listen}: {error}", error) from error
        await self._on_health(True)
        self._supervising = asyncio.create_task(self._keep_running(process))
        return lines

    async def stop(self) -> None:
        """Ends the process."""
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.wait({self._supervising})
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await process.wait()
        except TimeoutError:
            await _kill(process)

    async def _launch(self) -> tuple[Process, list[str]]:
        """Starts a process; returns it with what it says once it serves. Raises StartError."""
        process = await self._spawn()
        self._process = process
        if self._token:
            # Arguments and environment of a process can be read by others.
            assert process.stdin is not None  # noqa: S101 - it was asked for
            process.stdin.write(f"{self._token}\n".encode())
        lines: list[str] = []
        try:
            async with asyncio.timeout(self._start_timeout):
                while len(lines) < self._lines and (line := await _line(process)):
                    lines.append(line)
        except TimeoutError:
            await _kill(process)
            raise self._not_started(
                f"the process did not serve within {self._start_timeout:g} s and was killed"
            ) from None
        if len(lines) < self._lines:
            code = await process.wait()
            raise self._not_started(f"the process ended with exit code {code}")
        return process, lines

    async def _spawn(self) -> Process:
        descriptors = [each.fileno() for each in self._sockets.sockets]
        arguments = ["-S", str(self._sockets.server), "--listen", str(self._sockets.listen)]
        for descriptor in descriptors:
            arguments += ["--listen-fd", str(descriptor)]
        if self._a2a:
            arguments += ["--a2a", self._a2a]
        if self._token:
            arguments += ["--own-token", "--token-on-stdin"]
            if self._lines > 1:
                arguments.append("--show-token")
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "runlane_web", *arguments, "--until-eof"),
            stdin=PIPE,  # it ends when this process is gone
            stdout=PIPE,
            env=child_environment(os.environ),
            start_new_session=True,
            pass_fds=descriptors,
        )

    def _not_started(self, problem: str) -> StartError:
        return StartError(f"--http {self._sockets.listen}: {problem}")

    async def _keep_running(self, process: Process) -> None:
        ends = 0
        while True:
            since = time.monotonic()
            code = await process.wait()
            await self._on_health(False)
            ends = 0 if time.monotonic() - since >= STABLE_SECONDS else ends
            backoff = _backoff(ends)
            ends += 1
            log.warning("http process ended", exit_code=code, restart_in_s=backoff)
            await asyncio.sleep(backoff)
            process = await self._launch_again()
            await self._on_health(True)
            log.info("http process serves again")

    async def _launch_again(self) -> Process:
        """Starts a process; tries it again until one serves."""
        attempts = 0
        while True:
            try:
                return (await self._launch())[0]
            except (OSError, StartError) as error:
                backoff = _backoff(attempts)
                attempts += 1
                log.warning("http process not started", error=str(error), retry_in_s=backoff)
                await asyncio.sleep(backoff)


def _backoff(failures: int) -> float:
    return BACKOFF[min(failures, len(BACKOFF) - 1)]


async def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _line(process: Process) -> str:
    assert process.stdout is not None  # noqa: S101 - it was asked for
    return (await process.stdout.readline()).decode(errors="replace").rstrip("\n")


@contextmanager
def door_sockets(config: Config) -> Iterator[DoorSockets | None]:
    """The sockets of the door while the context is open; None if HTTP is not served.

    Raises StartError if the address cannot be bound.
    """
    if config.http is None:
        yield None
        return
    with ExitStack() as closing:
        try:
            listen, sockets = _listening(closing, config.http)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise start_error(f"--http {config.http}: cannot listen: {why}", error) from error
        folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="runlane-"))
        yield DoorSockets(listen, sockets, Address(path=str(Path(folder) / "server.sock")))


_NO_SUCH_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def _listening(closing: ExitStack, address: Address) -> tuple[Address, tuple[socket.socket, ...]]:
    """Sockets at all IP addresses of a host: a client of `localhost` may try any of them."""
    sockets: list[socket.socket] = []
    port, missing = address.port, OSError("no IP address")
    for family, (host, *_) in address.resolve():
        try:
            listening = closing.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind((host, port))
        except OSError as error:
            if error.errno not in _NO_SUCH_FAMILY:
                raise
            missing = error
            continue
        # A bound socket keeps others away only once it listens.
        listening.listen(BACKLOG)
        port = listening.getsockname()[1]
        sockets.append(listening)
    if not sockets:
        raise missing
    return address.with_port(port), tuple(sockets)


@asynccontextmanager
async def http_door(
    config: Config,
    sockets: DoorSockets | None,
    on_health: Callable[[bool], Awaitable[None]] = _ignore,
) -> AsyncIterator[list[str]]:
    """Serves HTTP while the context is open, if the settings say so.

    Yields what there is to say about it. Raises StartError.
    """
    if sockets is None:
        yield []
        return
    door = HttpDoor(sockets, own_token=config.access is None, on_health=on_health, a2a=config.a2a)
    try:
        yield await door.start()
    finally:
        await door.stop()
