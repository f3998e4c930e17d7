"""Filtered lists and the change of a session, over a real socket."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from runlane.v1 import run_pb2, session_pb2
from runlane.v1 import run_service_pb2 as runs_pb
from runlane.v1 import session_service_pb2 as pb
from runlane_server.store import lookup_sql
from runlane_server.store.sqlite.store import SqliteStore
from support.rpc_wire import Wire, over_any_store, refused, serving

pytestmark = over_any_store


async def ran(wire: Wire, session_id: str, run_id: str, **labels: str) -> run_pb2.Run:
    await wire.runs.RunAccepted(
        runs_pb.RunAcceptedRequest(
            session_id=session_id,
            run_id=run_id,
            prompt=run_id,
            allow_missing=True,
            metadata=labels,
        )
    )
    return (await wire.runs.WaitRun(runs_pb.WaitRunRequest(run_id=run_id))).run


async def update(wire: Wire, session_id: str, *paths: str, **fields: object) -> session_pb2.Session:
    request = pb.UpdateSessionRequest(
        session_id=session_id,
        update_mask=FieldMask(paths=paths),
        **fields,  # type: ignore[arg-type]
    )
    return (await wire.sessions.UpdateSession(request)).session


async def test_runs_are_listed_by_label_time_and_order() -> None:
    async with serving() as wire:
        first = await ran(wire, "one", "a", kind="x")
        await ran(wire, "two", "b", kind="y")
        last = await ran(wire, "two", "c", kind="x")
        listed = await wire.runs.ListRuns(
            runs_pb.ListRunsRequest(metadata={"kind": "x"}, page_size=1, with_total_size=True)
        )
        assert [run.run_id for run in listed.runs] == ["c"]
        assert (listed.total_size, listed.total_size_is_minimum) == (2, False)
        request = runs_pb.ListRunsRequest(metadata={"kind": "x"}, page_size=1)
        request.page_token = listed.next_page_token
        rest = await wire.runs.ListRuns(request)
        assert [run.run_id for run in rest.runs] == ["a"]
        assert (rest.next_page_token, rest.total_size) == ("", 0)

        ended = runs_pb.ListRunsRequest(ended_from=first.ended_at, ended_before=last.ended_at)
        listed = await wire.runs.ListRuns(ended)
        assert [run.run_id for run in listed.runs] == ["b", "a"]
        ended.order = runs_pb.RUN_ORDER_EARLIEST_ENDED
        listed = await wire.runs.ListRuns(ended)
        assert [run.run_id for run in listed.runs] == ["a", "b"]
        accepted = runs_pb.ListRunsRequest(accepted_before=last.accepted_at)
        listed = await wire.runs.ListRuns(accepted)
        assert [run.run_id for run in listed.runs] == ["b", "a"]


async def test_page_that_finds_nothing_in_a_bounded_read_has_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup_sql, "SCAN_ROWS", 2)
    async with serving(store=SqliteStore(tmp_path / "runlane.db")) as wire:
        await ran(wire, "s", "a", size="1")
        for name in "bcde":
            await ran(wire, "s", name)
        request = runs_pb.ListRunsRequest(session_id="s", metadata={"size": "1"}, page_size=1)
        pages: list[list[str]] = []
        while not pages or request.page_token:
            page = await wire.runs.ListRuns(request)
            pages.append([run.run_id for run in page.runs])
            request.page_token = page.next_page_token
        assert pages == [[], [], ["a"]]


async def test_run_shows_the_index_from_which_to_follow_it() -> None:
    async with serving() as wire:
        request = runs_pb.RunAcceptedRequest(
            session_id="s", run_id="a", prompt="a", allow_missing=True
        )
        assert (await wire.runs.RunAccepted(request)).run.last_event_index == 1
        done = (await wire.runs.WaitRun(runs_pb.WaitRunRequest(run_id="a"))).run
        events = [
            one.event.index
            async for one in wire.runs.SubscribeRun(runs_pb.SubscribeRunRequest(run_id="a"))
        ]
        assert done.last_event_index == events[-1]
        listed = await wire.runs.ListRuns(runs_pb.ListRunsRequest())
        assert listed.runs[0].last_event_index == events[-1]


async def test_messages_of_one_run_are_listed() -> None:
    async with serving() as wire:
        await ran(wire, "s", "a")
        await ran(wire, "s", "b")
        request = pb.ListMessagesRequest(session_id="s", run_id="b", page_size=1)
        first = await wire.sessions.ListMessages(request)
        request.page_token = first.next_page_token
        second = await wire.sessions.ListMessages(request)
        found = [*first.messages, *second.messages]
        assert [(it.run_id, it.role) for it in found] == [
            ("b", session_pb2.ROLE_USER),
            ("b", session_pb2.ROLE_ASSISTANT),
        ]
        assert second.next_page_token == ""
        request.run_id = "a"
        error = await refused(wire.sessions.ListMessages(request))
        assert (error.code, error.reason) == (StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")


async def test_session_is_changed_where_the_mask_says() -> None:
    async with serving() as wire:
        created = (
            await wire.sessions.CreateSession(
                pb.CreateSessionRequest(session_id="s", title="old", metadata={"a": "1"})
            )
        ).session
        changed = await update(wire, "s", "title", title="new", etag=created.etag)
        assert (changed.title, dict(changed.metadata)) == ("new", {"a": "1"})
        assert changed.etag != created.etag
        changed = await update(wire, "s", "metadata", metadata={"b": "2"})
        assert (changed.title, dict(changed.metadata)) == ("new", {"b": "2"})
        by_label = pb.ListSessionsRequest(metadata={"b": "2"}, with_total_size=True)
        listed = await wire.sessions.ListSessions(by_label)
        assert [it.session_id for it in listed.sessions] == ["s"]
        assert listed.total_size == 1
        by_label = pb.ListSessionsRequest(metadata={"a": "1"})
        assert not (await wire.sessions.ListSessions(by_label)).sessions
        found = (await wire.sessions.GetSession(pb.GetSessionRequest(session_id="s"))).session
        assert found == changed


async def test_old_etag_changes_nothing() -> None:
    async with serving() as wire:
        created = (
            await wire.sessions.CreateSession(pb.CreateSessionRequest(session_id="s"))
        ).session
        await ran(wire, "s", "a")  # work does not change the etag
        changed = await update(wire, "s", "title", title="one", etag=created.etag)
        error = await refused(update(wire, "s", "title", title="two", etag=created.etag))
        assert (error.code, error.reason) == (StatusCode.FAILED_PRECONDITION, "EDIT_CONFLICT")
        error = await refused(update(wire, "nobody", "title", title="two"))
        assert (error.code, error.reason) == (StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
        error = await refused(update(wire, "s", "agent", agent="nobody"))
        assert (error.code, error.reason) == (StatusCode.NOT_FOUND, "AGENT_NOT_FOUND")
        found = (await wire.sessions.GetSession(pb.GetSessionRequest(session_id="s"))).session
        assert (found.title, found.etag) == ("one", changed.etag)


async def test_sessions_are_listed_by_work_and_time() -> None:
    async with serving() as wire:
        for name in "abc":
            await wire.sessions.CreateSession(pb.CreateSessionRequest(session_id=name))
        await ran(wire, "b", "run")
        request = pb.ListSessionsRequest(busy=True)
        assert not (await wire.sessions.ListSessions(request)).sessions
        request = pb.ListSessionsRequest(
            busy=False, order=pb.SESSION_ORDER_EARLIEST_CREATED, created_from=Timestamp(seconds=1)
        )
        listed = await wire.sessions.ListSessions(request)
        assert [it.session_id for it in listed.sessions] == ["a", "b", "c"]
        request.created_from.seconds = 9_999_999_999
        assert not (await wire.sessions.ListSessions(request)).sessions
