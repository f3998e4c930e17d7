"""Relay of live events: a node streams runs that another one executes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, get_args

import pytest

import runlane
from runlane import convert as client_convert
from runlane.v1 import run_pb2
from runlane.v1 import run_service_pb2 as pb
from runlane_server.access.node_keys import NodeKeys
from runlane_server.cluster import peers
from runlane_server.cluster import relay as relay_module
from runlane_server.cluster.peers import Peers
from runlane_server.core import model
from runlane_server.core.artifact import ArtifactKind, ArtifactPiece
from runlane_server.core.limits import Limits
from runlane_server.rpc import convert
from runlane_server.store.open import StoreUrl, open_store
from support.rpc_wire import Wire, serving

SECONDS = 20.0
NEVER = 3_600.0


@pytest.fixture(autouse=True)
def _without_polling_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first read, followers get no events from the store."""
    monkeypatch.setattr(relay_module, "STORE_SECONDS", NEVER)


@asynccontextmanager
async def two_nodes(url: str) -> AsyncIterator[tuple[Wire, Wire]]:
    """A node that executes runs, and a front node that does not."""
    async with (
        serving(store=open_store(StoreUrl.parse(url))) as executor,
        serving(Limits(max_active_runs=0), store=open_store(StoreUrl.parse(url))) as front,
    ):
        yield executor, front


async def accept(wire: Wire, *steps: dict[str, Any]) -> str:
    wanted = pb.RunAcceptedRequest(session_id="s", prompt=json.dumps(steps), allow_missing=True)
    return (await wire.runs.RunAccepted(wanted)).run.run_id


class Follower:
    """A SubscribeRun call and the events it has received."""

    def __init__(self, wire: Wire, run_id: str, **metadata: str) -> None:
        request = pb.SubscribeRunRequest(run_id=run_id)
        call = wire.runs.SubscribeRun(request, metadata=tuple(metadata.items()))
        self._answers = aiter(call)
        self.events: list[run_pb2.RunEvent] = []

    async def read_until(self, text: str) -> None:
        """Waits until the text has been received."""
        async with asyncio.timeout(SECONDS):
            while text not in self._text():
                self.events.append((await anext(self._answers)).event)

    async def rest(self) -> None:
        """Receives all further events."""
        async with asyncio.timeout(SECONDS):
            async for answer in self._answers:
                self.events.append(answer.event)

    def _text(self) -> str:
        return "".join(event.text_delta.text for event in self.events)


async def test_a_node_streams_a_run_that_another_one_executes(postgres_url: str) -> None:
    async with two_nodes(postgres_url) as (executor, front):
        call = {"tool_call": {"id": "1", "name": "look", "arguments": {"at": "it"}}}
        result = {"tool_result": {"id": "1", "name": "look", "content": "it", "is_error": True}}
        steps = {"text": "one"}, {"wait": "g"}, {"reasoning": "hm"}, call, result, {"text": "two"}
        run_id = await accept(front, *steps, {"wait": "h"})
        follower, direct = Follower(front, run_id), Follower(executor, run_id)
        await follower.read_until("one")
        executor.latches.open("g")
        await follower.read_until("two")
        executor.latches.open("h")
        await follower.rest()
        await direct.rest()
        assert follower.events == direct.events
        kinds = [event.WhichOneof("event") for event in follower.events]
        assert {"accepted", "started", "reasoning_delta", "run_complete"} <= set(kinds)
        assert kinds[-1] == "run_complete"


async def test_followers_of_a_run_share_one_call_to_its_node(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[str] = []
    follow = Peers.follow

    def counted(self: Peers, address: str, *args: Any) -> Any:
        addresses.append(address)
        return follow(self, address, *args)

    monkeypatch.setattr(Peers, "follow", counted)
    async with two_nodes(postgres_url) as (executor, front):
        run_id = await accept(front, {"text": "one"}, {"wait": "g"}, {"text": "two"})
        followers = [Follower(front, run_id) for _ in range(4)]
        await asyncio.gather(*(follower.read_until("one") for follower in followers))
        # The first text may have come from the store; later texts do not.
        async with asyncio.timeout(SECONDS):
            while not addresses:
                await asyncio.sleep(0.01)
        executor.latches.open("g")
        await asyncio.gather(*(follower.rest() for follower in followers))
        assert addresses == [executor.address]
        assert front.relay is not None
        assert front.relay.runs == 0


async def test_a_call_of_another_node_is_not_relayed(
    postgres_url: str,
) -> None:
    """Otherwise two nodes could relay to each other in a circle."""
    async with two_nodes(postgres_url) as (executor, front):
        assert front.relay is not None
        run_id = await accept(front, {"text": "one"}, {"wait": "g"})
        # The text is stored once a follower has it.
        await Follower(executor, run_id).read_until("one")
        assert front.store.cluster is not None
        signed = NodeKeys(front.store.cluster.node_keys).sign(front.address, "default", run_id)
        await Follower(front, run_id, authorization=f"Bearer {signed}").read_until("one")
        assert front.relay.runs == 0
        await Follower(front, run_id).read_until("one")
        assert front.relay.runs == 1
        executor.latches.open("g")


async def test_a_run_executed_on_this_node_is_not_relayed(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("the run is executed on this node")

    monkeypatch.setattr(Peers, "follow", never)
    monkeypatch.setattr(relay_module, "CHECK_SECONDS", 0.01)
    async with serving(store=open_store(StoreUrl.parse(postgres_url))) as node:
        run_id = await accept(node, {"text": "one"}, {"wait": "g"}, {"text": "two"})
        follower = Follower(node, run_id)
        await follower.read_until("one")
        node.latches.open("g")
        await follower.read_until("two")
        await follower.rest()


@pytest.mark.parametrize(
    "body",
    [
        model.Accepted(1),
        model.Started(2),
        model.TextDelta("t"),
        model.ReasoningDelta("r"),
        model.ToolCall("1", "look", "{}"),
        model.ToolResult("1", "look", "seen", is_error=True),
        ArtifactPiece("a", "n", "m/t", ArtifactKind.DATA, b"\xff", append=True, last=False),
        ArtifactPiece("a", "n", "", ArtifactKind.URI, "https://example.com"),
        model.CustomEvent("t", "1"),
        model.StepResult("k", "1"),
        model.Folded("a", "b"),
    ],
    ids=lambda body: type(body).__name__,
)
def test_an_event_of_another_node_is_the_same_here(body: model.EventBody) -> None:
    event = model.RunEvent("r", 3, 1_000_001, body)
    received = client_convert.run_event(convert.run_event(event))
    assert received is not None
    assert peers._convert("r", received) == event


def test_every_kind_of_event_but_the_end_is_relayed() -> None:
    kinds = set(get_args(runlane.EventBody)) - {runlane.RunComplete}
    assert set(peers._BODIES) == kinds
