"""The stream of a session: each thing once and in order, despite faults of peer and network."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

import runlane
from runlane import (
    Client,
    QueueChanged,
    SessionChanged,
    SessionEvent,
    SessionRunEvent,
    SessionSnapshot,
    SessionStream,
    TextDelta,
)
from runlane import sync as blocking
from runlane.v1 import run_pb2, session_pb2
from runlane.v1 import session_service_pb2 as pb
from support.peer import HANG, LOST, Peer, Refuse

RPC = "SubscribeSession"
Answer = pb.SubscribeSessionResponse


def part(session_id: str = "s", cursor: str = "", **fields: object) -> Answer:
    """A part of a snapshot; one without a cursor continues."""
    snapshot = Answer.Snapshot(continues=not cursor, **fields)  # type: ignore[arg-type]
    return Answer(session_id=session_id, cursor=cursor, snapshot=snapshot)


def text(index: int, session_id: str = "s") -> Answer:
    """A piece of text, with the cursor `c<index>`."""
    event = run_pb2.RunEvent(
        index=index, time=Timestamp(seconds=1), text_delta=run_pb2.RunEvent.TextDelta(text="x")
    )
    of_run = Answer.RunEventOf(run_id="r", event=event)
    return Answer(session_id=session_id, cursor=f"c{index}", run_event=of_run)


def session(session_id: str = "s") -> session_pb2.Session:
    return session_pb2.Session(session_id=session_id, active_run_id="r")


async def take(stream: SessionStream, count: int) -> list[SessionEvent]:
    return [await anext(stream) for _ in range(count)]


async def test_parts_of_a_snapshot_are_one(peer: Peer, client: Client) -> None:
    waiting = [run_pb2.Run(run_id=f"w{n}") for n in range(3)]
    peer.scripts[RPC] = [
        (
            part(session=session(), active_run=run_pb2.Run(run_id="r")),
            part(queue=waiting[:2]),
            part(queue=waiting[2:], output=[text(4).run_event.event]),
            part(cursor="c0"),
            Answer(session_id="s", cursor="c1", queue_changed=Answer.QueueChanged(run_ids=["w2"])),
            Answer(session_id="s", session_changed=Answer.SessionChanged()),
            HANG,
        )
    ]
    async with client.subscribe_session("s") as stream:
        first, queue, gone = await take(stream, 3)
        assert isinstance(first.body, SessionSnapshot)
        assert first.cursor == "c0"
        assert first.body.session is not None
        assert first.body.active_run is not None
        assert [run.run_id for run in first.body.queue] == ["w0", "w1", "w2"]
        assert [event.body for event in first.body.output] == [TextDelta("x")]
        assert queue.body == QueueChanged(("w2",), ())
        assert gone.body == SessionChanged(None, None)
        # A session that was deleted has no position.
        assert dict(stream.cursors) == {}


@pytest.mark.parametrize(
    "break_",
    [
        pytest.param((LOST,), id="lost"),
        pytest.param((), id="ended"),
        pytest.param((Refuse(StatusCode.UNAVAILABLE, "DRAINING"),), id="draining"),
    ],
)
async def test_r51_it_resumes_after_the_cursor_of_each_session(
    peer: Peer, client: Client, break_: tuple[Refuse, ...]
) -> None:
    peer.scripts[RPC] = [
        (part(cursor="a0"), part("t", cursor="b0"), text(1), text(2), *break_),
        (text(3), HANG),
    ]
    async with client.subscribe_session(["s", "t"]) as stream:
        seen = await take(stream, 5)
        assert [event.cursor for event in seen] == ["a0", "b0", "c1", "c2", "c3"]
        assert all(isinstance(event.body, SessionRunEvent) for event in seen[2:])
    first, second = peer.requests[RPC]
    assert (list(first.session_ids), list(first.cursors)) == (["s", "t"], [])
    assert sorted(second.cursors) == ["b0", "c2"]


async def test_a_snapshot_that_was_interrupted_begins_again(peer: Peer, client: Client) -> None:
    runs = [run_pb2.Run(run_id="w")]
    peer.scripts[RPC] = [
        (part(session=session(), queue=runs), LOST),
        (part(session=session(), queue=runs), part(cursor="c0"), HANG),
    ]
    async with client.subscribe_session("s") as stream:
        (snapshot,) = await take(stream, 1)
        assert isinstance(snapshot.body, SessionSnapshot)
        assert [run.run_id for run in snapshot.body.queue] == ["w"]


async def test_marks_and_what_is_not_known_are_passed_over(peer: Peer, client: Client) -> None:
    unknown = text(1)
    unknown.run_event.event.ClearField("text_delta")
    peer.scripts[RPC] = [
        (Answer(progress=Answer.Progress()), unknown, text(2), HANG),
    ]
    async with client.subscribe_session("s", cursors={"s": "c0"}) as stream:
        (event,) = await take(stream, 1)
        assert event.cursor == "c2"
    assert list(peer.requests[RPC][0].cursors) == ["c0"]
    assert peer.requests[RPC][0].with_deltas


async def test_a_permanent_error_is_raised(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(Refuse(StatusCode.OUT_OF_RANGE, "CURSOR_COMPACTED"),)]
    async with client.subscribe_session("s", cursors={"s": "old"}) as stream:
        with pytest.raises(runlane.CursorCompacted):
            await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_it_blocks_in_a_program_without_asyncio(peer: Peer) -> None:
    peer.scripts[RPC] = [(part(cursor="c0"), text(1), HANG)]

    def use() -> list[str]:
        with blocking.Client(peer.target) as client, client.subscribe_session("s") as stream:
            found = [next(stream).cursor for _ in range(2)]
            assert dict(stream.cursors) == {"s": "c1"}
            return found

    assert await asyncio.to_thread(use) == ["c0", "c1"]
