"""The primary is lost, and its standby is promoted: nothing that was acknowledged is lost with it.

Nodes are given both hosts and find the primary by themselves. The primary confirms a commit once
the standby has it.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import asyncpg
import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from runlane import Client, FinishReason, RunState
from runlane.v1 import run_service_pb2 as pb
from runlane.v1 import run_service_pb2_grpc
from runlane_server.core.errors import StartError, StoreUnavailable
from runlane_server.store.postgres import committer as postgres_committer
from runlane_server.store.postgres import connection as postgres_connection
from runlane_server.store.postgres.connection import Connector
from runlane_server.store.postgres.database import Database
from store.postgres.replicas import HOST, Replicas, replicas
from support.postgres import postgres_store, with_schema
from support.server import ServerProcess, serving
from support.staging import SECONDS
from support.story import Story

SESSIONS = 6
ENOUGH = 15
"""How many runs each node accepts before the primary is lost, and after it."""

LEASE = "2s"


@pytest.fixture(scope="module")
def pair() -> Iterator[Replicas]:
    """A primary and its standby. The last test here is the last one: it ends the primary."""
    with replicas() as made:
        yield made


async def test_database_detects_a_vanished_node(pair: Replicas) -> None:
    """A client that was cut off within a statement may hold locks on rows."""
    connection = await Connector(Database.parse(pair.url)).connect()
    for name, value in {"idle": "10", "interval": "5", "count": "3"}.items():
        assert await connection.fetchval(f"SHOW tcp_keepalives_{name}") == value
    await connection.close()


# --- Finding the primary ------------------------------------------------------------------------


class SilentHost:
    """A place that takes connections and says nothing, as behind a line that was cut."""

    def __init__(self) -> None:
        self._socket = socket.create_server((HOST, 0))
        self._socket.setblocking(False)

    @property
    def place(self) -> str:
        """Where it is."""
        return f"{HOST}:{self._socket.getsockname()[1]}"

    def close(self) -> int:
        """Ends it; returns how many connections were made."""
        count = 0
        with self._socket, suppress(BlockingIOError):
            while True:
                connection, _ = self._socket.accept()
                connection.close()
                count += 1
        return count


async def test_host_that_says_nothing_is_asked_once_and_does_not_hide_the_primary(
    pair: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_connection, "CONNECT_TIMEOUT", 2.0)
    silent = SilentHost()
    url = f"postgresql://postgres@{silent.place},{pair.primary.place}/postgres"
    async with postgres_store(with_schema(url, "silent")) as store:
        await Story(store).play("a")
    assert silent.close() == 1


async def test_standby_that_comes_first_is_passed_over(pair: Replicas) -> None:
    url = f"postgresql://postgres@{pair.standby.place},{pair.primary.place}/postgres"
    async with postgres_store(with_schema(url, "found")) as store:
        await Story(store).play("a")
    with pytest.raises(StartError, match="None of the hosts match"):
        async with postgres_store(pair.standby.url):
            pass


async def test_write_that_the_standby_never_got_is_not_seen_by_anybody(
    pair: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To cancel the wait for the standby would make it a commit of the primary alone."""
    monkeypatch.setattr(postgres_committer, "WRITE_TIMEOUT", 0.5)
    async with postgres_store(with_schema(pair.url, "waits")) as store:
        await Story(store, "before").play("a")
        await asyncio.to_thread(pair.standby.stop)
        with pytest.raises(StoreUnavailable, match="outcome unknown"):
            await Story(store, "after").accept("b")
        # A cancel would have done its work long before so many connections were made.
        for _ in range(50):
            beside = await asyncpg.connect(pair.primary.url)
            assert not await beside.fetchval("SELECT count(*) FROM waits.runs WHERE run_id = 'b'")
            await beside.close()
        await asyncio.to_thread(pair.standby.start)
        async with asyncio.timeout(SECONDS):
            await Story(store, "later").play("c")


# --- Failover under load -------------------------------------------------------------------------


class Load:
    """Sessions that each have a run at a time at one of the nodes, and give up none of them."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.acknowledged: list[str] = []
        self.refusals: list[grpc.aio.AioRpcError] = []
        self._addresses = addresses
        self._counts = Counter[str]()
        self._more = asyncio.Event()
        self._stop = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Goes on until the block is left; what was begun is finished."""
        async with AsyncExitStack() as closing:
            sessions = []
            for n in range(SESSIONS):
                address = self._addresses[n % len(self._addresses)]
                channel = await closing.enter_async_context(grpc.aio.insecure_channel(address))
                stub = run_service_pb2_grpc.RunServiceStub(channel)
                sessions.append(asyncio.create_task(self._live(f"s{n}", address, stub)))
            yield
            self._stop.set()
            await asyncio.gather(*sessions)

    async def _live(
        self, session_id: str, address: str, stub: run_service_pb2_grpc.RunServiceAsyncStub
    ) -> None:
        for n in itertools.count():
            if self._stop.is_set():
                return
            run_id = f"{session_id}-{n}"
            wanted = pb.RunAcceptedRequest(
                session_id=session_id, run_id=run_id, prompt="hello", allow_missing=True
            )
            await self._insist(partial(stub.RunAccepted, wanted, timeout=SECONDS))
            self.acknowledged.append(run_id)
            self._counts[address] += 1
            self._more.set()
            end = pb.WaitRunRequest(run_id=run_id)
            await self._insist(partial(stub.WaitRun, end, timeout=SECONDS))

    async def _insist(self, call: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await call()
            except grpc.aio.AioRpcError as error:
                self.refusals.append(error)
                await asyncio.sleep(0.05)  # like a subscriber that was asked to reconnect at once
                continue
            return

    async def grows(self, count: int) -> None:
        """Returns when each node has accepted so many more than it had."""
        wanted = {address: self._counts[address] + count for address in self._addresses}
        async with asyncio.timeout(SECONDS):
            while any(self._counts[address] < least for address, least in wanted.items()):
                self._more.clear()
                await self._more.wait()


async def until(what: Callable[[], object]) -> None:
    """Returns when something is so."""
    async with asyncio.timeout(SECONDS):
        while not what():
            await asyncio.sleep(0.01)


def retry_delay(error: grpc.aio.AioRpcError) -> float:
    """After how many seconds a refused call may be repeated; 0 if that is not said."""
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    for detail in status.details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    return 0.0


class Follower:
    """A subscriber that holds on to its cursor."""

    def __init__(self, address: str) -> None:
        self.seen: list[str] = []
        self.cursor = ""
        self._address = address

    async def follow(self, wanted: Collection[str] | None = None) -> None:
        """Goes on from its cursor until it has seen the ends of those runs, or for ever."""
        if wanted is not None and set(wanted) <= set(self.seen):
            return
        async with Client(self._address) as client:
            ends = client.subscribe_run_complete(
                cursor=self.cursor or None, from_beginning=not self.cursor
            )
            async for complete in ends:
                # What was active when its node was cut off may be lost with it, and says so.
                interrupted = complete.finish_reason is FinishReason.INTERRUPTED
                assert complete.state is RunState.COMPLETED or interrupted
                self.seen.append(complete.run_id)
                self.cursor = ends.cursor or ""
                if wanted is not None and set(wanted) <= set(self.seen):
                    return


async def is_serving(address: str, service: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        found = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=SECONDS)
        return bool(found.status == health_pb2.HealthCheckResponse.SERVING)


async def test_r21_failover_under_load_loses_nothing_that_was_acknowledged(
    pair: Replicas, tmp_path: Path
) -> None:
    async with AsyncExitStack() as closing:
        nodes = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            flags = ("--store", pair.url, "--node-lease", LEASE)
            nodes.append(await closing.enter_async_context(serving(tmp_path / name, *flags)))
        addresses = [node.address for node in nodes]
        followers = [Follower(address) for address in addresses]
        following = [asyncio.create_task(one.follow()) for one in followers]
        load = Load(addresses)
        async with load.running():
            await load.grows(ENOUGH)
            await fail_over(pair, load, nodes)
        await until(lambda: all(set(load.acknowledged) <= set(one.seen) for one in followers))
        for task in following:
            task.cancel()
        await asyncio.wait(following)
        late = Follower(addresses[0])
        async with asyncio.timeout(SECONDS):
            await late.follow(load.acknowledged)
        for one in (late, *followers):
            assert sorted(one.seen) == sorted(load.acknowledged)  # each of them once
            assert one.seen == late.seen
        assert {error.code() for error in load.refusals} == {grpc.StatusCode.UNAVAILABLE}
        assert all(retry_delay(error) > 0 for error in load.refusals)
        for node in nodes:
            assert await node.stop() == 0


async def fail_over(pair: Replicas, load: Load, nodes: Sequence[ServerProcess]) -> None:
    """Returns when both nodes, cut off for longer than their lease, are at work again."""
    pair.primary.kill()
    await until(lambda: load.refusals)
    await until(lambda: all("node cut off from its store" in node.log for node in nodes))
    for node in nodes:
        for service in ("", "runlane.v1.RunService"):
            assert await is_serving(node.address, service)
    began = time.monotonic()
    await pair.standby.promote()
    promoted = time.monotonic()
    await load.grows(1)
    print(
        f"promoted in {promoted - began:.2f} s,"
        f" both nodes accept again after {time.monotonic() - promoted:.2f} s"
    )
    await load.grows(ENOUGH)
