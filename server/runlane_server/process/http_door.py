"""The HTTP door: the process `runlane-web` beside the server, kept running as long as it serves."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog

from runlane.targets import is_local
from runlane_server.config import Config
from runlane_server.core.errors import SettingsError, StartError
from runlane_server.extras import require
from runlane_server.net.addresses import Address

log = structlog.get_logger()

START_TIMEOUT = 30.0
"""Seconds that the process has to bind its address."""

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


class HttpDoor:
    """Runs `runlane-web` for the server behind a private socket.

    Args:
        listen: The address to listen on.
        socket: The socket of the server.
        own_token: True if callers need a token of the door's own, because the server checks none.
    """

    def __init__(self, listen: Address, socket: Address, *, own_token: bool) -> None:
        self._listen = listen
        self._socket = socket
        given = os.environ.get("RUNLANE_WEB_TOKEN", "").strip()
        self._token = (given or secrets.token_urlsafe(32)) if own_token else ""
        self._lines = 2 if own_token and not given else 1
        self._process: Process | None = None
        self._supervising: asyncio.Task[None] | None = None

    async def start(self) -> list[str]:
        """Starts the process; returns the lines that it says about itself. Raises StartError."""
        process, lines = await self._launch()
        if not lines:
            code = await process.wait()
            raise StartError(f"--http {self._listen}: the process ended with exit code {code}")
        # A restart must keep the port that was taken.
        self._listen = self._listen.with_port(_port(lines[0]))
        self._supervising = asyncio.create_task(self._keep_running(process))
        return lines

    async def stop(self) -> None:
        """Ends the process."""
        if self._supervising is not None:
            self._supervising.cancel()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _launch(self) -> tuple[Process, list[str]]:
        arguments = ["-S", str(self._socket), "--listen", str(self._listen), "--until-eof"]
        if self._token:
            arguments += ["--own-token", "--token-on-stdin"]
            if self._lines > 1:
                arguments.append("--show-token")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "runlane_web", *arguments),
            stdin=PIPE,  # it ends when this process is gone
            stdout=PIPE,
            env=child_environment(os.environ),
            start_new_session=True,
        )
        self._process = process
        if self._token:
            # Arguments and environment of a process can be read by others.
            assert process.stdin is not None  # noqa: S101 - it was asked for
            process.stdin.write(f"{self._token}\n".encode())
        lines: list[str] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT):
                while len(lines) < self._lines and (line := await _line(process)):
                    lines.append(line)
        return process, lines

    async def _keep_running(self, process: Process) -> None:
        ends = 0
        while True:
            since = time.monotonic()
            code = await process.wait()
            ends = 0 if time.monotonic() - since >= STABLE_SECONDS else ends
            backoff = BACKOFF[min(ends, len(BACKOFF) - 1)]
            ends += 1
            log.warning("http process ended", exit_code=code, restart_in_s=backoff)
            await asyncio.sleep(backoff)
            process = await self._launch_again()

    async def _launch_again(self) -> Process:
        """Starts the process; tries it again while the machine has no room for it."""
        attempts = 0
        while True:
            try:
                return (await self._launch())[0]
            except OSError as error:
                backoff = BACKOFF[min(attempts, len(BACKOFF) - 1)]
                attempts += 1
                log.warning("http process not started", error=str(error), retry_in_s=backoff)
                await asyncio.sleep(backoff)


async def _line(process: Process) -> str:
    assert process.stdout is not None  # noqa: S101 - it was asked for
    return (await process.stdout.readline()).decode(errors="replace").rstrip("\n")


def _port(line: str) -> int:
    return int(line.rpartition(":")[2])


@asynccontextmanager
async def private_socket(config: Config) -> AsyncIterator[Address | None]:
    """A place for a socket that only this user reaches; None if HTTP is not served."""
    if config.http is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="runlane-") as folder:
        yield Address(path=str(Path(folder) / "server.sock"))


@asynccontextmanager
async def http_door(config: Config, socket: Address | None) -> AsyncIterator[list[str]]:
    """Serves HTTP while the context is open, if the settings say so.

    Yields what there is to say about it. Raises StartError.
    """
    if config.http is None or socket is None:
        yield []
        return
    door = HttpDoor(config.http, socket, own_token=config.access is None)
    try:
        yield await door.start()
    finally:
        await door.stop()
