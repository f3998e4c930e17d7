"""The properties that only the SQLite store has."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from runlane_server.core import lane as rules
from runlane_server.core.errors import StartError, StoreUnavailable
from runlane_server.core.model import Attachment, RunEvent, RunKey, RunState, SessionKey, TextDelta
from runlane_server.store.base import (
    EventFilter,
    NewSession,
    RunIdTaken,
    SessionTaken,
    Stale,
    StoreError,
)
from runlane_server.store.lookup import RunFilter, RunOrder, SessionFilter, Span
from runlane_server.store.lookup_sql import Lookup, runs, sessions
from runlane_server.store.sqlfiles import migrations, statements
from runlane_server.store.sqlite import store as sqlite
from runlane_server.store.sqlite.connection import SqliteConnection
from runlane_server.store.sqlite.file import APPLICATION_ID
from runlane_server.store.sqlite.lists import DIALECT
from runlane_server.store.sqlite.store import SqliteStore
from runlane_server.store.webhooks import Most, Webhook, WebhookFilter, WebhookKey
from support.story import MANY, PLENTY, START, TENANT, Story, Witness, answer, request

SQL = statements("sqlite")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runlane.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    async with SqliteStore(path) as opened:
        yield opened


def writing(store: SqliteStore) -> SqliteConnection:
    """The write connection."""
    assert store._open is not None
    return store._open.writer


async def commits(store: SqliteStore) -> list[str]:
    """A list that every COMMIT from now on is added to."""
    seen: list[str] = []

    def trace(sql: str) -> None:
        if sql.startswith(("COMMIT", "ROLLBACK")) and "TO" not in sql:
            seen.append(sql)

    await writing(store).set_trace_callback(trace)
    return seen


# --- Group commit -------------------------------------------------------------------------------


async def test_commits_of_many_are_one(store: SqliteStore) -> None:
    seen = await commits(store)
    await asyncio.gather(*(Story(store, f"s{n}").accept(f"r{n}") for n in range(200)))
    assert 1 <= len(seen) <= 3
    assert len((await store.list_runs(TENANT, limit=MANY)).items) == 200


async def test_refused_units_of_a_batch_fail_alone(store: SqliteStore) -> None:
    witness = store.listener = Witness()
    holder, taken, stale, fenced, created = (
        Story(store, name) for name in ("holder", "taken", "stale", "fenced", "created")
    )
    await holder.accept("held")
    await stale.accept("old")
    stale.lane = rules.dispatch(stale.lane, at=1).at_version(7).lane
    await fenced.accept("f")
    await store.create_session(NewSession(created.key, START))
    good = [Story(store, f"good{n}") for n in range(10)]
    for story in good:
        await story.accept(f"{story.session_id}-0")
        await story.start()
    seen = await commits(store)
    results = await asyncio.gather(
        *(story.finish() for story in good[:5]),
        taken.accept("held"),
        stale.finish(),
        store.append(fenced.run_key("f"), 1, [RunEvent("f", 2, 1, TextDelta("x"))]),
        store.create_session(NewSession(created.key, START)),
        *(story.append(TextDelta("x")) for story in good[5:]),
        return_exceptions=True,
    )
    refused = [result for result in results if isinstance(result, BaseException)]
    assert [type(error) for error in refused] == [RunIdTaken, Stale, Stale, SessionTaken]
    assert results[5:9] == refused
    assert seen == ["ROLLBACK", "COMMIT"]
    assert [event.position for event in witness.log] == [1, 2, 3, 4, 5]
    for story in good:
        assert await store.load_lane(story.key) == story.lane
    assert await store.get_session(taken.key) is None


async def test_unit_that_cannot_be_bound_fails_alone(store: SqliteStore) -> None:
    wrong = NewSession(SessionKey(TENANT, "wrong"), created_at=1 << 80)
    story = Story(store)
    results = await asyncio.gather(
        store.create_session(wrong), story.accept("a"), return_exceptions=True
    )
    assert isinstance(results[0], OverflowError)
    assert results[1] is None
    assert store.failed is None
    assert await store.load_lane(story.key) == story.lane


async def test_two_changes_of_a_lane_keep_their_order(store: SqliteStore) -> None:
    story = Story(store)
    first = story.accepting(request("a")).at_version(1)
    second = rules.dispatch(first.lane, at=5).at_version(2)
    seen = await commits(store)
    said = [RunEvent("a", 3, 6, TextDelta("x"))]
    await asyncio.gather(
        store.commit(0, first),
        store.commit(1, second),
        store.append(RunKey(TENANT, "a"), 1, said),
        store.compact(START, 5),
    )
    assert seen == ["COMMIT"] * 4
    assert (await store.load_lane(story.key)).version == 2


async def test_listener_that_fails_does_not_fail_the_write(store: SqliteStore) -> None:
    class Broken(Witness):
        def on_run_events(self, key: RunKey, events: object) -> None:
            raise RuntimeError("broken")

    store.listener = Broken()
    story = Story(store)
    await story.play("a")
    assert store.failed is None
    assert await store.load_lane(story.key) == story.lane


# --- The file -----------------------------------------------------------------------------------


async def test_writes_are_synced(store: SqliteStore) -> None:
    assert store._open is not None

    def settings(db: sqlite3.Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "wal_autocheckpoint", "query_only")
        return [db.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    assert await store._open.writer.work(settings) == ["wal", 2, 4_000, 0]
    assert (await store._open.reader.work(settings))[2:] == [0, 1]


async def test_reopened_file_has_everything(path: Path) -> None:
    async with SqliteStore(path) as store:
        assert store.position == 0
        story = Story(store)
        store_id = store.store_id
        ends = [await story.play(f"r{n}") for n in range(3)]
        await story.accept("a", "b")
        await story.start()
        await story.append(TextDelta("x"))
        await store.compact(ends[0].ended_at + 1, 9)
    assert not path.with_name("runlane.db-wal").exists()
    async with SqliteStore(path) as store:
        assert (store.store_id, store.position, store.compacted) == (store_id, 3, 1)
        assert await store.load_lane(story.key) == story.lane
        page = await store.completes(TENANT, EventFilter(), after=1, limit=9, max_bytes=PLENTY)
        assert [event.complete for event in page.events] == ends[1:]
        await store.compact(1 << 62, 9)
    async with SqliteStore(path) as store:  # an empty log still knows where it was
        assert (store.position, store.compacted) == (3, 3)


async def test_unclosed_file_has_what_was_answered(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    async with SqliteStore(path) as store:
        story = Story(store)
        await story.play("a")
        for suffix in ("", "-wal"):
            write(copy.with_name(copy.name + suffix), read(path.with_name(path.name + suffix)))
    async with SqliteStore(copy) as store:
        assert await store.load_lane(story.key) == story.lane
        assert store.position == 1


async def test_migrations_are_done_once(path: Path) -> None:
    async with SqliteStore(path):
        pass

    def schema() -> list[object]:
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
            assert db.execute("PRAGMA user_version").fetchone()[0] == len(migrations("sqlite"))
            return db.execute("SELECT sql FROM sqlite_master").fetchall()

    first = schema()
    async with SqliteStore(path):
        pass
    assert schema() == first


BEFORE_REMOVALS = """
    DROP TRIGGER hold_removed_id;
    DROP TRIGGER delete_copy;
    DROP TRIGGER delete_unfinished_copy;
    DROP TABLE removals;
    DROP TABLE dropped_copies;
"""
"""Takes most of the steps from 18 on of the schema back; `BEFORE_FORKS` has the rest."""

BEFORE_WEBHOOKS_OF_RUNS = f"""
    {BEFORE_REMOVALS}
    DROP INDEX webhooks_of_run;
    ALTER TABLE webhooks DROP COLUMN run_id;
"""
"""Takes the steps from 17 on of the schema back."""

BEFORE_FORKS = f"""
    {BEFORE_WEBHOOKS_OF_RUNS}
    DROP INDEX sessions_by_copy;
    ALTER TABLE sessions DROP COLUMN origin_id;
    ALTER TABLE sessions DROP COLUMN origin_turn;
    ALTER TABLE sessions DROP COLUMN copy_id;
    DROP TABLE copied_messages;
    DROP TABLE copied_attachments;
    DROP TABLE copied_parts;
    DROP TABLE unfinished_copies;
"""
"""Takes the steps from 16 on of the schema back."""

BEFORE_LOOKUP = f"""
    {BEFORE_FORKS}
    ALTER TABLE runs DROP COLUMN revision;
    ALTER TABLE runs DROP COLUMN last_update;
    DROP TRIGGER label_run;
    DROP TRIGGER unlabel_run;
    DROP TRIGGER relabel_run;
    DROP TRIGGER label_session;
    DROP TRIGGER unlabel_session;
    DROP TRIGGER relabel_session;
    DROP TABLE run_labels;
    DROP TABLE session_labels;
    DROP INDEX runs_by_agent;
    DROP INDEX runs_by_accepted;
    DROP INDEX runs_by_ended;
    DROP INDEX sessions_by_agent;
    DROP INDEX sessions_by_created;
    DROP INDEX sessions_busy;
"""
"""Takes the steps from 14 on of the schema back."""


async def test_migration_finds_the_labels_of_before(path: Path) -> None:
    labels = {"k": "v", "é": 'a"b'}
    async with SqliteStore(path) as store:
        await Story(store).play(request("a")._replace(metadata=labels))
        await store.create_session(NewSession(SessionKey(TENANT, "new"), START, metadata=labels))
    with closing(sqlite3.connect(path)) as db:
        db.executescript(BEFORE_LOOKUP + "PRAGMA user_version = 13")
    async with SqliteStore(path) as store:
        runs = await store.list_runs(TENANT, RunFilter(labels=labels), limit=5)
        assert [run.run_id for run in runs.items] == ["a"]
        sessions = await store.list_sessions(TENANT, SessionFilter(labels=labels), limit=5)
        assert [session.session_id for session in sessions.items] == ["new"]


async def test_migration_counts_bytes_stored_before(path: Path) -> None:
    async with SqliteStore(path) as store:
        story = Story(store)
        attachments = (Attachment("a", "", "é" * 9), Attachment("b", "", b"1" * 7))
        await story.play(request("a", "é" * 3_000, *attachments), answer("ü" * 500))
        await story.accept("waits")
        await store.create_session(NewSession(SessionKey("tenant", "empty"), START))
        counted = await store.stored_bytes("tenant")
        assert counted > 6_000 + 25 + 1_000
    with closing(sqlite3.connect(path)) as db:
        db.executescript(BEFORE_LOOKUP)
        db.execute("ALTER TABLE sessions DROP COLUMN stored_bytes")
        db.execute("ALTER TABLE runs DROP COLUMN trace")
        db.execute("ALTER TABLE runs DROP COLUMN asking")
        db.execute("DROP TABLE input_requests")
        db.execute("DROP TABLE webhooks")
        db.execute("ALTER TABLE runs DROP COLUMN retry")
        db.execute("ALTER TABLE runs DROP COLUMN agent")
        db.execute("ALTER TABLE sessions DROP COLUMN agent")
        db.execute("DROP TABLE deleted_runs")
        db.execute("DROP INDEX events_by_tenant")
        db.execute("DROP TABLE tenant_logs")
        db.execute("DROP TABLE kept_parts")
        db.execute("DROP TABLE lane_events")
        db.execute("INSERT INTO meta VALUES ('compacted_bytes', 0)")
        db.commit()
        db.execute("PRAGMA user_version = 2")
    async with SqliteStore(path) as store:
        assert await store.stored_bytes("tenant") == counted
        # Nor were there traces, and agents had no names.
        unnamed = tuple(run._replace(agent="") for run in story.lane.waiting)
        assert await store.load_lane(story.key) == story.lane._replace(waiting=unnamed)


async def test_stored_bytes_are_summed_up_piece_by_piece(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SqliteStore(path) as store:
        for n in range(7):
            await Story(store, f"s{n}").play(f"r{n}")
            await Story(store, f"s{n}", tenant="another").accept(f"r{n}")
        whole = await store.stored_bytes("tenant")
        for pieces in (1, 3, 7, 8):
            monkeypatch.setattr(sqlite, "SESSIONS_PER_READ", pieces)
            assert await store.stored_bytes("tenant") == whole


def read(path: Path) -> bytes:
    """The bytes of a file."""
    return path.read_bytes()


def write(path: Path, content: bytes) -> None:
    """Puts those bytes into a file."""
    path.write_bytes(content)


async def refusal(path: Path) -> str:
    """Why the file is refused."""
    with pytest.raises(StartError) as caught:
        async with SqliteStore(path):
            pass
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


async def test_foreign_file_is_refused_and_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE sessions (x)")
    before = read(path)
    assert "database of another program" in await refusal(path)
    assert read(path) == before


async def test_newer_schema_is_refused(path: Path) -> None:
    async with SqliteStore(path):
        pass
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 999")
    known = len(migrations("sqlite"))
    assert f"a newer Runlane wrote it (schema 999, known {known})" in await refusal(path)


async def test_file_that_is_no_database_is_refused(path: Path) -> None:
    write(path, b"no database at all, but long enough to be read as one" * 100)
    assert "not a database" in await refusal(path)


async def test_damaged_file_is_refused(path: Path) -> None:
    async with SqliteStore(path):
        pass
    content = read(path)
    write(path, content[:4096] + b"\xff" * (len(content) - 4096))
    assert "malformed" in await refusal(path)


async def test_directory_is_refused(tmp_path: Path) -> None:
    assert "is a directory" in await refusal(tmp_path)
    assert "does not exist" in await refusal(tmp_path / "none" / "runlane.db")


async def test_place_that_cannot_be_written_is_refused() -> None:
    await refusal(Path("/proc/runlane.db"))  # not even root can


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any file")
async def test_file_that_cannot_be_written_is_refused(path: Path) -> None:
    async with SqliteStore(path):
        pass
    Path.chmod(path, 0o400)
    assert "readonly" in await refusal(path)


async def test_second_server_is_refused(path: Path) -> None:
    async with SqliteStore(path) as store:
        assert f"in use by another server (process {os.getpid()})" in await refusal(path)
        await Story(store).play("a")  # the first one does not notice
    async with SqliteStore(path) as store:
        assert store.position == 1


async def test_closed_store_says_so(path: Path) -> None:
    store = SqliteStore(path)
    with pytest.raises(StoreUnavailable):
        await store.get_session(SessionKey(TENANT, "s"))
    async with store:
        waiting = [asyncio.create_task(Story(store, f"s{n}").accept(f"r{n}")) for n in range(9)]
        await asyncio.sleep(0)
    assert await asyncio.gather(*waiting) == [None] * 9  # what was begun is finished
    with pytest.raises(StoreUnavailable):
        await Story(store, "late").accept("late")
    with pytest.raises(StoreUnavailable):
        await store.get_session(SessionKey(TENANT, "s"))


# --- The end of the writer ----------------------------------------------------------------------


async def test_full_disk_ends_the_writer(path: Path) -> None:
    failures: list[StoreError] = []
    async with SqliteStore(path) as store:
        store.on_failure = failures.append
        witness = store.listener = Witness()
        story = Story(store)
        await story.play("kept")
        told = len(witness.runs)

        def fill_up(db: sqlite3.Connection) -> None:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count = {pages}")

        await writing(store).work(fill_up)
        big = request("big", "x" * 100_000)
        others = [Story(store, f"s{n}") for n in range(5)]
        results = await asyncio.gather(
            story.accept(big),
            *(other.accept(other.session_id) for other in others),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [StoreUnavailable] * 6
        assert "outcome unknown; repeat the call with the same run id" in str(results[0])
        assert store.failed is not None
        assert failures == [store.failed]
        assert store.failed.message == "SQLITE_FULL: database or disk is full"
        for call in (
            Story(store, "later").accept("later"),
            store.compact(START, 1),
            store.get_session(story.key),
        ):
            with pytest.raises(StoreUnavailable):
                await call
        assert len(failures) == 1
        assert len(witness.runs) == told
    async with SqliteStore(path) as store:
        assert store.failed is None
        assert await store.load_lane(story.key) == story.lane
        await Story(store, "later").play("later")
        assert store.position == 2


# --- How it reads -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SQL))
def test_no_statement_numbers_its_parameters(name: str) -> None:
    # Python 3.14 refuses to bind a sequence to them.
    assert re.search(r"\?\d", SQL[name]) is None


@pytest.mark.parametrize("name", sorted(SQL))
async def test_no_statement_walks_a_table(store: SqliteStore, name: str) -> None:
    allowed = {
        "copy_attachments": ["SCAN piece"],  # the one row of its parameters
        "copy_copied_attachments": ["SCAN piece"],
        "copy_copied_messages": ["SCAN piece"],
        "copy_messages": ["SCAN piece"],
        "drop_copies": ["SCAN unfinished_copies"],  # once, at the start
        "busy_sessions": ["SCAN runs USING INDEX runs_open"],  # open runs only
        "every_webhook": ["SCAN webhooks"],  # at most 100 of a tenant
        "insert_event": ["SCAN ended"],  # the one row of its parameters
        "insert_input": ["SCAN one"],  # the one row of its parameters
        "log_sizes": ["SCAN names", "SCAN names"],  # of tenants, each found by a seek
        "has_removals": ["SCAN removals", "SCAN dropped_copies"],  # one row of each
        "oldest_dropped_copy": ["SCAN dropped_copies"],  # from its beginning, and only one of it
        "oldest_removal": ["SCAN removals"],
        "oldest_event": ["SCAN events"],  # from its beginning, and only one of it
        "stored_bytes": ["SCAN (subquery-1)"],  # a piece of them, which a seek has found
        "tenant_logs": ["SCAN tenant_logs"],  # once, at the start
    }

    def plan(db: sqlite3.Connection) -> list[str]:
        statement = f"EXPLAIN QUERY PLAN {SQL[name]}"
        named = dict.fromkeys(PARAMETERS, "1")
        parameters = "1" * SQL[name].count("?") or named
        return [row["detail"] for row in db.execute(statement, parameters)]

    assert store._open is not None
    steps = await store._open.reader.work(plan)
    walks = [
        step
        for step in steps
        if step.startswith("SCAN") and "json_each" not in step and "CONSTANT ROW" not in step
    ]
    assert walks == allowed.get(name, [])
    if not name.startswith(("lane_runs", "busy", "open_runs", "insert", "append")):
        assert not [step for step in steps if "TEMP B-TREE" in step]


PARAMETERS = {
    word.strip(":,()\n ;")
    for sql in SQL.values()
    for word in sql.replace("(", " ").replace(")", " ").replace(",", " ").split()
    if word.startswith(":")
}


async def test_a_page_of_one_tenant_reads_no_event_of_another(path: Path) -> None:
    async with SqliteStore(path):
        pass
    with closing(sqlite3.connect(path)) as db:
        values = {"tenant": "quiet", "after": 0, "known": 10, "limit": 257}
        plan = db.execute(f"EXPLAIN QUERY PLAN {SQL['events']}", values).fetchall()
    (step,) = (row[3] for row in plan)
    assert "events_by_tenant (tenant=? AND position>? AND position<?)" in step


def lookups() -> Iterator[tuple[object, Lookup]]:
    """The statements of lists for each index, alone and with conditions on rows."""
    span = Span(1, 9)
    alone = [
        RunFilter(),
        RunFilter("s"),
        RunFilter(agent="a"),
        RunFilter(labels={"k": "v"}),
        RunFilter(accepted=span),
        RunFilter(ended=span, order=RunOrder.LATEST_ENDED),
        RunFilter(states=frozenset({RunState.FAILED})),
        RunFilter(states=frozenset({RunState.ACTIVE})),
    ]
    for one in alone:
        for order in (one.order, RunOrder.EARLIEST_ACCEPTED, RunOrder.EARLIEST_ENDED):
            for labels in (one.labels, {"k": "v", "l": "w"}):
                wanted = replace(one, order=order, labels=labels)
                yield wanted, runs(DIALECT, TENANT, wanted)
    for session in (
        SessionFilter(),
        SessionFilter(agent="a"),
        SessionFilter(busy=True),
        SessionFilter(busy=False),
        SessionFilter(created=span),
        SessionFilter(labels={"k": "v"}),
    ):
        yield session, sessions(DIALECT, TENANT, session)


async def test_no_list_walks_or_sorts_a_table(path: Path) -> None:
    async with SqliteStore(path):
        pass
    with closing(sqlite3.connect(path)) as db:
        for wanted, lookup in lookups():
            for statement in (lookup.page((3, 4), 50), lookup.last_read(None), lookup.count()):
                named = {f"p{n}": value for n, value in enumerate(statement.args, start=1)}
                explained = db.execute(f"EXPLAIN QUERY PLAN {statement.sql}", named)
                plan = [row[3] for row in explained]
                walks = [step for step in plan if step.startswith("SCAN ")]
                of_rows = {"SCAN found", "SCAN part", "SCAN CONSTANT ROW"}
                assert {step for step in walks if "json_each" not in step} <= of_rows, wanted
                sorts = [step for step in plan if "TEMP B-TREE" in step]
                merges = any("runs_open" in step or "MERGE" in step for step in plan)
                assert not sorts or merges, (wanted, plan)
                driver = next(step for step in plan if step.startswith("SEARCH"))
                assert "tenant=?" in driver, (wanted, plan)


@pytest.mark.parametrize("column", ["settings", "secrets", "progress", "created_at", "fence"])
@pytest.mark.parametrize("value", ["word", "{}", "[1]", b"\xff", 1.5])
async def test_a_damaged_webhook_says_so_and_can_be_deleted(
    store: SqliteStore, column: str, value: object
) -> None:
    keys = [WebhookKey(TENANT, name) for name in ("good", "bad")]
    for key in keys:
        url = "https://example.org/"
        await store.webhooks.create(
            Webhook(key, url, ("s",), WebhookFilter(), False, True, 1, 1), most=Most(100, 100)
        )

    def damage(db: sqlite3.Connection) -> None:
        statement = f"UPDATE webhooks SET {column} = ? WHERE webhook_id = 'bad'"  # noqa: S608
        db.execute(statement, (value,))

    await writing(store).work(damage)
    good, bad = [await store.webhooks.get(key) for key in keys]
    assert good is not None
    assert bad is not None
    assert (good.progress.disabled, bad.progress.disabled[:14]) == ("", "CORRUPT_RECORD")
    assert len((await store.webhooks.list(TENANT, after=None, limit=9)).items) == 2
    assert len(await store.webhooks.lease("node", 60, 9)) == 2
    assert await store.webhooks.delete(keys[1])


async def test_session_with_a_damaged_copy_number_can_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    async with SqliteStore(path) as store:
        story = Story(store)
        await story.play("r")
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE sessions SET copy_id = 'word'")
        await story.remove()
        assert await store.get_session(story.key) is None
