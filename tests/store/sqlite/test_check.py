"""`check` passes a sound database, and finds and names every defect of a damaged one."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from runlane_server.core.errors import StartError
from runlane_server.core.model import (
    Attachment,
    CancelScope,
    FinishReason,
    Role,
    RunError,
    SessionKey,
    Text,
    TextDelta,
    Usage,
    WhenBusy,
)
from runlane_server.core.transition import Outcome
from runlane_server.core.turn import DraftMessage
from runlane_server.store.base import NewSession
from runlane_server.store.findings import MAX_LINES, Counts
from runlane_server.store.sqlite import compact as sqlite_compact
from runlane_server.store.sqlite.check import CHECKS, check
from runlane_server.store.sqlite.rows import Compaction, CompactionStep
from runlane_server.store.sqlite.store import SqliteStore
from support.asking import answer as answer_input
from support.asking import ask, question
from support.story import START, Story, answer, request

FAR = 1 << 62


async def live(store: SqliteStore) -> None:
    """All that can become of runs: every end, every state, and what retention leaves of them."""
    gone = Story(store, "gone")
    await gone.play("compacted")  # position 1
    await gone.play("outlived")  # position 2
    await gone.remove()
    await store.forget_deleted(FAR, 9)
    again = Story(store, "gone")
    again.now = gone.now
    await again.play(request("outlived", "x" * 1_000, Attachment("n", "text/plain", "t")))  # 3

    folds = Story(store, "folds")
    await folds.accept("host", request("f", when_busy=WhenBusy.FOLD))
    await folds.accept(request("w", when_busy=WhenBusy.FOLD))
    await folds.start()
    await folds.fold()
    await folds.cancel(CancelScope.RUN, "w")  # 4
    joined = [DraftMessage(Role.USER, run_id="f"), DraftMessage(Role.USER, run_id="w")]
    said = DraftMessage(Role.ASSISTANT, (Text("first"),))
    await folds.finish(answer("both", Usage(1, 2, 3, 4, 5), said, *joined))  # 5, 6

    ends = Story(store, "ends")
    await ends.accept("retried", "entry")
    await ends.start()
    await ends.append(TextDelta("x"))
    await ends.lose_node()
    await ends.start()
    await ends.append(TextDelta("y"))
    await ends.cancel()
    await ends.finish(answer("y", Usage(10, 20, 30, 40, 50)))  # "entry" is 7, this is 8
    await ends.play("failed", Outcome(FinishReason.ERROR, RunError("AGENT_ERROR", "it broke")))
    await ends.accept("waits")
    await ends.fail_waiting("AGENT_NOT_READY")

    busy = Story(store, "busy")
    await busy.accept("active", request("joined", when_busy=WhenBusy.FOLD), "q1", "q2")
    await busy.start()
    await busy.fold()
    await busy.append(TextDelta("z"))
    await Story(store, "line").accept("head", "next")
    asks = Story(store, "asks")
    await asks.accept("asking")
    await asks.start()
    [name, _] = await ask(asks, question("k"), question("l", text="x" * 100))
    await answer_input(asks, "asking", name)
    await store.create_session(NewSession(SessionKey("another", "empty"), START))


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The database of all that."""
    path = tmp_path_factory.mktemp("lived") / "runlane.db"

    async def make() -> None:
        async with SqliteStore(path) as store:
            await live(store)
            await store.compact(FAR, 1)

    asyncio.run(make())
    return path.read_bytes()


@pytest.fixture
def path(lived: bytes, tmp_path: Path) -> Path:
    """A copy of it."""
    copy = tmp_path / "runlane.db"
    copy.write_bytes(lived)
    return copy


def test_good_database_passes(path: Path) -> None:
    found = check(path)
    assert found.problems == ()
    assert found.counts == Counts(sessions=7, runs=15, events=9)


async def test_database_passes_while_it_is_used_and_compacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_compact, "STEP_ROWS", 3)
    path = tmp_path / "runlane.db"
    async with SqliteStore(path) as store:
        assert check(path).problems == ()
        await live(store)
        assert check(path).problems == ()
        while await _one_step(store):
            assert check(path).problems == ()
        assert check(path).counts == Counts(sessions=7, runs=15, events=0)


async def _one_step(store: SqliteStore) -> bool:
    """One transaction of a compaction; whether there is more."""
    future: asyncio.Future[Exception | CompactionStep | None] = (
        asyncio.get_running_loop().create_future()
    )
    removed = await store._writing.write(Compaction(FAR, 99, None, future))
    assert removed is not None
    return removed.more


# --- Each defect, and the line that reports it --------------------------------------------------

COPIED = "INSERT INTO copied_messages VALUES (7, 1, 0, 'm', 'r', '{}', NULL, '', 1, NULL, {}, 0)"

BROKEN: list[tuple[str, str, str]] = [
    ("meta", "DELETE FROM meta WHERE name = 'store_id'", "the file has no store_id"),
    ("meta", "UPDATE meta SET value = x'00' WHERE name = 'store_id'", "the file has no store_id"),
    (
        "deleted_runs",
        "INSERT INTO deleted_runs VALUES ('tenant', 'host', 'folds', '', 1, 1)",
        "run tenant/host exists, but is remembered as deleted",
    ),
    # Records that cannot be read
    (
        "records",
        "UPDATE sessions SET title = CAST(x'fffe' AS TEXT) WHERE session_id = 'line'",
        "session tenant/line cannot be read: Unsound: title: is not UTF-8",
    ),
    (
        "records",
        "UPDATE runs SET metadata = '[' WHERE run_id = 'host'",
        "run tenant/host cannot be read: JSONDecodeError: .*",
    ),
    (
        "records",
        "UPDATE runs SET attempt = 4294967296 WHERE run_id = 'host'",
        "run tenant/host cannot be read: Unsound: attempt: 4294967296 is out of range",
    ),
    (
        "records",
        "UPDATE runs SET attachments = 2 WHERE run_id = 'outlived'",
        "prompt of run tenant/outlived cannot be read: .* has 1 attachments instead of 2",
    ),
    (
        "records",
        "UPDATE attachments SET mime_type = x'00' WHERE run_id = 'outlived'",
        "prompt of run tenant/outlived cannot be read: Unsound: attachments: mime_type: is a bytes",
    ),
    (
        "records",
        "UPDATE messages SET model = x'ff' WHERE role = 'assistant'",
        "message tenant/.* cannot be read: Unsound: model: is a bytes",
    ),
    (
        "records",
        "UPDATE run_events SET body = '[1]' WHERE run_id = 'active' AND kind = 'text_delta'",
        "event tenant/active/[0-9]+ cannot be read: Unsound: body: text: is a int",
    ),
    (
        "records",
        "UPDATE events SET body = replace(body, 'completed', 'done') WHERE run_id = 'host'",
        "terminal event of run tenant/host cannot be read: ValueError: 'done' .*",
    ),
    # Lanes
    (
        "lanes",
        "UPDATE sessions SET active_run_id = 'ghost' WHERE session_id = 'busy'",
        "session tenant/busy names the active run ghost, which does not exist",
    ),
    (
        "lanes",
        "UPDATE sessions SET active_run_id = 'q1' WHERE session_id = 'busy'",
        "session tenant/busy names the active run 'q1' instead of 'active'",
    ),
    (
        "lanes",
        "UPDATE sessions SET active_run_id = '' WHERE session_id = 'busy'",
        "session tenant/busy names the active run '' instead of 'active'",
    ),
    (
        "lanes",
        "UPDATE sessions SET active_run_id = 'host' WHERE session_id = 'folds'",
        "session tenant/folds names the active run 'host' instead of ''",
    ),
    (
        "lanes",
        "UPDATE runs SET state = 'cancelling', turn = 1 WHERE run_id = 'q1'",
        "session tenant/busy has 2 active runs",
    ),
    (
        "lanes",
        "UPDATE sessions SET waiting_runs = 3 WHERE session_id = 'busy'",
        "session tenant/busy counts 3 waiting runs instead of 2",
    ),
    (
        "lanes",
        "UPDATE sessions SET waiting_runs = 1 WHERE session_id = 'ends'",
        "session tenant/ends counts 1 waiting runs instead of 0",
    ),
    (
        "stored_bytes",
        "UPDATE sessions SET stored_bytes = 7 WHERE session_id = 'busy'",
        "session tenant/busy counts 7 stored bytes instead of [0-9]{4,}",
    ),
    (
        "stored_bytes",
        "UPDATE sessions SET stored_bytes = stored_bytes + 1 WHERE session_id = 'folds'",
        "session tenant/folds counts [0-9]+ stored bytes instead of [0-9]+",
    ),
    (
        "waiting",
        "UPDATE runs SET rank = (SELECT rank FROM runs WHERE run_id = 'q1') WHERE run_id = 'q2'",
        "run tenant/q[12] has the rank of another waiting run",
    ),
    (
        "waiting",
        "UPDATE runs SET state = 'accepted' WHERE run_id = 'q1'",
        "run tenant/q1 is accepted at place 1 of its lane, with the active run active",
    ),
    (
        "waiting",
        "UPDATE runs SET state = 'queued' WHERE run_id = 'head'",
        "run tenant/head is queued at place 1 of its lane, with no active run",
    ),
    (
        "waiting",
        "UPDATE runs SET state = 'accepted' WHERE run_id = 'next'",
        "run tenant/next is accepted at place 2 of its lane, with no active run",
    ),
    # Runs
    (
        "runs",
        "DELETE FROM sessions WHERE session_id = 'line'",
        "run tenant/head belongs to session line, which does not exist",
    ),
    (
        "runs",
        "UPDATE runs SET state = 'queued' WHERE run_id = 'failed'",
        "run tenant/failed is queued, but has an end",
    ),
    (
        "runs",
        "UPDATE runs SET state = 'completed' WHERE run_id = 'q2'",
        "run tenant/q2 is completed, but has no end",
    ),
    (
        "runs",
        "UPDATE runs SET finish_reason = NULL WHERE run_id = 'failed'",
        "run tenant/failed has ended without a finish reason or a message id",
    ),
    (
        "runs",
        "UPDATE runs SET message_id = NULL WHERE run_id = 'failed'",
        "run tenant/failed has ended without a finish reason or a message id",
    ),
    (
        "runs",
        "UPDATE sessions SET accept_seq = 3 WHERE session_id = 'busy'",
        "run tenant/q2 has accept_seq 4; that of its session is 3",
    ),
    (
        "runs",
        "UPDATE sessions SET turn = 0 WHERE session_id = 'folds'",
        "run tenant/host has turn 1; that of its session is 0",
    ),
    (
        "accept_order",
        "UPDATE runs SET accept_seq = 1 WHERE run_id = 'q1'",
        "run tenant/q1 has accept_seq 1 after 2",
    ),
    (
        "accept_order",
        "UPDATE runs SET accept_seq = 3 WHERE run_id = 'q2'",
        "run tenant/q2 has accept_seq 3 after 3",
    ),
    (
        "accept_order",
        "UPDATE runs SET accept_seq = 0 WHERE run_id = 'head'",
        "run tenant/head has accept_seq 0 after 0",
    ),
    # Folds
    (
        "folds",
        "UPDATE runs SET folded_into = 'ghost' WHERE run_id = 'f'",
        "run tenant/f is folded into ghost, which does not exist",
    ),
    (
        "folds",
        "UPDATE runs SET folded_into = 'retried' WHERE run_id = 'f'",
        "run tenant/f is folded into retried, which belongs to another session",
    ),
    (
        "folds",
        "UPDATE runs SET folded_into = 'w' WHERE run_id = 'f'",
        "run tenant/f is folded into w, which is folded itself",
    ),
    (
        "folds",
        "UPDATE runs SET turn = 0 WHERE run_id = 'joined'",
        "run tenant/joined is folded into active, but has turn 0 instead of 1",
    ),
    (
        "folds",
        "UPDATE runs SET state = 'accepted', turn = 1 WHERE run_id = 'active'",
        "run tenant/joined is folded into active, which is accepted, but is folded",
    ),
    (
        "folds",
        "UPDATE runs SET message_id = 'f-m1' WHERE run_id = 'f'",
        "run tenant/f is folded into host, but has another last message",
    ),
    # Turns
    (
        "turns",
        "DELETE FROM messages WHERE run_id = 'failed' AND role = 'user'",
        "run tenant/failed has its prompt 0 times in turn 3",
    ),
    (
        "turns",
        "DELETE FROM messages WHERE run_id = 'active'",
        "run tenant/active has its prompt 0 times in turn 1",
    ),
    (
        "turns",
        "DELETE FROM messages WHERE run_id = 'f'",
        "run tenant/f has its prompt 0 times in turn 1",
    ),
    (
        "turns",
        "INSERT INTO messages SELECT tenant, session_id, turn, 9, 'twice', run_id, role,"
        " finish_reason, model, created_at, parts FROM messages WHERE run_id = 'f'",
        "run tenant/f has its prompt 2 times in turn 1",
    ),
    (
        "turns",
        "UPDATE runs SET message_id = '' WHERE run_id = 'entry'",
        "run tenant/entry has ended without a last message",
    ),
    (
        "turns",
        "UPDATE runs SET message_id = '', state = 'completed' WHERE run_id = 'w'",
        "run tenant/w has ended without a last message",
    ),
    (
        "turns",
        "DELETE FROM messages WHERE run_id = 'failed' AND role = 'assistant'",
        r"run tenant/failed ended with message failed-m1 \(error\); its turn ends with none",
    ),
    (
        "turns",
        "UPDATE messages SET finish_reason = 'stop' WHERE message_id = 'failed-m1'",
        r"run tenant/failed ended with message failed-m1 \(error\); its turn ends with .* stop",
    ),
    (
        "turns",
        "UPDATE messages SET finish_reason = NULL WHERE message_id = 'failed-m1'",
        r"run tenant/failed ended with message failed-m1 \(error\); its turn ends with failed-m1 ",
    ),
    (
        "turns",
        "UPDATE runs SET message_id = 'host-m1' WHERE run_id IN ('host', 'f')",
        r"run tenant/f ended with message host-m1 \(stop\); its turn ends with host-m4 stop",
    ),
    # The transcript
    (
        "messages",
        "UPDATE messages SET run_id = 'ghost' WHERE message_id = 'failed-m1'",
        "message tenant/failed-m1 belongs to run ghost, which does not exist",
    ),
    (
        "messages",
        "UPDATE messages SET run_id = 'host' WHERE message_id = 'failed-m1'",
        "message tenant/failed-m1 is in session ends; its run is in folds",
    ),
    (
        "messages",
        "UPDATE messages SET run_id = 'entry' WHERE message_id = 'failed-m1'",
        "message tenant/failed-m1 is in turn 3; its run is in 2",
    ),
    (
        "messages",
        "UPDATE messages SET role = 'user' WHERE message_id = 'failed-m1'",
        "message tenant/failed-m1 is a prompt at the wrong place of its turn",
    ),
    (
        "message_order",
        "UPDATE messages SET ordinal = 9 WHERE message_id = 'failed-m1'",
        "turn 3 of session tenant/ends has 2 messages, numbered from 0 to 9",
    ),
    (
        "message_order",
        "UPDATE messages SET ordinal = ordinal + 1 WHERE message_id = 'active-m0'",
        "turn 1 of session tenant/busy has 1 messages, numbered from 1 to 1",
    ),
    # What belongs to a run
    (
        "prompts",
        "INSERT INTO prompts VALUES ('tenant', 'ghost', 'x')",
        "the prompt of run tenant/ghost has no run",
    ),
    (
        "kept_parts",
        "INSERT INTO kept_parts VALUES ('tenant', 'ghost', 1, 0, 'x')",
        "part 0 of attempt 1 of run tenant/ghost has no run",
    ),
    (
        "attachments",
        "INSERT INTO attachments VALUES ('tenant', 'ghost', 0, 'n', 'm', 'x')",
        "attachment 0 of run tenant/ghost has no run",
    ),
    (
        "attachments",
        "DELETE FROM attachments",
        "run tenant/outlived has 0 attachments instead of 1",
    ),
    (
        "attachments",
        "INSERT INTO attachments VALUES ('tenant', 'q1', 0, 'n', 'm', 'x')",
        "run tenant/q1 has 1 attachments instead of 0",
    ),
    (
        "run_events",
        "INSERT INTO run_events VALUES ('tenant', 'ghost', 1, 1, 'accepted', '[1]')",
        "run tenant/ghost has events, but does not exist",
    ),
    (
        "run_events",
        "DELETE FROM run_events WHERE run_id = 'retried' AND idx = 3",
        "run tenant/retried has 5 events, numbered from 1 to 6",
    ),
    (
        "run_events",
        "INSERT INTO run_events VALUES ('tenant', 'q1', 2, 1, 'run_complete', NULL)",
        "run tenant/q1 has not ended, but has a run_complete",
    ),
    (
        "run_events",
        "DELETE FROM run_events WHERE run_id = 'retried' AND idx = 6",
        "run tenant/retried has ended, but its last event is not its only run_complete",
    ),
    (
        "run_events",
        "INSERT INTO run_events VALUES ('tenant', 'retried', 7, 1, 'started', '[1]')",
        "run tenant/retried has ended, but its last event is not its only run_complete",
    ),
    (
        "run_events",
        "INSERT INTO run_events VALUES ('tenant', 'retried', 7, 1, 'run_complete', NULL)",
        "run tenant/retried has ended, but its last event is not its only run_complete",
    ),
    (
        "run_events",
        "DELETE FROM run_events WHERE run_id = 'active' AND idx = 1",
        "run tenant/active has lost its first events",
    ),
    (
        "run_events",
        "DELETE FROM run_events WHERE run_id = 'retried' AND idx < 3",
        "run tenant/retried has lost its first events, but not its terminal event",
    ),
    (
        "run_events",
        "DELETE FROM events WHERE run_id = 'failed'",
        "run tenant/failed has all its events, but no terminal event in the log",
    ),
    (
        "run_events",
        "DELETE FROM run_events WHERE run_id = 'failed'",
        "run tenant/failed has no events",
    ),
    # The event log
    (
        "events",
        "DELETE FROM events WHERE position = 5",
        "position 6 of the event log follows 4",
    ),
    (
        "events",
        "UPDATE meta SET value = 0 WHERE name = 'compacted'",
        "position 2 of the event log follows 0",
    ),
    (
        "events",
        "UPDATE tenant_logs SET compacted = 4",
        "position 2 of the event log should have been removed",
    ),
    (
        "events",
        "UPDATE meta SET value = 4 WHERE name = 'compacted'",
        "the row compacted of meta is 4, but the last event removed is 1",
    ),
    (
        "events",
        "UPDATE events SET log_bytes = 1 WHERE position = 5",
        "position 5 of the event log does not increase log_bytes",
    ),
    (
        "events",
        "UPDATE tenant_logs SET compacted_bytes = 1000000",
        "position 2 of the event log does not increase log_bytes",
    ),
    (
        "terminal_events",
        "INSERT INTO events SELECT 99, tenant, session_id, 'ghost', ended_at, 1 << 40, body"
        " FROM events WHERE run_id = 'failed'",
        "the terminal event at position 99 belongs to run tenant/ghost, which does not exist",
    ),
    (
        "terminal_events",
        "INSERT INTO events SELECT 99, tenant, session_id, 'q1', ended_at + 999, 1 << 40, body"
        " FROM events WHERE run_id = 'failed'",
        "the terminal event at position 99 belongs to run tenant/q1, which has not ended",
    ),
    (
        "terminal_events",
        "INSERT INTO events SELECT 99, tenant, session_id, run_id, ended_at, 1 << 40, body"
        " FROM events WHERE run_id = 'failed'",
        "the terminal event at position 99 belongs to run tenant/failed, which has an earlier one",
    ),
    (
        "terminal_events",
        "UPDATE events SET session_id = 'busy' WHERE run_id = 'failed'",
        "the terminal event at position [0-9]+ belongs to run tenant/failed,"
        " which belongs to another session",
    ),
    *(
        (
            "terminal_events",
            change,
            "the terminal event at position [0-9]+ belongs to run tenant/failed,"
            " and describes another end",
        )
        for change in (
            "UPDATE events SET ended_at = ended_at + 1 WHERE run_id = 'failed'",
            "UPDATE events SET body = json_set(body, '$.state', 'completed')"
            " WHERE run_id = 'failed'",
            "UPDATE events SET body = json_set(body, '$.finish_reason', 'stop')"
            " WHERE run_id = 'failed'",
            "UPDATE events SET body = json_set(body, '$.message_id', 'x') WHERE run_id = 'failed'",
        )
    ),
    # Usage
    *(
        (
            "usage",
            f"UPDATE sessions SET {column} = {column} + 1 WHERE session_id = 'ends'",  # noqa: S608
            "the usage of session tenant/ends is not the sum of its runs",
        )
        for column in (
            "input_tokens",
            "output_tokens",
            "cache_read_tokens",
            "cache_write_tokens",
            "requests",
        )
    ),
    *(
        ("inputs", change, f"input request tenant/asking-l-[0-9]+ {line}")
        for change, line in (
            (
                "UPDATE input_requests SET run_id = 'x' WHERE key = 'l'",
                "belongs to run x, which does not exist",
            ),
            ("UPDATE runs SET ended_at = 1 WHERE run_id = 'asking'", "is open, but its run .*"),
            ("UPDATE input_requests SET closed_at = 1 WHERE key = 'l'", "is open, but has an end"),
            (
                "UPDATE input_requests SET state = 'answered', closed_at = 1 WHERE key = 'l'",
                "is answered, but has no answer",
            ),
        )
    ),
    (
        "inputs",
        "UPDATE input_requests SET state = 'open', closed_at = NULL WHERE key = 'k'",
        "run tenant/asking waits for 1 input requests, but 2 are open",
    ),
    (
        "stored_bytes",
        "UPDATE input_requests SET question = question || ' ' WHERE key = 'k'",
        "session tenant/asks counts .*",
    ),
    (
        "records",
        "UPDATE input_requests SET question = '[]' WHERE key = 'k'",
        "input request tenant/asking-k-[0-9]+ cannot be read: .*",
    ),
    (
        "copies",
        "UPDATE sessions SET copy_id = 7, origin_id = 's', origin_turn = 2"
        " WHERE session_id = 'line'",
        "session tenant/line began with 2 turns of its origin, but has 0",
    ),
    ("copies", COPIED.format("user", "'x'"), "copy 7 of a transcript belongs to no session"),
    (
        "records",
        COPIED.format("user", "NULL"),
        "message copy 7/m cannot be read: ValueError: its prompt is not there",
    ),
    (
        "usage",
        "UPDATE runs SET usage = NULL WHERE run_id = 'host'",
        "the usage of session tenant/folds is not the sum of its runs",
    ),
]


@pytest.mark.parametrize(("name", "change", "line"), BROKEN)
def test_check_names_each_defect(path: Path, name: str, change: str, line: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        assert db.execute(change).rowcount > 0
        db.commit()
    problems = check(path).problems
    assert [it for it in problems if re.fullmatch(f"{name}: {line}", it)], problems


def test_each_check_has_a_defect() -> None:
    assert {name for name, _, _ in BROKEN} == {"records", *CHECKS}


def test_check_reports_a_damaged_file(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        page, size = db.execute(
            "SELECT rootpage, (SELECT page_size FROM pragma_page_size)"
            " FROM sqlite_master WHERE name = 'runs_by_session'"
        ).fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    problems = check(path).problems
    assert any(line.startswith("integrity: ") for line in problems)
    assert "accept_order: database disk image is malformed" in problems
    assert not any("\n" in line for line in problems)


def test_check_reports_an_index_entry_without_a_row(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("DELETE FROM sqlite_master WHERE name = 'sessions_by_tenant'")
        db.commit()
    problems = check(path).problems
    assert problems
    assert all(line.startswith("integrity: ") for line in problems)


def test_one_cause_is_not_told_a_million_times(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executemany(
            "INSERT INTO prompts VALUES ('tenant', ?, 'x')", [(f"g{n}",) for n in range(100)]
        )
        db.commit()
    problems = check(path).problems
    assert len(problems) == MAX_LINES + 1
    assert problems[-1] == f"prompts: and {100 - MAX_LINES} more"


def test_check_changes_nothing(path: Path, lived: bytes) -> None:
    check(path)
    assert path.read_bytes() == lived


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with pytest.raises(StartError, match="the file does not exist"):
        check(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(StartError, match="database of another program"):
        check(path)
    path.write_bytes(b"no database at all, but long enough to be read as one" * 100)
    with pytest.raises(StartError, match="not a database"):
        check(path)


@pytest.mark.parametrize(("version", "why"), [(1, "older Runlane"), (999, "newer Runlane")])
def test_other_schema_is_refused(path: Path, version: int, why: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(StartError, match=why):
        check(path)
