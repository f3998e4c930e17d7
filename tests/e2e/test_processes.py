"""`--processes`: several processes on one port, over one PostgreSQL, under one parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import (  # type: ignore[import-untyped]
    health_pb2,
    health_pb2_grpc,
)

from runlane import Client, RunState
from support.process import SECONDS
from support.rpc_process import PREFIX, PROGRAM, environment, start_fails
from support.wire import Wire

CHANNELS = 24
"""So many connections do not all end up at one of two processes."""

NOWHERE = "postgresql://127.0.0.1:1/none"


class Parent:
    """`runlane-server --processes 2`, and what it and its processes log, as it comes."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.address = ""
        self.lines: list[dict[str, Any]] = []
        self._more = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(json.loads(line))
            self._more.set()

    async def said(self, event: str, times: int = 1, **fields: Any) -> list[dict[str, Any]]:
        """Waits until so many lines of that kind are in the log."""
        async with asyncio.timeout(SECONDS):
            while len(found := self.find(event, **fields)) < times:
                self._more.clear()
                await self._more.wait()
        return found

    def find(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines of that kind in the log."""
        wanted = {"event": event, **fields}
        return [line for line in self.lines if wanted.items() <= line.items()]

    def pids(self) -> list[int]:
        """The process ids of all processes that ever were."""
        return [line["pid"] for line in self.find("process started")]

    async def ended(self) -> int:
        """Waits for its end, and that of all who have its stderr; returns the exit code."""
        async with asyncio.timeout(SECONDS):
            await self._reading
            return await self.process.wait()


@asynccontextmanager
async def parent(folder: Path, *flags: str) -> AsyncIterator[Parent]:
    """A server of two processes; it and they are ended for good whatever happens."""
    process = await asyncio.create_subprocess_exec(
        *(*PROGRAM, "--processes", "2", "--listen", "127.0.0.1:0", *flags),
        stdout=PIPE,
        stderr=PIPE,
        cwd=folder,
        env=environment(),
    )
    made = Parent(process)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(SECONDS):
            line = (await process.stdout.readline()).decode()
        assert line.startswith(PREFIX), made.lines
        made.address = line.removeprefix(PREFIX).strip()
        yield made
    finally:
        for pid in (*made.pids(), process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await made.ended()


@asynccontextmanager
async def watches(address: str) -> AsyncIterator[list[asyncio.Task[object]]]:
    """Connections by which a server is watched; each ends with an error when its process does."""
    own_connection = (("grpc.use_local_subchannel_pool", 1),)
    async with AsyncExitStack() as closing:
        reads = []
        for _ in range(CHANNELS):
            channel = await closing.enter_async_context(
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


async def gone(pid: int) -> None:
    """Waits for the end of a process that is not a child of this one."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(handle, ended.set)
    try:
        async with asyncio.timeout(SECONDS):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(handle)
        os.close(handle)


def is_there(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


# --- Serving ------------------------------------------------------------------------------------


async def test_both_serve_and_who_is_killed_comes_back_while_the_other_serves(
    tmp_path: Path, postgres_url: str
) -> None:
    async with parent(tmp_path, "--store", postgres_url) as server:
        await complete(server.address, "s")
        async with watches(server.address) as reads:
            (started,) = server.find("process started", process=1)
            os.kill(started["pid"], signal.SIGKILL)
            (died,) = await server.said("process exited", process=1)
            assert (died["end"], died["restart_in_s"]) == ("was killed by SIGKILL", 1.0)
            await complete(server.address, "s")
            await server.said("process serving again", process=1)
            await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
            lost = [read for read in reads if read.done()]
            assert 0 < len(lost) < CHANNELS
            for read in lost:
                assert isinstance(read.exception(), grpc.aio.AioRpcError)
        # The same process once more: the pause is longer, and a signal ends it.
        os.kill(server.pids()[-1], signal.SIGKILL)
        died = (await server.said("process exited", times=2, process=1))[1]
        assert died["restart_in_s"] == 2.0
        server.process.terminate()
        assert await server.ended() == 0
        assert len(server.pids()) == 3


async def test_each_process_has_an_address_of_its_own_and_nobody_else_gets_the_port(
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


# --- Going down ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_all(tmp_path: Path, postgres_url: str, number: signal.Signals) -> None:
    async with parent(tmp_path, "--store", postgres_url) as server:
        server.process.send_signal(number)
        assert await server.ended() == 0
        assert not [pid for pid in server.pids() if is_there(pid)]
        assert {line.get("process") for line in server.find("stopped")} == {None, 1, 2}
        assert server.process.stdout is not None
        assert await server.process.stdout.read() == b""


async def test_a_second_signal_is_handed_on_too(tmp_path: Path, postgres_url: str) -> None:
    flags = ("--store", postgres_url, "--agent", "scripted", "--drain-timeout", "1h")
    async with parent(tmp_path, *flags) as server:
        async with Client(server.address) as client:
            await Wire(client).blocked("s", "g")
        server.process.terminate()
        await server.said("draining", times=2)
        # The one that has nothing to wait for does not.
        await server.said("stopped", idle=True)
        server.process.terminate()
        await server.said("stopped", idle=False)
        assert await server.ended() == 0


async def test_a_process_that_does_not_go_well_is_told_of_by_the_exit_code(
    tmp_path: Path, postgres_url: str
) -> None:
    flags = ("--store", postgres_url, "--agent", "scripted", "--drain-timeout", "1h")
    async with parent(tmp_path, *flags) as server:
        async with Client(server.address) as client:
            await Wire(client).blocked("s", "g")
        server.process.terminate()
        (idle,) = await server.said("stopped", idle=True)
        (busy,) = server.find("process started", process=3 - idle["process"])
        os.kill(busy["pid"], signal.SIGKILL)
        assert await server.ended() == 1


async def test_the_processes_go_in_good_order_when_their_parent_is_killed(
    tmp_path: Path, postgres_url: str
) -> None:
    async with parent(tmp_path, "--store", postgres_url) as server:
        server.process.kill()
        for pid in server.pids():
            await gone(pid)
        assert await server.ended() == -signal.SIGKILL
        assert sorted(line["process"] for line in server.find("stopped")) == [1, 2]


# --- It cannot ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "why"),
    [
        (["--store", "sqlite:///x.db"], 2, "needs a store that nodes can share: postgresql://"),
        (["--store", "memory:"], 2, "needs a store that nodes can share: postgresql://"),
        (["--store", NOWHERE, "--listen", "unix:x"], 2, "--processes: unix:x cannot be shared"),
        (["--store", NOWHERE, "--node-address", "h:65535"], 1, "has no port for process 2"),
        (["--store", NOWHERE], 1, "ConnectionRefusedError"),
        (["--store", NOWHERE, "--agent", "nobody"], 2, "there is no agent 'nobody'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path, flags: list[str], code: int, why: str
) -> None:
    returned, said = start_fails(tmp_path, "--processes", "2", "--listen", "127.0.0.1:0", *flags)
    assert returned == code
    lines = [line for line in said.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, said
    assert lines[0].startswith("runlane-server: error: ")
    assert why in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = ("--processes", "2", "--store", NOWHERE, "--listen", address)
        code, said = start_fails(tmp_path, *flags)
    assert code == 1
    assert said == (f"runlane-server: error: cannot listen on {address}: address already in use\n")


async def test_the_own_port_of_a_process_may_be_in_use(tmp_path: Path, postgres_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = ("--processes", "2", "--listen", "127.0.0.1:0", "--node-address", address)
        code, said = await asyncio.to_thread(start_fails, tmp_path, "--store", postgres_url, *flags)
    assert code == 1
    assert f"cannot listen on {address}: address already in use" in said


async def test_a_child_started_by_hand_says_what_starts_it(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runlane_server.process.child", "1"),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=PIPE,
        cwd=tmp_path,
        env=environment(),
    )
    async with asyncio.timeout(SECONDS):
        _, said = await process.communicate()
    assert process.returncode == 2
    assert said == b"runlane-server: error: only runlane-server --processes starts this program\n"
