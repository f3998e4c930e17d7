"""How a node tells of runs that another one executes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from runlane.v1 import run_pb2
from runlane.v1 import run_service_pb2 as pb
from runlane_server.access.door import PEER_KEY, PEER_TENANT
from runlane_server.cluster import relay as relay_module
from runlane_server.cluster.peers import Peers
from runlane_server.core.limits import Limits
from runlane_server.store.open import StoreUrl, open_store
from support.rpc_wire import Wire, serving

SECONDS = 20.0
NEVER = 3_600.0


@pytest.fixture(autouse=True)
def _nothing_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it has been read, the store is not read again for those who follow."""
    monkeypatch.setattr(relay_module, "STORE_SECONDS", NEVER)


@asynccontextmanager
async def two(url: str) -> AsyncIterator[tuple[Wire, Wire]]:
    """A node that executes runs, and one that does not."""
    async with (
        serving(store=open_store(StoreUrl.parse(url))) as worker,
        serving(Limits(max_active_runs=0), store=open_store(StoreUrl.parse(url))) as front,
    ):
        yield worker, front


async def accept(wire: Wire, *steps: dict[str, Any]) -> str:
    wanted = pb.RunAcceptedRequest(session_id="s", prompt=json.dumps(steps), allow_missing=True)
    return (await wire.runs.RunAccepted(wanted)).run.run_id


class Follower:
    """What a call of SubscribeRun was told."""

    def __init__(self, wire: Wire, run_id: str, **metadata: str) -> None:
        request = pb.SubscribeRunRequest(run_id=run_id)
        call = wire.runs.SubscribeRun(request, metadata=tuple(metadata.items()))
        self._answers = aiter(call)
        self.events: list[run_pb2.RunEvent] = []

    async def hears(self, text: str) -> None:
        """Waits until that is said."""
        async with asyncio.timeout(SECONDS):
            while text not in self._said():
                self.events.append((await anext(self._answers)).event)

    async def rest(self) -> None:
        """Waits for the end."""
        async with asyncio.timeout(SECONDS):
            async for answer in self._answers:
                self.events.append(answer.event)

    def _said(self) -> str:
        return "".join(event.text_delta.text for event in self.events)


async def test_a_node_tells_what_another_one_executes(postgres_url: str) -> None:
    async with two(postgres_url) as (worker, front):
        call = {"tool_call": {"id": "1", "name": "look", "arguments": {"at": "it"}}}
        result = {"tool_result": {"id": "1", "name": "look", "content": "it", "is_error": True}}
        said = {"text": "one"}, {"wait": "g"}, {"reasoning": "hm"}, call, result, {"text": "two"}
        run_id = await accept(front, *said, {"wait": "h"})
        follower, direct = Follower(front, run_id), Follower(worker, run_id)
        await follower.hears("one")
        worker.gates.open("g")
        await follower.hears("two")
        worker.gates.open("h")
        await follower.rest()
        await direct.rest()
        assert follower.events == direct.events
        kinds = [event.WhichOneof("event") for event in follower.events]
        assert {"accepted", "started", "reasoning_delta", "run_complete"} <= set(kinds)
        assert kinds[-1] == "run_complete"


async def test_all_who_follow_a_run_share_one_call_to_its_node(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    follow = Peers.follow

    def counted(self: Peers, address: str, *args: Any) -> Any:
        asked.append(address)
        return follow(self, address, *args)

    monkeypatch.setattr(Peers, "follow", counted)
    async with two(postgres_url) as (worker, front):
        run_id = await accept(front, {"text": "one"}, {"wait": "g"}, {"text": "two"})
        followers = [Follower(front, run_id) for _ in range(4)]
        await asyncio.gather(*(follower.hears("one") for follower in followers))
        # Heard from the store, perhaps; what comes now is not.
        async with asyncio.timeout(SECONDS):
            while not asked:
                await asyncio.sleep(0.01)
        worker.gates.open("g")
        await asyncio.gather(*(follower.rest() for follower in followers))
        assert asked == [worker.address]
        assert front.relay is not None
        assert front.relay.runs == 0


async def test_a_node_that_asks_is_told_what_happens_there_and_nowhere_else(
    postgres_url: str,
) -> None:
    """Else two nodes could ask each other, round and round."""
    async with two(postgres_url) as (worker, front):
        assert front.relay is not None
        run_id = await accept(front, {"text": "one"}, {"wait": "g"})
        # It is stored then.
        await Follower(worker, run_id).hears("one")
        assert front.store.cluster is not None
        peer = {PEER_KEY: front.store.cluster.peer_key, PEER_TENANT: b"default".hex()}
        await Follower(front, run_id, **peer).hears("one")
        assert front.relay.runs == 0
        await Follower(front, run_id).hears("one")
        assert front.relay.runs == 1
        worker.gates.open("g")


async def test_a_run_that_is_executed_here_is_asked_for_nowhere(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("it is executed here")

    monkeypatch.setattr(Peers, "follow", never)
    monkeypatch.setattr(relay_module, "CHECK_SECONDS", 0.01)
    async with serving(store=open_store(StoreUrl.parse(postgres_url))) as node:
        run_id = await accept(node, {"text": "one"}, {"wait": "g"}, {"text": "two"})
        follower = Follower(node, run_id)
        await follower.hears("one")
        node.gates.open("g")
        await follower.hears("two")
        await follower.rest()
