"""Probes of access control: isolation of tenants."""

from __future__ import annotations

from collections.abc import Callable
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode

from rpc.probe_base import RUNS, SESSIONS
from runlane.v1 import run_pb2
from runlane.v1 import run_service_pb2 as runs_pb
from runlane.v1 import session_service_pb2 as sessions_pb
from runlane_server.access.caller import CALLER
from runlane_server.store.memory.store import MemoryStore
from support.callers import (
    METHODS,
    OF_TENANTS,
    guarded,
    request,
)


async def strangers(folder: Path) -> None:
    """Data of another tenant and missing data get the same answer, byte by byte."""
    for who in ("stranger", "other jwt"):
        async with guarded(folder) as world:
            for method in OF_TENANTS:
                theirs = await world.ask(method, request(method), world.shown(who))
                absent = await world.ask(
                    method, request(method, "s-absent", "r-absent"), world.shown(who)
                )
                assert theirs.code is absent.code, (method, theirs, absent)
                assert theirs.details.replace(b"theirs", b"absent") == absent.details, method
                if METHODS[method].name.startswith(("List", "Cancel")):
                    assert theirs.answer == absent.answer, method
            active = await world.ask(RUNS + "GetRun", request(RUNS + "GetRun"), world.shown("read"))
            assert active.answer.run.state == run_pb2.RUN_STATE_ACTIVE


async def same_names(folder: Path) -> None:
    """Two tenants can use the same ids independently."""
    async with guarded(folder) as world:
        wanted = runs_pb.RunAcceptedRequest(
            session_id="s-theirs", run_id="r-theirs", prompt="[]", allow_missing=True
        )
        shown = world.shown("stranger")
        assert (await world.ask(RUNS + "RunAccepted", wanted, shown)).code is StatusCode.OK
        await world.ask(RUNS + "WaitRun", runs_pb.WaitRunRequest(run_id="r-theirs"), shown)
        messages = await world.ask(
            SESSIONS + "ListMessages", request(SESSIONS + "ListMessages"), shown
        )
        assert messages.answer.messages
        assert b"one" not in messages.answer.SerializeToString()
        for page_size in (0, 1):
            wanted_all = runs_pb.CancelAllRequest(page_size=page_size)
            everything = await world.ask(RUNS + "CancelAll", wanted_all, shown)
            assert not everything.answer.sessions
        theirs = await world.ask(RUNS + "GetRun", request(RUNS + "GetRun"), world.shown("read"))
        assert theirs.answer.run.state == run_pb2.RUN_STATE_ACTIVE


async def lists(folder: Path) -> None:
    """A session is listed for its tenant only."""
    async with guarded(folder) as world:
        method = SESSIONS + "CreateSession"
        created = await world.ask(method, request(method, "x"), world.shown("stranger"))
        for who, expected in (
            ("stranger", created.answer.session.session_id),
            ("read", "s-theirs"),
        ):
            method = SESSIONS + "ListSessions"
            listed = await world.ask(method, request(method), world.shown(who))
            assert [each.session_id for each in listed.answer.sessions] == [expected]


async def cursors(folder: Path) -> None:
    """A cursor or page token of another tenant is invalid."""
    async with guarded(folder) as world:
        admin, stranger = world.shown("admin"), world.shown("stranger")
        wanted = runs_pb.RunAcceptedRequest(session_id="s-theirs", prompt="[]")
        accepted = await world.ask(RUNS + "RunAccepted", wanted, admin)
        asked = runs_pb.SubscribeRunCompleteRequest(cursor=accepted.answer.cursor)
        method = RUNS + "SubscribeRunComplete"
        assert (await world.ask(method, asked, admin)).code is StatusCode.OK
        assert (await world.ask(method, asked, stranger)).reason == "CURSOR_INVALID"
        listed = runs_pb.ListRunsRequest(page_size=1)
        page = await world.ask(RUNS + "ListRuns", listed, admin)
        listed.page_token = page.answer.next_page_token
        assert (await world.ask(RUNS + "ListRuns", listed, admin)).code is StatusCode.OK
        assert (await world.ask(RUNS + "ListRuns", listed, stranger)).reason == "PAGE_TOKEN_INVALID"


async def feeds(folder: Path) -> None:
    """A subscription without a filter gets the events of its tenant only."""
    async with guarded(folder) as world:
        stranger = world.shown("stranger")
        asked = runs_pb.SubscribeRunCompleteRequest(from_beginning=True)
        call = world.open(RUNS + "SubscribeRunComplete", asked, stranger)
        assert (await call.read()).HasField("progress")
        world.wire.latches.open("g")
        wait = runs_pb.WaitRunRequest(run_id="r-theirs")
        await world.ask(RUNS + "WaitRun", wait, world.shown("read"))
        mine = runs_pb.RunAcceptedRequest(session_id="m", prompt="[]", allow_missing=True)
        accepted = await world.ask(RUNS + "RunAccepted", mine, stranger)
        assert (await call.read()).run_complete.run_id == accepted.answer.run.run_id
        call.cancel()


NAMELESS = {"CreateSession", "CancelAll", "ListSessions", "CreateWebhook", "ListWebhooks"}
"""The rpcs that name no session, run or webhook."""


async def same_path(folder: Path) -> None:
    """Data of another tenant and missing data cause the same reads of the store."""
    asked: list[tuple[str, str]] = []
    store = MemoryStore()
    for part in (store, store.webhooks):
        for name in dir(part):
            if iscoroutinefunction(function := getattr(part, name)) and not name.startswith("_"):
                setattr(part, name, _recording(asked, name, function))
    async with guarded(folder, store) as world:
        for method in OF_TENANTS:
            if METHODS[method].name in NAMELESS:
                continue
            paths = []
            for suffix in ("theirs", "absent"):
                asked.clear()
                wanted = request(method, f"s-{suffix}", f"r-{suffix}")
                await world.ask(method, wanted, world.shown("stranger"))
                if METHODS[method].name == "SubscribeSession":
                    # It reads on until it finds that its caller has left.
                    asked[:] = [it for it in asked if suffix in it[1]][:2]
                if "webhook_id" in METHODS[method].input_type.fields_by_name:
                    # The call before may still be reading.
                    asked[:] = [it for it in asked if f"w-r-{suffix}" in it[1]]
                    assert asked, method
                paths.append([(name, said.replace(suffix, "")) for name, said in asked])
            assert paths[0] == paths[1], method
            if "run_id" in METHODS[method].input_type.fields_by_name:
                assert paths[0] or METHODS[method].name == "Cancel", method


def _recording(
    asked: list[tuple[str, str]], name: str, function: Callable[..., Any]
) -> Callable[..., Any]:
    async def recorded(*args: Any, **kwargs: Any) -> Any:
        caller = CALLER.get(None)
        if caller is not None and caller.tenant == "other":
            asked.append((name, repr((args, kwargs))))
        return await function(*args, **kwargs)

    return recorded


async def agents(folder: Path) -> None:
    """A caller that is limited to some agents cannot make a run or a session use another one."""
    async with guarded(folder) as world:
        shown = world.shown("limited")
        create = SESSIONS + "CreateSession"
        other = sessions_pb.CreateSessionRequest(session_id="of-another", agent="default")
        assert (await world.ask(create, other, world.shown("run"))).code is StatusCode.OK
        wanted: tuple[tuple[str, Any], ...] = (
            (RUNS + "RunAccepted", runs_pb.RunAcceptedRequest(session_id="s-theirs", prompt="[]")),
            (
                SESSIONS + "CreateSession",
                sessions_pb.CreateSessionRequest(session_id="mine", agent="default"),
            ),
            (
                SESSIONS + "ForkSession",
                sessions_pb.ForkSessionRequest(session_id="of-another", new_session_id="mine"),
            ),
            (
                SESSIONS + "UpdateSession",
                sessions_pb.UpdateSessionRequest(
                    session_id="s-theirs",
                    agent="default",
                    update_mask=FieldMask(paths=["agent"]),
                ),
            ),
        )
        for method, asked in wanted:
            found = await world.ask(method, asked, shown)
            assert (found.code, found.reason) == (
                StatusCode.PERMISSION_DENIED,
                "PERMISSION_DENIED",
            ), method
        get = SESSIONS + "GetSession"
        kept = await world.ask(get, request(get), shown)
        assert not kept.answer.session.agent
        method, asked = wanted[-1]
        assert (await world.ask(method, asked, world.shown("run"))).code is StatusCode.OK
