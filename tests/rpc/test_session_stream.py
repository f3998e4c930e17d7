"""SubscribeSession over a real socket (R50 to R52)."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from runlane.v1 import run_pb2, run_service_pb2
from runlane.v1 import session_service_pb2 as pb
from runlane_server.access.quotas import Quota, QuotaBook, Quotas
from runlane_server.feed.sessions import SessionPlace
from runlane_server.rpc.session_cursor import SessionCursors
from support.rpc_wire import Wire, over_any_store, refused, serving
from support.staging import SECONDS, say, script, wait

pytestmark = over_any_store

on_all_stores = pytest.mark.stores("memory", "sqlite", "postgresql")

LONG_AFTER = 1 << 60


class Reader:
    """A stream, read message by message."""

    def __init__(self, wire: Wire, *session_ids: str, cursors: list[str] | None = None) -> None:
        self.call = wire.sessions.SubscribeSession(
            pb.SubscribeSessionRequest(
                session_ids=session_ids, cursors=cursors or [], with_deltas=True
            )
        )
        self.seen: list[pb.SubscribeSessionResponse] = []

    async def read(self) -> pb.SubscribeSessionResponse:
        async with asyncio.timeout(SECONDS):
            answer = await self.call.read()
        assert isinstance(answer, pb.SubscribeSessionResponse)
        self.seen.append(answer)
        return answer

    async def until(self, kind: str, field: str = "") -> pb.SubscribeSessionResponse:
        """Reads up to a message of that kind, for an event of a run with its field."""
        while True:
            answer = await self.read()
            if answer.WhichOneof("event") != kind or answer.snapshot.continues:
                continue
            if not field or answer.run_event.event.HasField(field):  # type: ignore[arg-type]
                return answer

    @property
    def events(self) -> list[tuple[str, str, int]]:
        """The events, as (run, kind, index)."""
        return [
            (it.run_event.run_id, it.run_event.event.WhichOneof("event") or "", number)
            for it in self.seen
            if it.HasField("run_event") and (number := it.run_event.event.index)
        ]


async def accept(wire: Wire, *steps: Any, session_id: str = "s", **fields: Any) -> run_pb2.Run:
    request = run_service_pb2.RunAcceptedRequest(
        session_id=session_id, prompt=script(*steps), allow_missing=True, **fields
    )
    return (await wire.runs.RunAccepted(request)).run


async def has_text(wire: Wire, run_id: str) -> None:
    """Waits until text of a run is stored."""
    call = wire.runs.SubscribeRun(run_service_pb2.SubscribeRunRequest(run_id=run_id))
    async for answer in call:
        if answer.event.HasField("text_delta"):
            break
    call.cancel()


async def test_r50_a_snapshot_and_then_everything() -> None:
    async with serving() as wire:
        active = await accept(wire, say("one"), wait("go"), say("two"), run_id="a")
        await has_text(wire, "a")
        await accept(wire, say("x"), run_id="b", metadata={"k": "v"})
        reader = Reader(wire, "s")
        last = await reader.until("snapshot")
        assert last.cursor
        parts = [it.snapshot for it in reader.seen]
        assert {it.session_id for it in reader.seen} == {"s"}
        assert [bool(it.cursor) for it in reader.seen] == [False] * (len(parts) - 1) + [True]
        assert parts[0].session.active_run_id == "a"
        assert parts[0].active_run.prompt_excerpt == active.prompt_excerpt
        assert [dict(run.metadata) for part in parts for run in part.queue] == [{"k": "v"}]
        output = [event for part in parts for event in part.output]
        assert [it.WhichOneof("event") for it in output] == ["started", "text_delta"]
        wire.latches.open("go")
        while ("b", "run_complete") not in [it[:2] for it in reader.events]:
            await reader.until("run_event")
        assert reader.events == [
            ("a", "text_delta", 4),
            ("a", "run_complete", 5),
            ("b", "started", 2),
            ("b", "text_delta", 3),
            ("b", "run_complete", 4),
        ]
        reader.call.cancel()


async def test_r51_resumed_by_its_cursor_at_every_message() -> None:
    async with serving() as wire:
        await accept(wire, say("1"), wait("go"), say("2"), run_id="a")
        await wire.latches.reached("go")
        whole = Reader(wire, "s")
        await whole.until("snapshot")
        await accept(wire, say("3"), run_id="b")
        wire.latches.open("go")
        while ("b", "run_complete") not in [it[:2] for it in whole.events]:
            await whole.until("run_event")
        whole.call.cancel()
        for n, message in enumerate(whole.seen):
            if not message.cursor:
                continue
            before = Reader(wire, "s", cursors=[message.cursor])
            before.seen = whole.seen[: n + 1]
            while ("b", "run_complete") not in [it[:2] for it in before.events]:
                await before.until("run_event")
            before.call.cancel()
            assert before.events == whole.events


async def test_an_idle_stream_gets_progress_marks() -> None:
    async with serving(progress_interval=0.05) as wire:
        reader = Reader(wire, "s")
        mark = await reader.until("progress")
        assert (mark.session_id, mark.cursor) == ("", "")
        assert mark.progress.time.seconds > 0
        reader.call.cancel()


async def test_many_sessions_each_with_its_own_cursor() -> None:
    async with serving() as wire:
        await accept(wire, say("x"), session_id="a", run_id="a1")
        await wire.runs.WaitRun(run_service_pb2.WaitRunRequest(run_id="a1"))
        reader = Reader(wire, "a", "b")
        await reader.until("snapshot")
        await reader.until("snapshot")
        cursor = next(it.cursor for it in reader.seen if it.session_id == "a" and it.cursor)
        # A session that does not exist yet has no position.
        assert {it.cursor for it in reader.seen if it.session_id == "b"} == {""}
        await accept(wire, say("x"), session_id="b", run_id="b1")
        await reader.until("run_event", "run_complete")
        assert {it[0] for it in reader.events} == {"b1"}
        reader.call.cancel()
        again = Reader(wire, "b", "a", cursors=[cursor])
        snapshot = await again.until("snapshot")
        assert snapshot.session_id == "b"
        assert not again.events
        again.call.cancel()


async def test_a_deleted_session_is_reported() -> None:
    async with serving() as wire:
        await accept(wire, say("x"), run_id="a")
        await wire.runs.WaitRun(run_service_pb2.WaitRunRequest(run_id="a"))
        reader = Reader(wire, "s")
        await reader.until("snapshot")
        await wire.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
        gone = await reader.until("session_changed")
        assert (gone.session_changed.HasField("session"), gone.cursor) == (False, "")
        reader.call.cancel()


async def test_a_large_queue_fits_messages() -> None:
    async with serving() as wire:
        await accept(wire, wait("go"), run_id="active")
        await wire.latches.reached("go")
        labels = {f"{n}": "x" * 4_000 for n in range(60)}
        for n in range(20):
            await accept(wire, run_id=f"r{n}", metadata=labels)
        reader = Reader(wire, "s")
        await reader.until("snapshot")
        assert max(it.ByteSize() for it in reader.seen) < 4 << 20
        queue = [run.run_id for it in reader.seen for run in it.snapshot.queue]
        assert queue == [f"r{n}" for n in range(20)]
        assert [it.snapshot.continues for it in reader.seen][-2:] == [True, False]
        reader.call.cancel()


async def test_a_cursor_is_refused_where_it_does_not_belong() -> None:
    async with serving() as wire:
        own = SessionCursors(wire.store.store_id, "default")
        place = SessionPlace(1, 2, "r" * 128, 4)
        mine = own.encode("s", place)
        assert len(mine) <= 256
        assert own.decode(["s"], [mine]) == {"s": place}
        other = SessionCursors(wire.store.store_id, "other").encode("s", place)
        for cursors in ([other], [own.encode("t", place)], [mine, mine]):
            request = pb.SubscribeSessionRequest(session_ids=["s"], cursors=cursors)
            failure = await refused(wire.sessions.SubscribeSession(request).read())
            assert failure.reason == "CURSOR_INVALID"
            assert failure.fields == [f"cursors[{len(cursors) - 1}]"]


async def test_r51_a_removed_position_is_refused_with_the_oldest_one() -> None:
    async with serving() as wire:
        reader = Reader(wire, "s")
        await reader.until("snapshot")
        await accept(wire, say("x"), run_id="a")
        await reader.until("run_event", "run_complete")
        first = next(it.cursor for it in reader.seen if it.cursor)
        reader.call.cancel()
        assert await wire.store.compact(LONG_AFTER, 9) == 1
        request = pb.SubscribeSessionRequest(session_ids=["s"], cursors=[first])
        failure = await refused(wire.sessions.SubscribeSession(request).read())
        assert failure.reason == "CURSOR_COMPACTED"
        assert failure.metadata["session_id"] == "s"
        again = Reader(wire, "s", cursors=[failure.metadata["oldest_cursor"]])
        await again.until("queue_changed")
        assert again.events == []
        again.call.cancel()


async def test_streams_count_for_the_quota() -> None:
    async with serving(quotas=QuotaBook(Quotas(others=Quota(max_streams=1)))) as wire:
        reader = Reader(wire, "s")
        await reader.until("snapshot")
        failure = await refused(
            wire.sessions.SubscribeSession(pb.SubscribeSessionRequest(session_ids=["t"])).read()
        )
        assert failure.reason == "QUOTA_EXCEEDED"
        reader.call.cancel()


async def test_a_draining_server_ends_a_stream() -> None:
    async with serving() as wire:
        reader = Reader(wire, "s")
        await reader.until("snapshot")
        wire.coordinator.feed.close()
        failure = await refused(reader.call.read())
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_a_stream_that_is_left_leaves_nothing() -> None:
    async with serving() as wire:
        reader = Reader(wire, "s")
        await reader.until("snapshot")
        await accept(wire, wait("go"), run_id="a")
        await reader.until("run_event", "started")
        assert wire.coordinator.feed.subscriptions
        reader.call.cancel()
        async with asyncio.timeout(SECONDS):
            while wire.coordinator.feed.subscriptions:
                await asyncio.sleep(0.01)
        assert wire.coordinator.feed.sessions.keys == ()


@pytest.mark.parametrize("with_deltas", [True, False])
async def test_deltas_are_sent_on_request(with_deltas: bool) -> None:
    async with serving() as wire:
        call = wire.sessions.SubscribeSession(
            pb.SubscribeSessionRequest(session_ids=["s"], with_deltas=with_deltas)
        )
        await call.read()
        await accept(wire, say("x"), run_id="a")
        kinds = []
        while "run_complete" not in kinds:
            async with asyncio.timeout(SECONDS):
                answer = await call.read()
            assert isinstance(answer, pb.SubscribeSessionResponse)
            kinds.append(answer.run_event.event.WhichOneof("event"))
        assert ("text_delta" in kinds) is with_deltas
        call.cancel()


async def changes(reader: Reader, title: str) -> list[pb.SubscribeSessionResponse]:
    """Reads up to a progress mark after the session has a title; returns its changes."""
    found: list[pb.SubscribeSessionResponse] = []
    while not found or found[-1].session_changed.session.title != title:
        found.append(await reader.until("session_changed"))
    while not reader.seen[-1].HasField("progress"):
        if (await reader.read()).HasField("session_changed"):
            found.append(reader.seen[-1])
    return found


async def edit(wire: Wire, title: str, **fields: Any) -> None:
    mask = FieldMask(paths=["title", *fields])
    await wire.sessions.UpdateSession(
        pb.UpdateSessionRequest(session_id="s", title=title, update_mask=mask, **fields)
    )


@on_all_stores
async def test_r50_a_change_of_a_session_is_reported_once() -> None:
    async with serving(progress_interval=0.05) as wire:
        await wire.sessions.CreateSession(pb.CreateSessionRequest(session_id="s", title="old"))
        reader = Reader(wire, "s")
        await reader.until("snapshot")
        await edit(wire, "new", metadata={"k": "v"}, agent="default")
        (told,) = await changes(reader, "new")
        session = told.session_changed.session
        assert (session.title, dict(session.metadata), session.agent) == (
            "new",
            {"k": "v"},
            "default",
        )
        found = await wire.sessions.GetSession(pb.GetSessionRequest(session_id="s"))
        assert session == found.session
        await edit(wire, "new")  # what it is already
        await edit(wire, "newer")
        assert len(await changes(reader, "newer")) == 1
        reader.call.cancel()


@on_all_stores
async def test_r51_a_change_of_a_session_is_reported_after_a_resume() -> None:
    async with serving(progress_interval=0.05) as wire:
        await accept(wire, say("x"), run_id="a")
        await wire.runs.WaitRun(run_service_pb2.WaitRunRequest(run_id="a"), timeout=SECONDS)
        reader = Reader(wire, "s")
        await reader.until("snapshot")
        while not reader.seen[-1].HasField("progress"):
            await reader.read()
        cursor = [it.cursor for it in reader.seen if it.cursor][-1]
        reader.call.cancel()
        await edit(wire, "new")
        again = Reader(wire, "s", cursors=[cursor])
        (told,) = await changes(again, "new")
        again.call.cancel()
        last = Reader(wire, "s", cursors=[told.cursor])
        await changes(last, "new")
        assert not again.events
        assert not last.events
        last.call.cancel()


@on_all_stores
async def test_r52_a_change_of_a_session_has_its_place_among_its_runs() -> None:
    async with serving(progress_interval=0.05) as wire:
        await accept(wire, say("1"), wait("go"), say("2"), run_id="a")
        await has_text(wire, "a")
        reader = Reader(wire, "s")
        await reader.until("snapshot")
        await accept(wire, say("3"), run_id="b")
        await edit(wire, "new")
        assert sum(it.session_changed.session.title == "new" for it in await changes(reader, "new"))
        assert [it[:2] for it in reader.events] == [("b", "accepted")]
        wire.latches.open("go")
        while ("b", "run_complete") not in [it[:2] for it in reader.events]:
            await reader.until("run_event")
        # The run and the lane go on: nothing was fenced off or repeated.
        assert reader.events == [
            ("b", "accepted", 1),
            ("a", "text_delta", 4),
            ("a", "run_complete", 5),
            ("b", "started", 2),
            ("b", "text_delta", 3),
            ("b", "run_complete", 4),
        ]
        reader.call.cancel()
