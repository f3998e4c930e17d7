"""Load generators: one in Go, the cheaper one, and one in Python for machines without Go.

A generator is a process that reads a job in JSON from stdin and writes lines of JSON to stdout.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from asyncio.subprocess import Process
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from google.protobuf.message import Message

from bench import wire
from bench.process import Server, end, start
from support.processes import cpu_seconds

SOURCE = Path(__file__).parent / "load"
BUILD_SECONDS = 900.0
JOB_SECONDS = 600.0
"""Maximum seconds of a job."""

CALL = wire.SERVICE + "RunAccepted"
ECHO = wire.BARE + "Echo"


def call(method: str, request: Message | bytes) -> dict[str, str]:
    """A method and the template of its request."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    return {"method": method, "request": base64.b64encode(data).decode()}


@dataclass(frozen=True, slots=True)
class Measured:
    """The result of a job. CPU shares are fractions of a core; each side has a core of its own.

    `beside_cpu` is the share of a process beside the server, such as a database. `first` has the
    times to the first word of a stream.
    """

    count: int
    seconds: float
    server_cpu: float
    load_cpu: float
    latency: dict[str, float] = field(default_factory=dict)
    beside_cpu: float = 0.0
    first: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.count / self.seconds

    @property
    def cost(self) -> float:
        """CPU seconds of the server per operation."""
        return self.server_cpu * self.seconds / max(self.count, 1)


def generator(cache: Path, kind: str = "") -> tuple[str, list[str]]:
    """The name and the command of the generator of a kind, or of the best available one.

    The generator in Go is built at its first use.
    """
    python = "python", [sys.executable, "-m", "bench.pyload"]
    if kind == "python" or not (kind or shutil.which("go")):
        return python
    digest = hashlib.sha256()
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.read_bytes())
    binary = cache / "bin" / f"load-{digest.hexdigest()[:12]}"
    if not binary.exists():
        _build(binary)
    return ("go", [str(binary)]) if binary.exists() else python


def _build(binary: Path) -> None:
    print("building the load generator ...", file=sys.stderr)
    binary.parent.mkdir(parents=True, exist_ok=True)
    built = subprocess.run(
        ["go", "build", "-o", str(binary), "."],
        cwd=SOURCE,
        env={**os.environ, "GOFLAGS": "-mod=readonly -buildvcs=false"},
        timeout=BUILD_SECONDS,
        check=False,
    )
    if built.returncode:
        print("cannot build the load generator in Go; using the one in Python", file=sys.stderr)


class Load:
    """A running load generator."""

    def __init__(self, command: list[str], core: int, folder: Path) -> None:
        self._command = command
        self._core = core
        self._folder = folder
        self._process: Process | None = None

    async def __aenter__(self) -> Self:
        """Starts the generator."""
        self._process = await start(self._core, self._command, self._folder, "load.log")
        return self

    async def __aexit__(self, *error: object) -> None:
        """Ends the generator."""
        await end(self._started)

    @property
    def _started(self) -> Process:
        assert self._process is not None
        return self._process

    async def send(self, line: dict[str, Any] | None = None) -> None:
        """Sends the generator its job, or with None the signal for its next step."""
        assert self._started.stdin is not None
        self._started.stdin.write(json.dumps(line).encode() + b"\n")
        await self._started.stdin.drain()

    async def read(self) -> dict[str, Any]:
        """Reads the next line of the generator. Raises RuntimeError if it has ended."""
        assert self._started.stdout is not None
        async with asyncio.timeout(JOB_SECONDS):
            line = await self._started.stdout.readline()
        if not line:
            log = (self._folder / "load.log").read_text()
            raise RuntimeError(f"the load generator has ended\n{log[-2000:]}")
        message: dict[str, Any] = json.loads(line)
        return message

    async def run(
        self, server: Server, job: dict[str, Any], *, beside: int | None = None
    ) -> Measured:
        """Runs a job with one measurement window. `beside` is the id of a process that works for
        the server. Raises RuntimeError if calls failed."""
        await self.send({"prefix": wire.PREFIX, "address": server.address, **job})
        pids = (server.pid, self._started.pid, *([beside] if beside else []))
        cpu: dict[str, list[float]] = {}
        while "result" not in (message := await self.read()):
            cpu[message["mark"]] = [cpu_seconds(pid) for pid in pids]
        result = message["result"]
        if result["errors"]:
            raise RuntimeError(f"{result['errors']} calls failed; the first: {result['error']}")
        shares = [
            (to - since) / result["seconds"]
            for since, to in zip(cpu["begin"], cpu["end"], strict=True)
        ]
        ours, load, *others = shares
        latency, first = result.get("latency") or {}, result.get("first") or {}
        return Measured(result["count"], result["seconds"], ours, load, latency, sum(others), first)
