"""How reads share a hop to the reader's thread."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runlane_server.store.sqlite import queries
from runlane_server.store.sqlite import reader as reader_module
from runlane_server.store.sqlite.connection import SqliteConnection
from runlane_server.store.sqlite.reader import MAX_SHARED, SqliteReader
from runlane_server.store.sqlite.store import SqliteStore
from support.story import Story


class Gate:
    """A read that lasts until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def __call__(self, _: sqlite3.Connection) -> str:
        self.entered.set()
        assert self.let_go.wait(10)
        return "gate"


@pytest.fixture
async def connection(tmp_path: Path) -> AsyncIterator[SqliteConnection]:
    async with SqliteConnection(tmp_path / "any.db") as opened:
        yield opened


@pytest.fixture
async def hops(connection: SqliteConnection) -> list[str]:
    """A list that each transaction from now on is added to."""
    seen: list[str] = []

    def trace(sql: str) -> None:
        if sql == "BEGIN":
            seen.append(sql)

    await connection.set_trace_callback(trace)
    return seen


async def behind_a_gate(reader: SqliteReader) -> tuple[Gate, asyncio.Task[str]]:
    """A hop that is under way until its gate opens."""
    gate = Gate()
    first = asyncio.create_task(reader.look_up(gate))
    assert await asyncio.to_thread(gate.entered.wait, 10)
    return gate, first


def value(_: sqlite3.Connection, wanted: object) -> object:
    return wanted


def failing(db: sqlite3.Connection) -> None:
    db.execute("SELECT * FROM nothing")


async def test_what_waits_shares_a_hop(connection: SqliteConnection, hops: list[str]) -> None:
    reader = SqliteReader(connection)
    gate, first = await behind_a_gate(reader)
    more = [asyncio.create_task(reader.look_up(value, n)) for n in range(MAX_SHARED + 1)]
    await asyncio.sleep(0)
    gate.let_go.set()
    assert await first == "gate"
    assert await asyncio.gather(*more) == [*range(MAX_SHARED + 1)]
    assert len(hops) == 3
    assert await reader.look_up(value, "later") == "later"


async def test_long_look_ups_end_a_hop_and_keep_their_order(
    connection: SqliteConnection, hops: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "HOP_SECONDS", 0.0)
    made: list[str] = []

    def read(_: sqlite3.Connection, tenant: str, n: int) -> None:
        made.append(f"{tenant}{n}")

    reader = SqliteReader(connection)
    gate, first = await behind_a_gate(reader)
    wanted = [*(("a", n) for n in range(3)), ("b", 0), ("b", 1)]
    more = [asyncio.create_task(reader.look_up(read, *each)) for each in wanted]
    await asyncio.sleep(0)
    gate.let_go.set()
    await first
    await reader.close()
    await asyncio.gather(*more)
    assert [it for it in made if it[0] == "a"] == ["a0", "a1", "a2"]
    assert [it for it in made if it[0] == "b"] == ["b0", "b1"]
    assert made.index("b0") < 2
    assert len(hops) == 6


async def test_page_has_a_hop_to_itself(connection: SqliteConnection, hops: list[str]) -> None:
    reader = SqliteReader(connection)
    gate, first = await behind_a_gate(reader)
    reads = (reader.look_up, reader.look_up, reader.page, reader.page, reader.look_up)
    more = [asyncio.create_task(read(value, n)) for n, read in enumerate(reads)]
    await asyncio.sleep(0)
    gate.let_go.set()
    assert await asyncio.gather(first, *more) == ["gate", 0, 1, 2, 3, 4]
    assert len(hops) == 5


async def test_read_that_fails_fails_alone(connection: SqliteConnection, hops: list[str]) -> None:
    reader = SqliteReader(connection)
    gate, first = await behind_a_gate(reader)
    more = [
        asyncio.create_task(reader.look_up(value, 1)),
        asyncio.create_task(reader.look_up(failing)),
        asyncio.create_task(reader.look_up(value, 2)),
    ]
    await asyncio.sleep(0)
    gate.let_go.set()
    results = await asyncio.gather(first, *more, return_exceptions=True)
    assert isinstance(results.pop(2), sqlite3.OperationalError)
    assert results == ["gate", 1, 2]
    assert len(hops) == 2


async def test_cancel_ends_the_wait_alone(connection: SqliteConnection) -> None:
    reader = SqliteReader(connection)
    gate, first = await behind_a_gate(reader)
    more = [asyncio.create_task(reader.look_up(value, n)) for n in range(3)]
    await asyncio.sleep(0)
    first.cancel()
    more[1].cancel()
    gate.let_go.set()
    results = await asyncio.gather(first, *more, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert isinstance(results[2], asyncio.CancelledError)
    assert (results[1], results[3]) == (0, 2)


async def test_a_read_whose_caller_has_left_is_not_made(
    connection: SqliteConnection, hops: list[str]
) -> None:
    made: list[int] = []

    def read(_: sqlite3.Connection, n: int) -> int:
        made.append(n)
        return n

    reader = SqliteReader(connection)
    gate, first = await behind_a_gate(reader)
    reads = (reader.look_up, reader.page, reader.page, reader.look_up, reader.page)
    more = [asyncio.create_task(each(read, n)) for n, each in enumerate(reads)]
    await asyncio.sleep(0)
    for n in (0, 1, 4):
        more[n].cancel()
    gate.let_go.set()
    await asyncio.gather(first, *more, return_exceptions=True)
    assert made == [2, 3]
    # With only such reads left, there is no hop.
    before = len(hops)
    gate, first = await behind_a_gate(reader)
    left = asyncio.create_task(reader.page(read, 9))
    await asyncio.sleep(0)
    left.cancel()
    gate.let_go.set()
    assert await first == "gate"
    await reader.close()
    assert (made, len(hops)) == ([2, 3], before + 1)


async def test_close_waits_for_what_was_begun(connection: SqliteConnection) -> None:
    reader = SqliteReader(connection)
    gate, first = await behind_a_gate(reader)
    more = [asyncio.create_task(reader.page(value, n)) for n in range(3)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(reader.close())
    await asyncio.sleep(0)
    assert not closing.done()
    gate.let_go.set()
    await closing
    assert await asyncio.gather(first, *more) == ["gate", 0, 1, 2]
    await reader.close()


async def test_closing_store_answers_reads(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "runlane.db") as store:
        stories = [Story(store, f"s{n}") for n in range(9)]
        await asyncio.gather(*(story.accept(story.session_id) for story in stories))
        reading = [asyncio.create_task(store.load_lane(story.key)) for story in stories]
        await asyncio.sleep(0)
    assert await asyncio.gather(*reading) == [story.lane for story in stories]


async def test_reads_of_a_hop_see_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first lookup takes as long as a commit; the second belongs to its hop in any case.
    monkeypatch.setattr(reader_module, "HOP_SECONDS", 10.0)
    async with SqliteStore(tmp_path / "runlane.db") as store:
        story = Story(store)
        await story.accept("a")
        assert store._open is not None
        reader = SqliteReader(store._open.reader)
        gate, first = await behind_a_gate(reader)
        entered, let_go = Gate(), Gate()

        def pausing(db: sqlite3.Connection) -> int:
            version = queries.lane(db, story.key).version
            entered.entered.set()
            assert let_go.let_go.wait(10)
            return version

        more = [
            asyncio.create_task(reader.look_up(pausing)),
            asyncio.create_task(reader.look_up(lambda db: queries.lane(db, story.key).version)),
        ]
        await asyncio.sleep(0)
        gate.let_go.set()
        assert await asyncio.to_thread(entered.entered.wait, 10)
        await story.accept("b")
        let_go.let_go.set()
        assert await asyncio.gather(first, *more) == ["gate", 1, 1]
        assert await reader.look_up(lambda db: queries.lane(db, story.key).version) == 2


async def test_tenants_take_turns_at_the_reader(connection: SqliteConnection) -> None:
    reader = SqliteReader(connection)
    made: list[str] = []

    def page(_: sqlite3.Connection, tenant: str) -> None:
        made.append(tenant)

    gate, first = await behind_a_gate(reader)
    noisy = [asyncio.create_task(reader.page(page, "noisy")) for _ in range(100)]
    await asyncio.sleep(0)
    quiet = [asyncio.create_task(reader.page(page, "quiet")) for _ in range(2)]
    await asyncio.sleep(0)
    gate.let_go.set()
    await asyncio.gather(first, *noisy, *quiet)
    assert made[:4] == ["noisy", "quiet", "noisy", "quiet"]
    assert len(made) == 102


async def test_a_read_whose_caller_has_gone_away_is_not_made(connection: SqliteConnection) -> None:
    reader = SqliteReader(connection)
    made: list[str] = []

    def page(_: sqlite3.Connection, tenant: str) -> None:
        made.append(tenant)

    gate, first = await behind_a_gate(reader)
    gone = [asyncio.create_task(reader.page(page, "noisy")) for _ in range(100)]
    await asyncio.sleep(0)
    for task in gone:
        task.cancel()
    await asyncio.wait(gone)
    stays = asyncio.create_task(reader.look_up(page, "quiet"))
    await asyncio.sleep(0)
    gate.let_go.set()
    await asyncio.gather(first, stays)
    assert made == ["quiet"]
    await reader.close()
