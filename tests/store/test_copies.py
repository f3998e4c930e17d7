"""Forks: sessions that begin with a copy of the transcript of another one."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runlane_server.core.model import (
    Attachment,
    FinishReason,
    KeptPart,
    Message,
    Origin,
    Reasoning,
    Role,
    SessionKey,
    Text,
    ToolCall,
    ToolResult,
    Usage,
    WhenBusy,
)
from runlane_server.core.transition import Outcome
from runlane_server.core.turn import DraftMessage
from runlane_server.store import copies
from runlane_server.store.base import NewSession, SessionTaken, Stale, Store
from runlane_server.store.copies import CopyPlan, MessagesPiece, PartsPiece
from runlane_server.store.sqlite.check import check
from runlane_server.store.sqlite.store import SqliteStore
from support.story import MANY, PLENTY, START, Story, Witness, answer, request

LONG = Text("long " * 250_000)
"""More than a MiB: what follows it may be stored before the message."""

ATTACHMENTS = (
    Attachment("a\x00.bin", "image/png", b"\x00\xff" * 500),
    Attachment("notes.txt", "text/plain", "übel\x00\x01"),
)


async def transcript(
    store: Store, key: SessionKey, *, limit: int = MANY, max_bytes: int = PLENTY
) -> list[Message]:
    """All messages of a session, read by pages."""
    messages: list[Message] = []
    place = None
    while True:
        page = await store.list_messages(key, after=place, limit=limit, max_bytes=max_bytes)
        messages += page.items
        place = page.next
        if place is None:
            return messages


async def tell(story: Story) -> None:
    """Turns with all that a transcript may have: 1 an attachment and a long prompt, 2 tools, 3 a
    run that joined, 4 one that was cancelled, 5 parts that were stored before their message."""
    await story.play(request("r1", "x" * 2_000 + "\x00\x01ü", *ATTACHMENTS), "one")
    call, result = ToolCall("c", "look", "{}"), ToolResult("c", "look", "found", is_error=True)
    tools = (DraftMessage(Role.ASSISTANT, (call,)), DraftMessage(Role.TOOL, (result,)))
    await story.play("r2", answer("two", Usage(1, 2), *tools))
    await story.accept(request("r3"), request("r4", "also", when_busy=WhenBusy.FOLD))
    await story.start()
    await story.fold()
    joined = DraftMessage(Role.USER, (), run_id="r4")
    await story.finish(answer("three", Usage(), joined))
    await story.accept("r5")
    await story.cancel()
    await story.accept("r6")
    key = await story.start()
    kept: list[KeptPart] = []
    parts: tuple[Text | Reasoning, ...] = (Text("zwei\x00é" * 100), Reasoning("drei"))
    for number, part in enumerate(parts):
        await story.store.keep_part(key, 1, number, part)
        kept.append(KeptPart(1, number, len(part.text.encode())))
    said = DraftMessage(Role.ASSISTANT, (LONG, *kept, Text("end")))
    await story.finish(Outcome(FinishReason.STOP, content=(said,), usage=Usage(), model="m"))


async def plan_of(store: Store, key: SessionKey, turn: int) -> CopyPlan:
    plan = await store.plan_copy(key, turn)
    assert plan is not None
    return plan


async def fork(story: Story, name: str, turn: int) -> Story:
    """A fork of a session, as a story that goes on there."""
    plan = await plan_of(story.store, story.key, turn)
    made = Story(story.store, name, story.tenant, story.now)
    await story.store.fork_session(plan, NewSession(made.key, story.tick(), "title", {"a": "b"}))
    made.lane = await story.store.load_lane(made.key)
    return made


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of many messages have many pieces; here those of a few have."""
    monkeypatch.setattr(copies, "PIECE_BYTES", 500)
    monkeypatch.setattr(copies, "PIECE_ROWS", 2)
    monkeypatch.setattr("runlane_server.store.sqlite.copies.SIZES_PER_READ", 3)
    monkeypatch.setattr("runlane_server.store.copies.SIZES_PER_READ", 3)


async def test_fork_begins_with_the_transcript_up_to_its_turn(story: Story) -> None:
    await tell(story)
    original = await transcript(story.store, story.key)
    assert {message.turn for message in original} == {1, 2, 3, 4, 5}
    for turn in (0, 1, 3, 5):
        made = await fork(story, f"fork-{turn}", turn)
        expected = [message for message in original if message.turn <= turn]
        assert await transcript(story.store, made.key) == expected
        session = await story.store.get_session(made.key)
        assert session is not None
        assert session.origin == Origin("session", turn)
        assert (session.title, dict(session.metadata), session.busy) == ("title", {"a": "b"}, False)
        assert session.usage == Usage()
        assert (made.lane.version, made.lane.turn, made.lane.accept_seq) == (1, turn, 0)
    assert await transcript(story.store, story.key) == original
    source = await story.store.get_session(story.key)
    assert source is not None
    assert source.origin is None
    listed = (await story.store.list_sessions(story.tenant, limit=MANY)).items
    assert [it.origin for it in listed] == [Origin("session", n) for n in (5, 3, 1, 0)] + [None]


@pytest.mark.usefixtures("small_pieces")
async def test_copy_in_pieces_is_the_same(story: Story) -> None:
    await tell(story)
    plan = await plan_of(story.store, story.key, 5)
    again = await fork(await fork(story, "fork", 5), "again", 4)
    original = await transcript(story.store, story.key)
    assert await transcript(story.store, SessionKey(story.tenant, "fork")) == original
    upto_four = [message for message in original if message.turn <= 4]
    assert await transcript(story.store, again.key) == upto_four
    if len(plan.pieces) > 1:  # not the store in memory
        assert sum(isinstance(piece, MessagesPiece) for piece in plan.pieces) >= 6
        assert sum(isinstance(piece, PartsPiece) for piece in plan.pieces) == 2


async def test_both_sessions_go_on_independently(story: Story) -> None:
    await tell(story)
    original = await transcript(story.store, story.key)
    made = await fork(story, "fork", 3)
    await made.play("mine", "of the fork")
    await story.play("yours", "of the source")
    mine = await transcript(story.store, made.key)
    assert mine[:-2] == [message for message in original if message.turn <= 3]
    assert [(message.run_id, message.turn) for message in mine[-2:]] == [("mine", 4)] * 2
    assert (await transcript(story.store, story.key))[: len(original)] == original
    further = await fork(made, "further", 4)
    assert await transcript(story.store, further.key) == mine


async def test_deleting_either_leaves_the_other_whole(story: Story) -> None:
    await tell(story)
    original = await transcript(story.store, story.key)
    made = await fork(story, "fork", 5)
    twin = await fork(made, "twin", 5)
    await made.play("mine")
    mine = await transcript(story.store, made.key)
    await story.remove()
    assert await transcript(story.store, story.key) == []
    assert await transcript(story.store, made.key) == mine
    await made.remove()
    assert await transcript(story.store, twin.key) == original
    await twin.remove()
    assert await story.store.stored_bytes(story.tenant) == 0
    # The id can be used again, without what was copied.
    await fresh_session(twin)
    assert await transcript(story.store, twin.key) == []


async def fresh_session(story: Story) -> None:
    await story.store.create_session(NewSession(story.key, story.tick()))


@pytest.mark.parametrize("limit", [1, 2, 3, MANY])
async def test_pages_cross_from_the_copy_to_the_own_messages(story: Story, limit: int) -> None:
    await story.play(request("r1", "with", *ATTACHMENTS))
    await story.play("r2")
    made = await fork(story, "fork", 2)
    await made.play("mine")
    whole = await transcript(story.store, made.key)
    assert len(whole) == 6
    assert await transcript(story.store, made.key, limit=limit) == whole
    assert await transcript(story.store, made.key, limit=limit, max_bytes=1) == whole
    page = await story.store.list_messages(made.key, limit=MANY, max_bytes=1_000 + 3 * 256)
    assert 1 <= len(page.items) < 6
    after = await story.store.list_messages(made.key, after=(2, 1), limit=9, max_bytes=PLENTY)
    assert list(after.items) == whole[4:]


async def test_messages_of_one_run_are_found_in_both_parts(story: Story) -> None:
    await story.play("r1", "one")
    await story.play("r2", "two")
    made = await fork(story, "fork", 2)
    await made.play("mine")
    whole = await transcript(story.store, made.key)
    for n, run_id in enumerate(("r1", "r2", "mine")):
        page = await story.store.list_messages(
            made.key, limit=MANY, max_bytes=PLENTY, run_id=run_id
        )
        assert list(page.items) == whole[2 * n : 2 * n + 2]
    for run_id in ("nobody", "mine"):
        page = await story.store.list_messages(
            story.key, limit=MANY, max_bytes=PLENTY, run_id=run_id
        )
        assert page.items == ()


async def test_taken_id_leaves_nothing_behind(story: Story, witness: Witness) -> None:
    await tell(story)
    made = await fork(story, "fork", 2)
    before = await story.store.stored_bytes(story.tenant)
    with pytest.raises(SessionTaken):
        await fork(story, "fork", 5)
    with pytest.raises(SessionTaken):
        await fork(story, "session", 5)
    assert await story.store.stored_bytes(story.tenant) == before
    assert {message.turn for message in await transcript(story.store, made.key)} == {1, 2}
    changes = [(it.base, it.version) for it in witness.lanes if it.key == made.key]
    assert changes == [(0, 1)]


async def test_source_that_was_deleted_meanwhile_is_not_copied(story: Story) -> None:
    await tell(story)
    plan = await plan_of(story.store, story.key, 5)
    await story.remove()
    made = SessionKey(story.tenant, "fork")
    with pytest.raises(Stale):
        await story.store.fork_session(plan, NewSession(made, START))
    # Neither is a later session with the same id.
    story.lane = await story.store.load_lane(story.key)
    story.now += 1_000
    await story.play("later")
    with pytest.raises(Stale):
        await story.store.fork_session(replace(plan, copy_id=7), NewSession(made, START))
    assert await story.store.get_session(made) is None
    assert await story.store.plan_copy(made, 1) is None


async def test_size_of_the_plan_is_what_the_fork_counts_as(story: Story) -> None:
    await tell(story)
    before = await story.store.stored_bytes(story.tenant)
    plan = await plan_of(story.store, story.key, 5)
    prompts = sum(attachment.size for attachment in ATTACHMENTS) + 2_000
    assert plan.size > prompts + len(LONG.text)
    await fork(story, "fork", 5)
    grown = await story.store.stored_bytes(story.tenant) - before
    assert plan.size < grown < plan.size + 500


async def test_version_follows_that_of_a_removed_session(story: Story) -> None:
    await story.play("r1")
    made = await fork(story, "fork", 1)
    await made.play("mine")
    await made.remove()
    again = await fork(story, "fork", 1)
    await again.play("mine too")  # the store takes the version that it has given
    assert len(await transcript(story.store, again.key)) == 4


def unfinished(path: Path) -> dict[str, int]:
    """The rows of copies in a file."""
    tables = ("unfinished_copies", "copied_messages", "copied_attachments", "copied_parts")
    with closing(sqlite3.connect(path)) as db:
        rows = {table: db.execute(f"SELECT * FROM {table}").fetchall() for table in tables}  # noqa: S608
        return {table: len(found) for table, found in rows.items()}


@pytest.mark.sqlite("reads the tables of the file")
async def test_copy_that_a_stopped_server_left_is_removed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runlane.db"

    def die(*_: Any) -> Any:
        raise KeyboardInterrupt

    async with SqliteStore(path) as store:
        story = Story(store)
        await tell(story)
        await fork(story, "whole", 5)
        with monkeypatch.context() as patched:
            patched.setattr("runlane_server.store.sqlite.copies.fork_unit", die)
            with pytest.raises(KeyboardInterrupt):
                await fork(story, "half", 5)
        rows = unfinished(path)
        assert rows["unfinished_copies"] == 1
    assert check(path).problems == ()
    async with SqliteStore(path) as store:
        assert await store.remove_deleted()
        left = unfinished(path)
        assert left.pop("unfinished_copies") == 0
        assert left == {name: count // 2 for name, count in rows.items() if name in left}
        assert len(await transcript(store, SessionKey(story.tenant, "whole"))) > 5
    assert check(path).problems == ()
