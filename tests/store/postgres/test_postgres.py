"""The PostgreSQL store beyond the contract: many nodes over one database."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from runlane_server.core import lane as rules
from runlane_server.core.errors import StartError
from runlane_server.core.model import (
    Attachment,
    CancelScope,
    FinishReason,
    Prompt,
    Role,
    RunError,
    RunRequest,
    RunState,
    SessionKey,
    Text,
    TextDelta,
    Usage,
)
from runlane_server.core.transition import Outcome
from runlane_server.core.turn import DraftMessage
from runlane_server.store.base import (
    EventFilter,
    LoggedComplete,
    NewSession,
    RunIdTaken,
    Stale,
    Store,
)
from runlane_server.store.lookup import RunFilter, RunOrder, SessionFilter, Span
from runlane_server.store.lookup_sql import Lookup, runs, sessions
from runlane_server.store.postgres import log as postgres_log
from runlane_server.store.postgres import store as store_module
from runlane_server.store.postgres.connection import Connector
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.lists import DIALECT
from runlane_server.store.postgres.pool import MOST_CONNECTIONS
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.store import PostgresStore
from runlane_server.store.postgres.text import escape, unescape
from runlane_server.store.sqlfiles import migrations
from support.postgres import Connection, listening, postgres_store, until_blocked
from support.story import MANY, PLENTY, START, TENANT, Story, Witness, answer, request

SECONDS = 60.0
TESTS = Path(__file__).parents[2]


@pytest.fixture
async def nodes(postgres_url: str) -> AsyncIterator[list[PostgresStore]]:
    """Three nodes over one database, each with a listener."""
    async with AsyncExitStack() as closing:
        opened = []
        for _ in range(3):
            store = await closing.enter_async_context(postgres_store(postgres_url))
            store.listener = Witness()
            opened.append(store)
        yield opened


def told(store: Store) -> list[LoggedComplete]:
    """The records that the listener of a node received."""
    assert isinstance(store.listener, Witness)
    return store.listener.log


async def until_told(store: Store, count: int) -> list[LoggedComplete]:
    """The records that a node received, once there are this many."""
    async with asyncio.timeout(SECONDS):
        while len(told(store)) < count:
            await asyncio.sleep(0.001)
    return told(store)


# --- The URL ------------------------------------------------------------------------------------


def test_url_names_a_schema_and_hides_the_password() -> None:
    url = "postgresql://me:hunter2@a:1,b:2/db?sslmode=require&schema=other"
    database = Database.parse(url)
    assert database.schema == "other"
    assert database.dsn == "postgresql://me:hunter2@a:1,b:2/db?sslmode=require"
    assert database.label == "postgresql://a:1,b:2/db schema other"
    assert Database.parse("postgresql://h/d").schema == "runlane"
    for bad in ("a-b", 'a"b', "", "x" * 51, "1a"):
        with pytest.raises(StartError, match="schema"):
            Database.parse(f"postgresql://h/d?schema={bad}")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://[",
        "postgresql://me:hunter2@\u2100/a",
        "postgresql://h/d?password=hunter2\udcff",
    ],
)
def test_error_for_a_bad_url_does_not_quote_it(url: str) -> None:
    with pytest.raises(StartError) as refused:
        Database.parse(url)
    assert str(refused.value) == "--store: the value is not a valid URL"


@pytest.mark.parametrize("text", ["", "plain", "\0", "\1", "a\0\1b", "\1\2\1\3", "\0\2", "\1\1\0"])
def test_text_with_a_nul_is_kept(text: str) -> None:
    kept = escape(text)
    assert "\0" not in kept
    assert unescape(kept) == text


def test_no_two_texts_are_kept_alike() -> None:
    letters = ("", "\0", "\1", "\2", "\3")
    texts = {a + b + c for a in letters for b in letters for c in letters}
    assert len({escape(text) for text in texts}) == len(texts)


# --- Opening ------------------------------------------------------------------------------------


async def test_many_nodes_may_start_at_once(postgres_url: str, beside: Connection) -> None:
    stores = [postgres_store(postgres_url) for _ in range(6)]
    async with AsyncExitStack() as closing:
        await asyncio.gather(*(closing.enter_async_context(store) for store in stores))
        assert len({store.store_id for store in stores}) == 1
        applied = await beside.fetch("SELECT version FROM schema_versions ORDER BY 1")
        assert [row[0] for row in applied] == list(range(1, len(migrations("postgres")) + 1))
    async with postgres_store(postgres_url) as again:
        assert again.store_id
        await Story(again).play("a")


async def test_newer_schema_is_refused(postgres_url: str, beside: Connection) -> None:
    async with postgres_store(postgres_url):
        pass
    await beside.execute("INSERT INTO schema_versions (version) VALUES (99)")
    with pytest.raises(StartError, match=r"newer Runlane wrote it \(schema 99"):
        await postgres_store(postgres_url).__aenter__()


async def test_tables_of_another_program_are_left_alone(
    postgres_url: str, beside: Connection
) -> None:
    schema = Database.parse(postgres_url).schema
    await beside.execute(f"CREATE SCHEMA {schema}; CREATE TABLE sessions (mine text)")
    with pytest.raises(StartError, match="a table 'sessions' of another program"):
        await postgres_store(postgres_url).__aenter__()
    assert await beside.fetchval("SELECT count(*) FROM sessions") == 0


@pytest.fixture
async def databases(postgres_server: str) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """Makes a database with those options; returns its URL."""
    connection = await asyncpg.connect(postgres_server)
    made: list[str] = []

    async def make(options: str) -> str:
        made.append(f"test_{secrets.token_hex(6)}")
        await connection.execute(f"CREATE DATABASE {made[-1]} TEMPLATE template0 {options}")
        return urlsplit(postgres_server)._replace(path=f"/{made[-1]}").geturl()

    yield make
    for name in made:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


async def test_database_of_another_encoding_is_refused(
    databases: Callable[[str], Awaitable[str]],
) -> None:
    url = await databases("ENCODING 'LATIN1' LOCALE 'C'")
    with pytest.raises(StartError, match="the encoding is LATIN1"):
        await postgres_store(url).__aenter__()


@pytest.mark.parametrize(
    ("by_default", "used"), [("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")]
)
async def test_r01_confirmed_commit_is_on_disk(
    databases: Callable[[str], Awaitable[str]], by_default: str, used: str
) -> None:
    """The setting applies unless the database default is stricter."""
    url = await databases("")
    connection = await asyncpg.connect(url)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = {by_default}")
    await connection.close()
    async with postgres_store(url) as store:
        await Story(store).play("a")
        committers = store._open.writer._committers.values()
        writers = [it._connection for it in committers if it._connection is not None]
        assert len(writers) == 2  # of the accept and the end
        for writer in writers:
            assert await writer.fetchval("SHOW synchronous_commit") == used


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("postgresql://me:hunter2@/x?host=/no/such/folder", r"postgresql:///no/such/folder/x"),
        ("postgresql://me:hunter2@127.0.0.1:1/x", r"postgresql://127\.0\.0\.1:1/x"),
        ("postgresql://me:hunter2@127.0.0.1:port/x", r"postgresql://127\.0\.0\.1:port/x"),
    ],
)
async def test_database_that_cannot_be_reached_is_named(url: str, why: str) -> None:
    with pytest.raises(StartError, match=why) as raised:
        await postgres_store(url).__aenter__()
    assert "hunter2" not in str(raised.value)


# --- Versions -----------------------------------------------------------------------------------


async def test_r07_recreated_session_is_not_mistaken_for_the_removed_one(
    nodes: Sequence[PostgresStore],
) -> None:
    one, two, three = nodes
    old = Story(one)
    await old.accept("a")
    elsewhere = Story(two)
    elsewhere.lane = await two.load_lane(old.key)
    await elsewhere.cancel()
    await elsewhere.remove()
    anew = Story(two)
    await anew.accept("b")
    assert anew.lane.version == 3  # it goes on from the removed one
    with pytest.raises(Stale):
        await old.start()
    with pytest.raises(Stale):
        await old.cancel()
    await anew.accept("c")
    assert await two.load_lane(anew.key) == anew.lane
    assert await three.load_lane(anew.key) == anew.lane
    # All three go on with it.
    old.lane = await one.load_lane(old.key)
    await old.start()
    with pytest.raises(Stale):
        await anew.start()
    anew.lane = await two.load_lane(anew.key)
    await anew.finish()
    assert [(await node.get_session(old.key)) is not None for node in nodes] == [True] * 3


async def test_r07_versions_grow_over_many_lives(nodes: Sequence[PostgresStore]) -> None:
    one, two, _ = nodes
    last = 0
    for n in range(4):
        if n % 2:
            await one.create_session(NewSession(Story(one).key, START))
        else:
            await Story(one).accept(f"r{n}")
        version = (await two.load_lane(Story(two).key)).version
        assert version > last
        story = Story(one)
        story.lane = await one.load_lane(story.key)
        if story.lane.is_busy:
            await story.cancel()
        stale = await one.stale_sessions(1 << 62, 9)
        assert [it.version for it in stale] == [story.lane.version]
        last = (await two.load_lane(Story(two).key)).version
        await story.remove()


async def test_removed_sessions_are_forgotten_after_a_day(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    story = Story(nodes[0])
    for session_id in ("young", "old"):
        story = Story(nodes[0], session_id)
        await story.play(session_id)
        await story.remove()
    await nodes[0].compact(0, 9)
    assert await beside.fetchval("SELECT count(*) FROM removed_sessions") == 2
    await beside.execute(
        "UPDATE removed_sessions SET removed_at = now() - $1::interval WHERE session_id = 'old'",
        store_module.REMOVED_KEPT + timedelta(seconds=1),
    )
    await nodes[1].compact(0, 9)
    assert await beside.fetchval("SELECT session_id FROM removed_sessions") == "young"
    await story.play("again")
    assert await nodes[0].load_lane(story.key) == story.lane


# --- Many nodes write ---------------------------------------------------------------------------


async def test_r07_of_nodes_that_race_for_a_lane_one_wins(nodes: Sequence[PostgresStore]) -> None:
    first = Story(nodes[0])
    await first.accept("a")
    for n in range(10):
        rivals = [replace(first, store=node) for node in nodes]
        for rival in rivals:
            rival.lane = first.lane
        results = await asyncio.gather(
            *(rival.accept(f"r{n}-{k}") for k, rival in enumerate(rivals)), return_exceptions=True
        )
        assert [type(result) for result in results if result is not None] == [Stale, Stale]
        first.lane = rivals[results.index(None)].lane


async def test_r03_of_nodes_that_race_for_a_run_id_one_wins(nodes: Sequence[PostgresStore]) -> None:
    for n in range(10):
        stories = [Story(node, f"s{n}-{k}") for k, node in enumerate(nodes)]
        results = await asyncio.gather(
            *(story.accept(f"same{n}") for story in stories), return_exceptions=True
        )
        assert results.count(None) == 1
        assert [type(result) for result in results if result] == [RunIdTaken, RunIdTaken]


async def test_r09_append_of_a_node_that_loses_its_run_meanwhile_is_refused(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    """It waits for the commit that takes the run away, and finds it gone."""
    story = Story(nodes[0])
    await story.accept("a")
    await story.start()
    async with beside.transaction():
        await beside.execute("UPDATE runs SET state = 'accepted' WHERE run_id = 'a'")
        append = asyncio.create_task(story.append(TextDelta("late")))
        await until_blocked(beside)
        assert not append.done()
    with pytest.raises(Stale):
        await append
    assert (await nodes[1].load_lane(story.key)).runs[0].events == 2


async def test_refused_units_do_not_hold_up_the_others(nodes: Sequence[PostgresStore]) -> None:
    store = nodes[0]
    taken = [Story(store, f"taken{n}") for n in range(5)]
    for n, story in enumerate(taken):
        await story.accept(f"t{n}")
    results = await asyncio.gather(
        *(Story(store, f"taken{n}").accept(f"new{n}") for n in range(5)),
        *(Story(store, f"new{n}").accept(f"t{n}") for n in range(5)),
        *(Story(store, f"good{n}").accept(f"g{n}") for n in range(20)),
        return_exceptions=True,
    )
    assert [type(result) for result in results[:10]] == [Stale] * 5 + [RunIdTaken] * 5
    assert results[10:] == [None] * 20
    page = await store.list_runs(TENANT, limit=MANY)
    found = [run.run_id for run in reversed(page.items)]
    assert found[:5] == [f"t{n}" for n in range(5)]
    assert sorted(found[5:]) == sorted(f"g{n}" for n in range(20))


async def test_nodes_that_write_the_same_lanes_do_not_deadlock(
    postgres_url: str, beside: Connection
) -> None:
    async def deadlocks() -> int:
        await beside.execute("SELECT pg_stat_clear_snapshot()")
        count: int = await beside.fetchval(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        )
        return count

    before = await deadlocks()
    async with (
        postgres_store(postgres_url) as one,
        postgres_store(postgres_url) as two,
    ):
        stories = [Story(one, f"s{n:02}") for n in range(40)]
        await asyncio.gather(*(story.accept(story.session_id) for story in stories))
        for round_ in range(10):
            rivals = [replace(story, store=two) for story in stories]
            for rival, story in zip(rivals, stories, strict=True):
                rival.lane = story.lane
            await asyncio.gather(
                *(story.accept(f"a{round_}-{story.session_id}") for story in stories),
                *(rival.accept(f"b{round_}-{rival.session_id}") for rival in reversed(rivals)),
                return_exceptions=True,
            )
            for story in stories:
                story.lane = await one.load_lane(story.key)
    # A closed connection has reported its figures.
    assert await deadlocks() == before


# --- The event log ------------------------------------------------------------------------------


async def test_r25_every_node_receives_all_events_in_one_order(
    nodes: Sequence[PostgresStore],
) -> None:
    async def live(node: PostgresStore, name: str) -> None:
        story = Story(node, name)
        for n in range(20):
            complete = await story.play(f"{name}-{n}")
            assert told(node)[-1].position == node.position
            assert complete in [event.complete for event in told(node)]  # before it returned

    await asyncio.gather(*(live(node, f"n{k}-{j}") for k, node in enumerate(nodes) for j in (0, 1)))
    for node in nodes:
        await until_told(node, 120)
        assert [event.position for event in told(node)] == list(range(1, 121))
        assert told(node) == told(nodes[0])
        page = await node.completes(TENANT, EventFilter(), after=0, limit=MANY, max_bytes=PLENTY)
        assert list(page.events) == told(node)


async def test_r25_processes_write_and_readers_follow(
    postgres_url: str, beside: Connection
) -> None:
    """Several processes; and a reader that sees the log as it grows, and never a gap."""
    processes, sessions, runs = 3, 10, 6
    async with postgres_store(postgres_url):
        pass
    total = processes * (sessions * runs + runs)
    arguments = [str(number) for number in (sessions, runs, total)]
    started = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "store.node", postgres_url, f"p{n}", *arguments),
            cwd=TESTS,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for n in range(processes)
    ]
    seen: list[int] = []
    try:
        for process in started:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
        async with asyncio.timeout(SECONDS):
            while len(seen) < total:
                rows = await beside.fetch(
                    "SELECT position FROM events WHERE position > $1 ORDER BY position", len(seen)
                )
                seen += [row["position"] for row in rows]
                assert seen == list(range(1, len(seen) + 1))
            logs = [json.loads((await process.communicate())[0]) for process in started]
    finally:
        for process in started:
            if process.returncode is None:
                process.kill()
    assert [position for position, _ in logs[0]] == seen
    assert logs[1] == logs[2] == logs[0]
    assert len({run_id for _, run_id in logs[0]}) == total


async def test_r25_open_transaction_of_another_client_stalls_no_node(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    async with beside.transaction(isolation="repeatable_read"):
        # It has written, and it sees the database as it was.
        await beside.execute("CREATE TABLE held (n int)")
        await Story(nodes[0]).play("a")
        await until_told(nodes[1], 1)
        await Story(nodes[1], "other").play("b")
        await until_told(nodes[0], 2)


async def test_r25_wake_up_is_enough_without_polling(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_log, "POLL_SECONDS", 3_600.0)
    async with (
        postgres_store(postgres_url) as one,
        postgres_store(postgres_url) as two,
    ):
        two.listener = Witness()
        await listening(postgres_url, 2)
        for n in range(5):
            await Story(one, f"s{n}").play(f"r{n}")
            await until_told(two, n + 1)


async def test_r25_polling_is_enough_without_wake_ups(
    nodes: Sequence[PostgresStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_log, "POLL_SECONDS", 0.01)
    for node in nodes:
        await node._open.notifier.close()
    for n in range(3):
        await Story(nodes[0], f"s{n}").play(f"r{n}")
        await until_told(nodes[1], n + 1)


async def test_r25_earlier_events_of_other_nodes_are_published_first(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if neither a wake-up nor a poll announced it."""
    monkeypatch.setattr(postgres_log, "POLL_SECONDS", 3_600.0)
    monkeypatch.setattr(postgres_log, "PAGE_EVENTS", 3)
    async with (
        postgres_store(postgres_url) as one,
        postgres_store(postgres_url) as two,
    ):
        one.listener, two.listener = Witness(), Witness()
        await listening(postgres_url, 2)
        await one._open.notifier.close()
        for n in range(7):
            await Story(one, f"s{n}").play(f"r{n}")
        assert told(two) == []
        assert await two.position_of(Story(two).run_key("r4")) == 5
        assert two.position >= 5
        await Story(two, "own").play("own")
        assert [event.position for event in told(two)] == list(range(1, 9))
        assert told(two)[:7] == told(one)
        assert told(two)[7].complete.run_id == "own"
        await one.catch_up()
        assert told(one) == told(two)


# --- Compaction ---------------------------------------------------------------------------------


async def test_nodes_may_compact_at_once(
    nodes: Sequence[PostgresStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "STEP_ROWS", 7)
    story = Story(nodes[0])
    for n in range(30):
        await story.play(f"r{n}")
    compactions = [asyncio.create_task(node.compact(1 << 62, 25)) for node in nodes]
    for n in range(5):
        await Story(nodes[0], f"s{n}").play(f"late{n}")
    removed = await asyncio.gather(*compactions)
    left = await nodes[0].compact(1 << 62, 99)
    assert sum(removed) + left == 35
    for node in nodes:
        await node.catch_up()
        assert (node.position, node.compacted) == (35, 35)
        assert await node.log_bytes() == 0
    await story.play("next")
    assert told(nodes[0])[-1].position == 36


async def test_r25_node_that_missed_compacted_events_continues_after_them(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_log, "POLL_SECONDS", 3_600.0)
    async with (
        postgres_store(postgres_url) as one,
        postgres_store(postgres_url) as two,
    ):
        one.listener, two.listener = Witness(), Witness()
        await listening(postgres_url, 2)
        await one._open.notifier.close()
        for n in range(5):
            await Story(one, f"s{n}").play(f"r{n}")
        await one.compact(0, 3, keep_bytes=0)
        await two.catch_up()
        assert [event.position for event in told(two)] == [4, 5]
        assert (two.position, two.compacted) == (5, 3)
        await one.compact(0, 9, keep_bytes=0)
        await Story(one, "more").play("more")
        await one.compact(0, 9, keep_bytes=0)
        await two.catch_up()
        assert (two.position, two.compacted) == (6, 6)
        await Story(two, "own").play("own")
        assert [event.position for event in told(two)] == [4, 5, 7]


async def test_r25_node_that_missed_the_removal_of_one_tenants_events_gets_the_others(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_log, "POLL_SECONDS", 3_600.0)
    async with (
        postgres_store(postgres_url) as one,
        postgres_store(postgres_url) as two,
    ):
        gaps: list[list[int]] = []

        class Gaps(Witness):
            def on_completes(self, events: Sequence[LoggedComplete]) -> None:
                gaps.append([event.position for event in events])

        one.listener, two.listener = Witness(), Gaps()
        await listening(postgres_url, 2)
        await one._open.notifier.close()
        busy = Story(one, tenant="busy")
        await Story(one, "q", tenant="quiet").play("q1")  # position 1
        size = await one.log_bytes()
        await busy.play("b1")
        await Story(one, "r", tenant="quiet").play("q2")  # 3
        for n in range(2, 6):
            await busy.play(f"b{n}")  # 4 to 7
        assert await one.compact(0, 9, keep_bytes=size * 11 // 2) == 2
        await two.catch_up()
        assert gaps == [[1], [3], [5, 6, 7]]
        assert (two.position, two.compacted_of("quiet"), two.compacted_of("busy")) == (7, 0, 4)
        # The last event is removed too, before the other node has seen it.
        await busy.play("b6", answer("x" * 10_000))  # 8
        assert await one.compact(0, 9, keep_bytes=size * 11 // 2) == 4
        await Story(two, "own", tenant="quiet").play("own")
        assert gaps[3:] == [[], [9]]
        assert (two.position, two.compacted_of("quiet"), two.compacted_of("busy")) == (9, 0, 8)


BEFORE_REMOVALS = """
    DROP FUNCTION remove_next, remove_copy_piece, remove_piece, remove_runs;
    DROP TABLE removals, dropped_copies;
    CREATE TRIGGER remove_lane_events AFTER DELETE ON sessions
    FOR EACH ROW EXECUTE FUNCTION remove_lane_events();
"""
"""Takes step 23 of the schema back."""

BEFORE_WEBHOOKS_OF_RUNS = f"""
    {BEFORE_REMOVALS}
    DROP FUNCTION insert_webhook;
    ALTER TABLE webhooks DROP COLUMN run_id;
"""
"""Takes the steps from 22 on of the schema back."""

BEFORE_FENCE = f"""
    {BEFORE_WEBHOOKS_OF_RUNS}
    DROP FUNCTION commit_fenced;
    DROP TYPE host_fence;
"""
"""Takes the steps from 21 on of the schema back."""

BEFORE_FORKS = f"""
    {BEFORE_FENCE}
    DROP FUNCTION create_fork;
    DROP FUNCTION remove_copy CASCADE;
    DROP TABLE copied_messages, copied_attachments, copied_parts, unfinished_copies;
    ALTER TABLE sessions DROP COLUMN origin_id, DROP COLUMN origin_turn, DROP COLUMN copy_id;
"""
"""Takes the steps from 20 on of the schema back."""

BEFORE_LOOKUP = f"""
    {BEFORE_FORKS}
    DROP FUNCTION commit_updates;
    DROP TYPE updated_run;
    ALTER TABLE runs DROP COLUMN revision, DROP COLUMN last_update;
    DROP FUNCTION create_webhook;
    DROP TABLE run_labels, session_labels;
    DROP FUNCTION label_run, label_session CASCADE;
    DROP FUNCTION labels_of;
    DROP INDEX runs_by_agent, runs_by_accepted, runs_by_ended;
    DROP INDEX sessions_by_agent, sessions_by_created, sessions_busy;
"""
"""Takes the steps from 16 on of the schema back."""


async def test_migration_finds_the_labels_of_before(postgres_url: str, beside: Connection) -> None:
    labels = {"k": "v", "é\0": 'a"b\\'}
    async with postgres_store(postgres_url) as store:
        await Story(store).play(request("a")._replace(metadata=labels))
        await store.create_session(NewSession(SessionKey(TENANT, "new"), START, metadata=labels))
    await beside.execute(BEFORE_LOOKUP)
    await beside.execute("DELETE FROM schema_versions WHERE version >= 16")
    async with postgres_store(postgres_url) as store:
        runs = await store.list_runs(TENANT, RunFilter(labels=labels), limit=5)
        assert [run.run_id for run in runs.items] == ["a"]
        sessions = await store.list_sessions(TENANT, SessionFilter(labels=labels), limit=5)
        assert [session.session_id for session in sessions.items] == ["new"]


async def test_migration_counts_the_log_of_each_tenant(
    postgres_url: str, beside: Connection
) -> None:
    async with postgres_store(postgres_url) as store:
        for n in range(5):
            await Story(store, f"s{n}", tenant="quiet" if n == 1 else "busy").play(f"r{n}")
        sizes = sorted(await store._log_sizes())
    # As the schema before it was, after the removal of a sixth event.
    await beside.execute(BEFORE_LOOKUP)
    await beside.execute(
        """
        DROP TABLE kept_parts;
        DROP TYPE kept_part;
        DROP TABLE tenant_logs;
        DROP FUNCTION log_sizes();
        DROP FUNCTION commit_in_order, commit_retries;
        DROP TABLE lane_events;
        DROP TYPE lane_event;
        DROP TRIGGER trim_lane ON events;
        DROP TRIGGER remove_lane_events ON sessions;
        DROP FUNCTION trim_lane, remove_lane_events;
        DROP TYPE retried_run;
        ALTER TABLE runs DROP COLUMN retry;
        DROP TABLE input_requests;
        DROP TABLE webhooks;
        DROP INDEX runs_asking;
        DROP TYPE new_input, closed_input, asking_run CASCADE;
        DROP TYPE opened_lane, advanced_lane, accepted_run CASCADE;
        ALTER TABLE runs DROP COLUMN asking, DROP COLUMN agent;
        ALTER TABLE sessions DROP COLUMN agent, DROP COLUMN next_agent;
        CREATE INDEX sessions_waiting ON sessions (active_run_id, tenant, waiting_since);
        DELETE FROM schema_versions WHERE version >= 7;
        ALTER TABLE store DROP COLUMN emptied;
        ALTER TABLE store ADD COLUMN compacted_bytes bigint NOT NULL DEFAULT 50;
        UPDATE store SET compacted = 1;
        UPDATE events SET position = position + 1000;
        UPDATE events SET position = position - 999, log_bytes = 50 + whole.bytes FROM (
            SELECT position AS place, sum(size) OVER (ORDER BY position) AS bytes FROM (
                SELECT position, log_bytes
                    - lag(log_bytes, 1, 0) OVER (PARTITION BY tenant ORDER BY position) AS size
                FROM events
            ) AS sized
        ) AS whole WHERE place = position
        """
    )
    async with postgres_store(postgres_url) as store:
        assert sorted(await store._log_sizes()) == sizes
        assert (store.position, store.compacted) == (6, 1)
        assert store.compacted_of("quiet") == store.compacted_of("nobody") == 1
        assert await store.compact(0, 9, keep_bytes=sum(sizes) - 1) == 1
        assert (store.compacted_of("quiet"), store.compacted_of("busy")) == (1, 2)
        await Story(store, "next", tenant="quiet").play("next")
        assert store.position == 7


# --- Turns --------------------------------------------------------------------------------------


async def test_reads_of_a_tenant_wait_for_one_read_of_another(
    postgres_url: str, nodes: Sequence[PostgresStore]
) -> None:
    node, pool = nodes[0], nodes[0]._open.pool
    for tenant in ("busy", "quiet"):
        await Story(node, tenant=tenant).play("r")
    gate = await Connector(Database.parse(postgres_url)).connect()
    await gate.execute("SELECT pg_advisory_lock(8)")
    held = [
        asyncio.create_task(pool.fetch("SELECT pg_advisory_xact_lock(8)"))
        for _ in range(MOST_CONNECTIONS)
    ]
    await until_blocked(gate)
    ended: list[str] = []

    async def read(tenant: str) -> None:
        key = SessionKey(tenant, "session")
        await node.get_session(key)
        await node.list_messages(key, limit=9, max_bytes=PLENTY)
        await node.completes(tenant, EventFilter(), after=0, limit=9, max_bytes=PLENTY)
        ended.append(tenant)

    reads = [asyncio.create_task(read(tenant)) for tenant in ["busy"] * 200 + ["quiet"]]
    await asyncio.sleep(0)
    await gate.execute("SELECT pg_advisory_unlock(8)")
    await asyncio.gather(*held, *reads)
    gate.terminate()
    assert ended.index("quiet") < MOST_CONNECTIONS


# --- What is kept -------------------------------------------------------------------------------


async def test_nul_is_kept_wherever_it_may_stand(nodes: Sequence[PostgresStore]) -> None:
    nul = "a\0b\1c"
    story = Story(nodes[0], nul, tenant=nul)
    await nodes[0].create_session(NewSession(story.key, START, nul, {nul: nul}))
    story.lane = await nodes[0].load_lane(story.key)
    prompt = Prompt(nul * 200, (Attachment(nul, nul, nul), Attachment(nul, nul, nul.encode())))
    await story.accept(RunRequest(nul, prompt, metadata={nul: nul}))
    await story.start()
    await story.accept("waits")
    await story.commit(rules.cancel(story.lane, CancelScope.WAITING, at=START, reason=nul))
    said = DraftMessage(Role.ASSISTANT, (Text(nul),))
    failed = Outcome(
        FinishReason.ERROR, RunError(nul, nul), content=(said,), usage=Usage(1), model=nul
    )
    complete = await story.finish(failed)
    node = nodes[1]
    assert [event.complete for event in await until_told(node, 2)][1] == complete
    session = await node.get_session(story.key)
    assert session is not None
    assert (session.session_id, session.title, session.metadata) == (nul, nul, {nul: nul})
    run = await node.get_run(story.run_key(nul))
    assert run is not None
    assert run.complete == complete
    assert run.metadata == {nul: nul}
    assert await node.get_prompt(story.run_key(nul)) == prompt
    waiting = await node.get_run(story.run_key("waits"))
    assert waiting is not None
    assert waiting.complete is not None
    assert waiting.complete.cancel_reason == nul
    messages = (await node.list_messages(story.key, limit=9, max_bytes=PLENTY)).items
    assert (messages[0].parts[1:], messages[1].parts) == (prompt.attachments, said.parts)
    assert messages[1].model == nul
    assert await node.load_lane(story.key) == story.lane
    assert await node.position_of(story.run_key(nul)) == 2


READS = [
    "lane",
    "run",
    "prompt",
    "run_events",
    "session",
    "turn_of_run",
    "stored_bytes",
    "stale_sessions",
    "messages",
    "log_sizes",
    "log_after",
    "events",
    "events_of",
    "position_of_run",
    "beat",
    "lost_runs",
    "cancelled_runs",
    "claim",
    "waiting_runs",
    "hosts",
    "lane_events",
    "lane_versions",
]


async def test_no_statement_walks_a_table(postgres_url: str) -> None:
    """Each is a seek in an index, also while nobody has counted the rows."""
    async with postgres_store(postgres_url):
        pass
    connection = await Connector(Database.parse(postgres_url)).connect()
    for name in READS:
        await connection.execute(f"PREPARE {name} AS {SQL[name]}")
        count = await connection.fetchval(
            "SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = $1", name
        )
        values = f"({', '.join(['NULL'] * count)})" if count else ""
        rows = await connection.fetch(f"EXPLAIN EXECUTE {name}{values}")
        plan = "\n".join(row[0] for row in rows)
        # The one row of the whole store excepted, and those of the nodes.
        walked = [line for line in plan.splitlines() if "Seq Scan on" in line]
        assert all("on store" in line or "on nodes" in line for line in walked), f"{name}\n{plan}"
        index = {"log_after": "events_key", "events": "events_by_tenant"}.get(name, "")
        assert index in plan, f"{name}\n{plan}"
    await connection.close()


SPAN = Span(1, 9)
INDEXES: list[tuple[str, Lookup]] = [
    ("runs_by_session", runs(DIALECT, TENANT, RunFilter("s"))),
    ("runs_by_agent", runs(DIALECT, TENANT, RunFilter(agent="a"))),
    ("runs_by_agent", runs(DIALECT, TENANT, RunFilter(agent="a", ended=SPAN))),
    ("run_labels_key", runs(DIALECT, TENANT, RunFilter(labels={"k": "v", "l": "w"}))),
    ("runs_by_accepted", runs(DIALECT, TENANT, RunFilter(accepted=SPAN, agent="a"))),
    ("runs_by_ended", runs(DIALECT, TENANT, RunFilter(order=RunOrder.LATEST_ENDED, ended=SPAN))),
    ("runs_by_ended", runs(DIALECT, TENANT, RunFilter("s", order=RunOrder.EARLIEST_ENDED))),
    ("runs_ended", runs(DIALECT, TENANT, RunFilter(states=frozenset({RunState.FAILED})))),
    ("runs_open", runs(DIALECT, TENANT, RunFilter(states=frozenset({RunState.ACTIVE})))),
    ("runs_open", runs(DIALECT, TENANT, RunFilter())),
    ("sessions_by_tenant", sessions(DIALECT, TENANT, SessionFilter(busy=False))),
    ("sessions_by_agent", sessions(DIALECT, TENANT, SessionFilter(agent="a"))),
    ("sessions_by_created", sessions(DIALECT, TENANT, SessionFilter(created=SPAN))),
    ("sessions_busy", sessions(DIALECT, TENANT, SessionFilter(busy=True))),
    ("session_labels_key", sessions(DIALECT, TENANT, SessionFilter(labels={"k": "v"}))),
]


async def test_no_list_walks_a_table(postgres_url: str) -> None:
    """Each reads its own index, also while nobody has counted the rows."""
    async with postgres_store(postgres_url):
        pass
    connection = await Connector(Database.parse(postgres_url)).connect()
    for n, (index, lookup) in enumerate(INDEXES):
        for m, made in enumerate(
            (lookup.page((3, 4), 50), lookup.last_read((3, 4)), lookup.count())
        ):
            name = f"list_{n}_{m}"
            await connection.execute(f"PREPARE {name} AS {made.sql}")
            values = f"({', '.join(['NULL'] * len(made.args))})"
            rows = await connection.fetch(f"EXPLAIN EXECUTE {name}{values}")
            plan = "\n".join(row[0] for row in rows)
            assert "Seq Scan" not in plan, plan
            assert index in plan, f"{index}\n{plan}"
            # Only open runs are sorted, and few of several lists are merged.
            assert "Sort" not in plan or index == "runs_open", plan
    await connection.close()


async def test_plans_that_were_made_while_the_tables_were_empty_still_serve(
    postgres_url: str, beside: Connection
) -> None:
    """Nothing that is looked up by its id is looked for in an index that is for lists."""
    async with postgres_store(postgres_url) as store:
        await Story(store, "first").play("first")
        stories = [Story(store, f"s{n}") for n in range(20)]
        await asyncio.gather(*(story.play(story.session_id) for story in stories))
        for story in stories:
            assert await store.load_lane(story.key) == story.lane
            assert await store.get_run(story.run_key(story.session_id)) is not None
            assert await store.position_of(story.run_key(story.session_id)) is not None
        await store.compact(0, 9, keep_bytes=0)
    used: dict[str, int] = {}
    async with asyncio.timeout(SECONDS):
        # What a connection did is counted when it has ended.
        while not used.get("sessions_key"):
            await beside.execute("SELECT pg_stat_clear_snapshot()")
            rows = await beside.fetch(
                "SELECT indexrelname, idx_tup_read FROM pg_stat_user_indexes"
                " WHERE schemaname = current_schema()"
            )
            used = {row[0]: row[1] for row in rows}
            await asyncio.sleep(0.01)
    lists = ("sessions_by_tenant", "runs_by_session", "runs_ended", "runs_active")
    assert [used[name] for name in (*lists, "events_by_session")] == [0] * 5
