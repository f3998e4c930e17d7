"""`--processes`: several processes on one port, over one PostgreSQL, with one parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

import grpc
import pytest
from grpc_health.v1 import (  # type: ignore[import-untyped]
    health_pb2,
    health_pb2_grpc,
)

from runlane import Client, RunState
from support.processes import is_running, wait_for_exit
from support.server import ServerProcess, clean_environment, start_fails
from support.staging import SECONDS
from support.wire import Wire

CHANNELS = 24
"""Enough connections that both processes get some."""

NOWHERE = "postgresql://127.0.0.1:1/none"


class Parent(ServerProcess):
    """`runlane-server --processes 2`, and its log lines as they arrive."""

    def __init__(self, folder: Path, *flags: str) -> None:
        super().__init__(folder, "--processes", "2", *flags, base=clean_environment())
        self.lines: list[dict[str, Any]] = []
        self._more = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    async def start(self, *more_flags: str) -> None:
        """Starts the server with its log in a pipe, and returns once it listens."""
        self.launch(*more_flags, stderr=PIPE)
        self._reading = asyncio.create_task(self._read())
        await asyncio.to_thread(self.wait_until_listening)

    async def _read(self) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: protocol, self.process.stderr
        )
        with closing(transport):
            async for line in reader:
                self.lines.append(json.loads(line))
                self._more.set()

    async def wait_for_event(
        self, event: str, times: int = 1, **fields: Any
    ) -> list[dict[str, Any]]:
        """Waits until the log has `times` lines of that event; returns them."""
        async with asyncio.timeout(SECONDS):
            while len(found := self.find(event, **fields)) < times:
                self._more.clear()
                await self._more.wait()
        return found

    def find(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines of that event in the log so far."""
        wanted = {"event": event, **fields}
        return [line for line in self.lines if wanted.items() <= line.items()]

    def pids(self) -> list[int]:
        """The process ids of all processes so far."""
        return [line["pid"] for line in self.find("process started")]

    async def wait(self) -> int:
        """Waits for the end of the server and of all that share its stderr; its exit code."""
        if self._reading is not None:
            async with asyncio.timeout(SECONDS):
                await self._reading
        return await super().wait()


@asynccontextmanager
async def parent(folder: Path, *flags: str) -> AsyncIterator[Parent]:
    """A parent of two processes; it and they are killed at the end."""
    server = Parent(folder, *flags)
    try:
        await server.start()
        yield server
    finally:
        for pid in server.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await server.kill()


@asynccontextmanager
async def watches(address: str) -> AsyncIterator[list[asyncio.Task[object]]]:
    """Health watches, each over its own connection; a watch fails when its process ends."""
    own_connection = (("grpc.use_local_subchannel_pool", 1),)
    async with AsyncExitStack() as stack:
        reads = []
        for _ in range(CHANNELS):
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(address, options=own_connection)
            )
            call = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="runlane.v1.RunService"),
                wait_for_ready=True,
            )
            first = await call.read()
            assert first.status == health_pb2.HealthCheckResponse.SERVING
            reads.append(asyncio.ensure_future(call.read()))
        yield reads
        for read in reads:
            read.cancel()
        await asyncio.wait(reads)


async def complete(address: str, session_id: str) -> None:
    async with Client(address) as client:
        handle = await client.run_accepted(session_id, "hello", allow_missing=True)
        assert (await handle.completed(SECONDS)).state is RunState.COMPLETED


# --- Serving ------------------------------------------------------------------------------------


async def test_a_killed_process_is_restarted_while_the_other_serves(
    tmp_path: Path, postgres_url: str
) -> None:
    async with parent(tmp_path, "--store", postgres_url) as server:
        await complete(server.address, "s")
        async with watches(server.address) as reads:
            (started,) = server.find("process started", process=1)
            os.kill(started["pid"], signal.SIGKILL)
            (died,) = await server.wait_for_event("process exited", process=1)
            assert (died["end"], died["restart_in_s"]) == ("was killed by SIGKILL", 1.0)
            await complete(server.address, "s")
            await server.wait_for_event("process serving again", process=1)
            await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
            lost = [read for read in reads if read.done()]
            assert 0 < len(lost) < CHANNELS
            for read in lost:
                assert isinstance(read.exception(), grpc.aio.AioRpcError)
        # The second backoff of the process is longer, and a signal ends it.
        os.kill(server.pids()[-1], signal.SIGKILL)
        died = (await server.wait_for_event("process exited", times=2, process=1))[1]
        assert died["restart_in_s"] == 2.0
        server.send(signal.SIGTERM)
        assert await server.wait() == 0
        assert len(server.pids()) == 3


async def test_each_process_has_its_own_address_and_no_other_server_gets_the_port(
    tmp_path: Path, postgres_url: str
) -> None:
    async with parent(tmp_path, "--store", postgres_url) as server:
        lines = [line for line in server.find("serving") if "process" in line]
        assert sorted(line["process"] for line in lines) == [1, 2]
        assert {line["address"] for line in lines} == {server.address}
        addresses = {line["node_address"] for line in lines}
        assert len(addresses | {server.address}) == 3
        for address in addresses:
            await complete(address, "s")
        for flags in (["--store", "memory:"], ["--store", NOWHERE, "--processes", "2"]):
            code, said = await asyncio.to_thread(
                start_fails, tmp_path, "--listen", server.address, *flags
            )
            assert code == 1
            assert f"cannot listen on {server.address}: address already in use" in said
        await complete(server.address, "s")


# --- Shutdown -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_parent_and_all_processes(
    tmp_path: Path, postgres_url: str, number: signal.Signals
) -> None:
    async with parent(tmp_path, "--store", postgres_url) as server:
        server.send(number)
        assert server.process.stdout is not None
        assert await asyncio.to_thread(server.process.stdout.read) == b""
        assert await server.wait() == 0
        assert not [pid for pid in server.pids() if is_running(pid)]
        assert {line.get("process") for line in server.find("stopped")} == {None, 1, 2}


async def test_a_second_signal_reaches_the_processes(tmp_path: Path, postgres_url: str) -> None:
    flags = ("--store", postgres_url, "--agent", "scripted", "--drain-timeout", "1h")
    async with parent(tmp_path, *flags) as server:
        async with Client(server.address) as client:
            await Wire(client).start_blocked("s", "g")
        server.send(signal.SIGTERM)
        await server.wait_for_event("draining", times=2)
        # The idle process ends at once.
        await server.wait_for_event("stopped", idle=True)
        server.send(signal.SIGTERM)
        await server.wait_for_event("stopped", idle=False)
        assert await server.wait() == 0


async def test_the_exit_code_is_1_when_a_process_is_killed_in_the_shutdown(
    tmp_path: Path, postgres_url: str
) -> None:
    flags = ("--store", postgres_url, "--agent", "scripted", "--drain-timeout", "1h")
    async with parent(tmp_path, *flags) as server:
        async with Client(server.address) as client:
            await Wire(client).start_blocked("s", "g")
        server.send(signal.SIGTERM)
        (idle,) = await server.wait_for_event("stopped", idle=True)
        (busy,) = server.find("process started", process=3 - idle["process"])
        os.kill(busy["pid"], signal.SIGKILL)
        assert await server.wait() == 1


async def test_processes_shut_down_gracefully_when_their_parent_is_killed(
    tmp_path: Path, postgres_url: str
) -> None:
    async with parent(tmp_path, "--store", postgres_url) as server:
        server.send(signal.SIGKILL)
        for pid in server.pids():
            await wait_for_exit(pid)
        assert await server.wait() == -signal.SIGKILL
        assert sorted(line["process"] for line in server.find("stopped")) == [1, 2]


# --- Invalid starts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "why"),
    [
        (["--store", "sqlite:///x.db"], 2, "needs a store that nodes can share: postgresql://"),
        (["--store", "memory:"], 2, "needs a store that nodes can share: postgresql://"),
        (["--store", NOWHERE, "--listen", "unix:x"], 2, "--processes: unix:x cannot be shared"),
        (["--store", NOWHERE, "--node-address", "h:65535"], 2, "has no port for process 2"),
        (["--store", NOWHERE], 1, "ConnectionRefusedError"),
        (["--store", NOWHERE, "--agent", "nobody"], 2, "there is no agent 'nobody'"),
    ],
)
def test_invalid_settings_fail_with_one_line(
    tmp_path: Path, flags: list[str], code: int, why: str
) -> None:
    returned, said = start_fails(tmp_path, "--processes", "2", "--listen", "127.0.0.1:0", *flags)
    assert returned == code
    lines = [line for line in said.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, said
    assert lines[0].startswith("runlane-server: error: ")
    assert why in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_fails_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = ("--processes", "2", "--store", NOWHERE, "--listen", address)
        code, said = start_fails(tmp_path, *flags)
    assert code == 1
    assert said == (f"runlane-server: error: cannot listen on {address}: address already in use\n")


async def test_a_port_in_use_for_a_process_fails_the_start(
    tmp_path: Path, postgres_url: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = ("--processes", "2", "--listen", "127.0.0.1:0", "--node-address", address)
        code, said = await asyncio.to_thread(start_fails, tmp_path, "--store", postgres_url, *flags)
    assert code == 1
    assert f"cannot listen on {address}: address already in use" in said


def test_the_module_of_a_process_cannot_be_started_directly(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "runlane_server.process.child", "1"],
        stdin=subprocess.DEVNULL,
        stderr=PIPE,
        cwd=tmp_path,
        env=clean_environment(),
        timeout=SECONDS,
        check=False,
    )
    assert ended.returncode == 2
    assert (
        ended.stderr
        == b"runlane-server: error: only runlane-server --processes starts this program\n"
    )
