"""Reads of everything that a store has, to compare what a damaged row changes."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from google.protobuf.message import Message as Wire

from runlane_server.core.errors import CorruptRecord, CursorCompacted
from runlane_server.core.model import (
    Attachment,
    Role,
    RunKey,
    SessionKey,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
    WhenBusy,
)
from runlane_server.core.turn import DraftMessage
from runlane_server.rpc import convert
from runlane_server.rpc.transcript import lay_out
from runlane_server.store.base import EventFilter, NewSession, Store
from runlane_server.store.lookup import RunFilter
from support.story import MANY, PLENTY, TENANT, Story, answer, request

GOOD, BAD = "good", "bad"

MAX_WIRE = 4 << 20
"""The largest message that gRPC passes on by default."""

RUNS = ("ended", "tools", "folded", "active", "waiting")


def run_id(session_id: str, name: str) -> str:
    return f"{session_id}-{name}"


async def play(store: Store, session_id: str) -> Story:
    """A session with a row of every kind in every table."""
    story = Story(store, session_id)

    def wanted(name: str, *attachments: Attachment, **options: Any) -> Any:
        return request(run_id(session_id, name), "p" * 300, *attachments, **options)

    await story.play(wanted("ended", Attachment("n", "text/plain", "t"), color="red"))
    await story.accept(wanted("tools"), wanted("folded", when_busy=WhenBusy.FOLD))
    await story.start()
    await story.append(TextDelta("x"), ToolCall("id", "search", "{}"))
    await story.fold()
    joined = DraftMessage(Role.USER, run_id=run_id(session_id, "folded"))
    called = DraftMessage(Role.ASSISTANT, (Text("x"), ToolCall("id", "search", "{}")))
    found = DraftMessage(Role.TOOL, (ToolResult("id", "search", "found"),))
    await story.finish(answer("both", Usage(1, 2, 3, 4, 5), called, found, joined))
    await story.accept(wanted("active"), wanted("waiting"))
    await story.start()
    await story.append(TextDelta("y"))
    return story


async def fork(story: Story, name: str, turn: int) -> SessionKey:
    """A fork of a session at a turn."""
    plan = await story.store.plan_copy(story.key, turn)
    assert plan is not None
    made = SessionKey(story.tenant, name)
    await story.store.fork_session(plan, NewSession(made, story.tick(), "title", {"a": "b"}))
    return made


COPIES_DAMAGED = {
    "answer": "UPDATE copied_messages SET parts = '[' WHERE run_id = 'bad-ended' AND ordinal > 0",
    "prompt": "UPDATE copied_messages SET prompt = NULL WHERE run_id = 'bad-ended' AND ordinal = 0",
}
"""Damages to the copy that a fork of the session `bad` begins with."""


async def view(store: Store, session_id: str) -> dict[str, object]:
    """All that callers can read of a session; CorruptRecord where a call raises it."""
    key = SessionKey(TENANT, session_id)
    found: dict[str, object] = {
        "session": _wire(await store.get_session(key)),
        "lane": await _or_corrupt(store.load_lane(key)),
        "runs": [
            _wire(run)
            for run in (await store.list_runs(TENANT, RunFilter(session_id), limit=MANY)).items
        ],
        "messages": [
            wire.SerializeToString(deterministic=True)
            for wire in lay_out(
                await store.list_messages(key, limit=MANY, max_bytes=PLENTY), None
            ).messages
        ],
        "completes": await completes(store, EventFilter(session_ids=frozenset({session_id}))),
    }
    for name in RUNS:
        run = RunKey(TENANT, run_id(session_id, name))
        found[name] = (
            _wire(await store.get_run(run)),
            await _or_corrupt(store.get_prompt(run)),
            await _or_corrupt(_events(store, run)),
            await store.position_of(run),
            await completes(store, EventFilter(run_ids=frozenset({run.run_id}))),
        )
    return found


async def completes(store: Store, wanted: EventFilter) -> list[tuple[int, bytes]]:
    page = await store.completes(TENANT, wanted, after=0, limit=MANY, max_bytes=PLENTY)
    return [(it.position, _encoded(convert.run_complete(it.complete))) for it in page.events]


async def lists(store: Store) -> dict[str, list[Any]]:
    """The lists that sessions share. Every item can be sent."""
    sessions = (await store.list_sessions(TENANT, limit=MANY)).items
    runs = (await store.list_runs(TENANT, limit=MANY)).items
    await store.stored_bytes(TENANT)
    return {
        "sessions": [(it.session_id, _wire(it)) for it in sessions],
        "runs": [(it.run_id, _wire(it)) for it in runs],
        "completes": await completes(store, EventFilter()),
        "busy": [it.key for it in await store.busy_sessions()],
        "stale": [it.key for it in await store.stale_sessions(1 << 62, MANY)],
    }


def _wire(record: Any) -> bytes | None:
    if record is None:
        return None
    encode: Any = convert.session if hasattr(record, "waiting_runs") else convert.run
    return _encoded(encode(record))


def _encoded(message: Wire) -> bytes:
    data = message.SerializeToString(deterministic=True)
    assert len(data) < MAX_WIRE
    return data


async def _events(store: Store, run: RunKey) -> list[bytes]:
    events = await store.run_events(run, after=0, limit=MANY, max_bytes=PLENTY)
    return [_encoded(convert.run_event(event)) for event in events]


async def _or_corrupt(read: Awaitable[object]) -> object:
    """The result of a call, or its error. An event without a sound number counts as removed."""
    try:
        return await read
    except (CorruptRecord, CursorCompacted) as error:
        return type(error)
