"""The events of a run: each once and in order up to its end, over as many calls as it takes."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc import StatusCode

import runlane
from runlane import ArtifactKind, Client, RunComplete, RunEvents, TextDelta, convert
from runlane.v1 import run_pb2
from support.peer import HANG, LOST, Peer, Refuse, Script, accepted, complete, event, says

RPC = "SubscribeRun"
BEGIN = (
    event(1, accepted=run_pb2.RunEvent.Accepted(accept_seq=7)),
    event(2, started=run_pb2.RunEvent.Started(attempt=1)),
)


async def read_texts(events: RunEvents) -> list[str]:
    """Returns the text deltas and the final text."""
    return [
        each.body.text async for each in events if isinstance(each.body, TextDelta | RunComplete)
    ]


def requested_indexes(peer: Peer) -> list[int]:
    """Returns the after_index of each call."""
    return [request.after_index for request in peer.requests[RPC]]


async def test_all_kinds_and_the_end(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [
        (
            *BEGIN,
            event(3, reasoning_delta=run_pb2.RunEvent.ReasoningDelta(text="hm")),
            event(4, tool_call=run_pb2.ToolCall(tool_call_id="t", name="n", arguments_json="{}")),
            event(5, tool_result=run_pb2.ToolResult(tool_call_id="t", name="n", is_error=True)),
            event(6, folded=run_pb2.RunEvent.Folded(run_id="q", into_run_id="r")),
            event(7, artifact=run_pb2.Artifact(artifact_id="a", data=b"1", append=True)),
            event(8, custom=run_pb2.RunEvent.Custom(type="t", json="1")),
            event(9, step=run_pb2.RunEvent.Step(key="k", result="1")),
            says(10, "hello"),
            event(11, run_complete=complete("r")),
        )
    ]
    seen = [each async for each in client.subscribe_run("r")]
    assert [each.index for each in seen] == list(range(1, 12))
    assert [each.body for each in seen][:-1] == [
        runlane.Accepted(7),
        runlane.Started(1),
        runlane.ReasoningDelta("hm"),
        runlane.ToolCall("t", "n", "{}"),
        runlane.ToolResult("t", "n", "", is_error=True),
        runlane.Folded("q", "r"),
        runlane.Artifact("a", "", "", ArtifactKind.DATA, b"1", append=True, last=False),
        runlane.Custom("t", "1"),
        runlane.Step("k", "1"),
        TextDelta("hello"),
    ]
    assert isinstance(seen[-1].body, RunComplete)


@pytest.mark.parametrize(
    "break_",
    [pytest.param((LOST,), id="lost"), pytest.param((), id="ended before the run")],
)
async def test_it_goes_on_after_the_last_event(peer: Peer, client: Client, break_: Script) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    peer.scripts[RPC] = [
        (*BEGIN, says(3, "a"), *break_),
        (says(4, "b"), *break_),
        (event(5, run_complete=complete("r")),),
    ]
    handle = await client.run_accepted("s", "p")
    assert await read_texts(handle.events()) == ["a", "b", "done"]
    assert requested_indexes(peer) == [0, 3, 4]


async def test_it_can_begin_later(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(says(5, "e"), event(6, run_complete=complete("r")))]
    assert await read_texts(client.subscribe_run("r", after_index=4)) == ["e", "done"]
    assert requested_indexes(peer) == [4]


async def test_duplicates_are_dropped(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [
        (*BEGIN, says(3, "a"), LOST),
        (says(2, "x"), says(3, "a"), says(4, "b"), event(5, run_complete=complete("r"))),
    ]
    assert await read_texts(client.subscribe_run("r")) == ["a", "b", "done"]


async def test_kinds_of_a_newer_server_are_passed_over(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(*BEGIN, event(3), says(4, "a"), event(5, run_complete=complete("r")))]
    assert await read_texts(client.subscribe_run("r")) == ["a", "done"]


OLDER_KINDS = {"accepted", "started", "text_delta", "run_complete"}


def older(name: str) -> type[Any]:
    """A message as a client knows it that was generated before some kinds of events existed."""
    pool = descriptor_pool.DescriptorPool()
    for dependency in run_pb2.DESCRIPTOR.dependencies:
        pool.AddSerializedFile(dependency.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto.FromString(run_pb2.DESCRIPTOR.serialized_pb)
    run_event = next(each for each in file.message_type if each.name == "RunEvent")
    known = [f for f in run_event.field if not f.HasField("oneof_index") or f.name in OLDER_KINDS]
    del run_event.field[:]
    run_event.field.extend(known)
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"runlane.v1.{name}"))


@pytest.mark.parametrize(
    "body",
    [
        {"artifact": run_pb2.Artifact(artifact_id="a", text="x")},
        {"custom": run_pb2.RunEvent.Custom(type="t", json="1")},
        {"step": run_pb2.RunEvent.Step(key="k", result="1")},
    ],
    ids=["artifact", "custom", "step"],
)
def test_an_older_client_passes_over_what_it_does_not_know(body: dict[str, Any]) -> None:
    sent = event(7, **body).event.SerializeToString()
    received = older("RunEvent").FromString(sent)
    assert (received.index, received.WhichOneof("event")) == (7, None)
    assert convert.run_event(received) is None


async def test_what_is_missing_is_asked_for_again(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [
        (*BEGIN, says(4, "b"), HANG),
        (says(3, "a"), says(4, "b"), event(5, run_complete=complete("r"))),
    ]
    assert await read_texts(client.subscribe_run("r")) == ["a", "b", "done"]
    assert requested_indexes(peer) == [0, 2]


async def test_events_that_stay_missing_raise_event_gap(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(*BEGIN, says(4, "b"), HANG), (says(4, "b"), HANG)]
    with pytest.raises(runlane.EventGap, match="received event 4 after event 2"):
        await read_texts(client.subscribe_run("r"))
    await peer.left.wait()


async def test_an_unknown_run_is_told(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(Refuse(StatusCode.NOT_FOUND, "RUN_NOT_FOUND"),)]
    with pytest.raises(runlane.RunNotFound):
        await read_texts(client.subscribe_run("r"))


async def test_leaving_ends_the_call(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(*BEGIN, HANG)]
    async with client.subscribe_run("r") as events:
        async for _ in events:
            break
        await peer.hanging.wait()
    await peer.left.wait()
    assert await read_texts(events) == []
