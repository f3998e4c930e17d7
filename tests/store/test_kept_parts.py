"""Parts of long messages, which a store keeps before the message."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from runlane_server.core.model import (
    NO_USAGE,
    FinishReason,
    KeptPart,
    Message,
    Part,
    Reasoning,
    Role,
    SessionKey,
    Text,
)
from runlane_server.core.transition import Outcome
from runlane_server.core.turn import DraftMessage
from runlane_server.store.base import Stale, Store
from runlane_server.store.sqlite.check import check
from runlane_server.store.sqlite.store import SqliteStore
from runlane_server.store.weight import SESSION_BYTES
from support.story import MANY, PLENTY, Story, request

FIRST = Text("first " * 180_000)
"""More than a MiB: what follows it may be kept."""

SECOND, THIRD = Text('"zwei"\n\x00é' * 1_000), Reasoning("drei " * 1_000)


def ended(*parts: Part) -> Outcome:
    """A turn with one message."""
    content = (DraftMessage(Role.ASSISTANT, parts),)
    return Outcome(FinishReason.STOP, content=content, usage=NO_USAGE, model="m")


async def keep(story: Story, *parts: Text | Reasoning, attempt: int = 1) -> list[KeptPart]:
    """Keeps parts of the active run; returns their places."""
    assert story.lane.active is not None
    key = story.run_key(story.lane.active.run_id)
    places = []
    for number, part in enumerate(parts):
        await story.store.keep_part(key, attempt, number, part)
        places.append(KeptPart(attempt, number, len(part.text.encode())))
    return places


async def answers(story: Story, max_bytes: int = PLENTY) -> list[Message]:
    page = await story.store.list_messages(story.key, limit=MANY, max_bytes=max_bytes)
    return [message for message in page.items if message.role is Role.ASSISTANT]


async def test_message_has_its_kept_parts_in_order(story: Story) -> None:
    await story.accept(request("r"))
    await story.start()
    second, third = await keep(story, SECOND, THIRD)
    await story.store.keep_part(story.run_key("r"), 1, 0, SECOND)  # repeated
    await story.finish(ended(FIRST, second, third, Text("last")))
    (message,) = await answers(story)
    assert message.parts == (FIRST, SECOND, THIRD, Text("last"))
    run = await story.store.get_run(story.run_key("r"))
    assert run is not None
    assert run.complete is not None
    assert run.complete.text_truncated
    assert FIRST.text.startswith(run.complete.text)
    size = sum(len(part.text.encode()) for part in (FIRST, SECOND, THIRD))
    assert size <= await story.store.stored_bytes(story.tenant) - SESSION_BYTES < size + 3_000


async def test_kept_parts_count_towards_a_page(story: Story) -> None:
    for run_id in ("a", "b"):
        await story.accept(request(run_id))
        await story.start()
        await story.finish(ended(FIRST, *await keep(story, FIRST, FIRST)))
    assert len(await answers(story)) == 2
    assert len(await answers(story, max_bytes=5 * len(FIRST.text))) == 1


async def test_only_the_active_attempt_keeps_parts(story: Story) -> None:
    await story.accept(request("r"))
    with pytest.raises(Stale):
        await story.store.keep_part(story.run_key("r"), 1, 0, SECOND)
    await story.start()
    await keep(story, SECOND, SECOND)
    await story.lose_node()
    await story.start()
    with pytest.raises(Stale):
        await story.store.keep_part(story.run_key("r"), 1, 2, SECOND)
    (place,) = await keep(story, THIRD, attempt=2)
    await story.finish(ended(FIRST, place))
    (message,) = await answers(story)
    assert message.parts == (FIRST, THIRD)
    with pytest.raises(Stale):
        await story.store.keep_part(story.run_key("r"), 2, 1, SECOND)


async def test_deleted_session_takes_its_kept_parts_along(story: Story) -> None:
    for _ in range(2):
        await story.accept(request("r" + str(story.now)))
        await story.start()
        await story.finish(ended(FIRST, *await keep(story, SECOND)))
        await story.remove()
        assert await story.store.stored_bytes(story.tenant) == 0


@pytest.mark.sqlite("reads the tables of the file")
async def test_check_counts_kept_parts_and_names_missing_ones(tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    async with SqliteStore(path) as store:
        story, gone = Story(store), Story(store, "gone")
        for one in (story, gone):
            await one.accept(request(one.session_id))
            await one.start()
            await keep(one, SECOND)
            await one.lose_node()
            await one.start()
            await one.finish(ended(FIRST, *await keep(one, SECOND, THIRD, attempt=2)))
        await gone.remove()
    assert check(path).problems == ()
    with closing(sqlite3.connect(path)) as db, db:
        rows = db.execute("SELECT run_id, attempt, n FROM kept_parts ORDER BY n").fetchall()
        assert rows == [("session", 2, 0), ("session", 2, 1)]
        db.execute("DELETE FROM kept_parts WHERE n = 1")
    assert any("part 1 of attempt 2 is not there" in line for line in check(path).problems)
    async with SqliteStore(path) as store:
        await _reads_placeholder(store, story.key)


async def _reads_placeholder(store: Store, key: SessionKey) -> None:
    page = await store.list_messages(key, limit=MANY, max_bytes=PLENTY)
    (part,) = page.items[-1].parts
    assert isinstance(part, Text)
    assert "CORRUPT_RECORD" in part.text
