"""Each metric counts once, with the right value, and not before the commit."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.core.errors import EmptyPrompt, RunlaneError, SessionBusy, StoreUnavailable
from runlane_server.core.limits import Limits
from runlane_server.core.model import CancelScope, Prompt, RunKey, RunRequest, SessionKey, WhenBusy
from runlane_server.core.transition import Transition
from runlane_server.feed.feed import Feed
from runlane_server.store.base import NewSession, SessionTaken
from runlane_server.store.memory.store import MemoryStore
from runlane_server.store.sqlite.store import SqliteStore
from runlane_server.telemetry.meter import Meter
from runlane_server.telemetry.metrics import Metrics
from support.staging import say, script, wait
from telemetry.metered import STATE, Clock, Metered, metered

if TYPE_CHECKING:
    from support.postgres import OwnPostgres


@pytest.fixture
async def it() -> AsyncIterator[Metered]:
    """A node with metrics."""
    async with MemoryStore() as store, metered(store) as made:
        yield made


async def ended(it: Metered, run_id: str) -> None:
    """Waits for the end of a run and of its supervisor, which updates the metrics last."""
    await it.node.end(run_id)
    assert await it.node.coordinator.wait_idle(20)


# --- Runs ---------------------------------------------------------------------------------------


async def test_a_run_counts_when_accepted_started_and_ended(it: Metered) -> None:
    run = await it.node.start_blocked("s", "g")
    assert it.value("runs_accepted_total") == 1
    assert it.value("runs_started_total") == 1
    it.clock.move(4)
    it.node.latches.open("g")
    await ended(it, run.run_id)
    assert it.value("runs_ended_total", state="completed", finish_reason="stop") == 1
    assert it.observed("run_duration_seconds", state="completed") == (1, 4)
    assert it.value("runs_accepted_total") == it.value("runs_started_total") == 1


async def test_ended_runs_count_by_state_and_finish_reason(it: Metered) -> None:
    failing = await it.node.accept("s", script({"fail": "no luck"}))
    short = await it.node.accept("t", script(say("cut"), {"finish": "length"}))
    for accepted in (failing, short):
        await ended(it, accepted.run.run_id)
    assert it.value("runs_ended_total", state="failed", finish_reason="error") == 1
    assert it.value("runs_ended_total", state="completed", finish_reason="length") == 1
    assert it.value("runs_ended_total", state="completed", finish_reason="stop") == 0


async def test_refused_and_repeated_accepts_do_not_count(it: Metered) -> None:
    await it.node.start_blocked("s", "g", run_id="r")
    await it.node.accept("s", script(wait("g")), run_id="r")
    with pytest.raises(EmptyPrompt):
        await it.node.accept("s", " ")
    with pytest.raises(SessionBusy):
        await it.node.accept("s", "x", when_busy=WhenBusy.REJECT)
    assert it.value("runs_accepted_total") == 1


class Unconfirming(MemoryStore):
    """Writes nothing, and reports an unknown outcome."""

    async def commit(self, base_version: int, transition: Transition) -> int:
        raise StoreUnavailable("outcome unknown")


async def test_an_unconfirmed_accept_does_not_count() -> None:
    async with Unconfirming() as store, metered(store) as it:
        with pytest.raises(StoreUnavailable):
            await it.node.accept("s", "x")
        for name in ("runs_accepted_total", "runs_started_total", "run_queue_wait_seconds_count"):
            assert it.value(name) == 0, name


async def test_queue_wait_lasts_from_accept_to_the_first_start(it: Metered) -> None:
    await it.node.start_blocked("s", "g")
    queued = await it.node.queue("s", "next")
    assert it.observed("run_queue_wait_seconds") == (1, 0)
    it.clock.move(7)
    it.node.latches.open("g")
    await ended(it, queued.run_id)
    assert it.observed("run_queue_wait_seconds") == (2, 7)


async def test_a_retry_counts_as_a_start_and_not_as_a_queue_wait() -> None:
    async with MemoryStore() as store:
        async with metered(store) as first:
            run = await first.node.start_blocked("s", "g", max_attempts=2)
        async with metered(store) as second:
            second.clock.move(60)
            second.node.latches.open("g")
            await ended(second, run.run_id)
            assert second.value("runs_started_total") == 1
            assert second.observed("run_queue_wait_seconds") == (0, 0)
            assert second.value("runs_accepted_total") == 0


async def test_first_delta_lasts_from_the_start_to_the_first_text(it: Metered) -> None:
    silent = await it.node.accept("t", script({"usage": {"input_tokens": 1}}))
    await ended(it, silent.run.run_id)
    accepted = await it.node.accept(
        "s", script({"reasoning": "hm"}, wait("g"), say("one"), wait("h"), say("two"))
    )
    await it.node.latches.reached("g")
    it.clock.move(3)
    it.node.latches.open("g")
    await it.node.latches.reached("h")
    it.clock.move(5)
    it.node.latches.open("h")
    await ended(it, accepted.run.run_id)
    # The text before the second latch may be stored together with the text after it.
    count, seconds = it.observed("run_first_delta_seconds")
    assert count == 1
    assert seconds in {3, 8}


# --- Cancels ------------------------------------------------------------------------------------


async def test_cancel_latency_lasts_until_the_run_has_ended(it: Metered) -> None:
    accepted = await it.node.accept("s", script(wait("g", ignore_cancel=True)))
    await it.node.latches.reached("g")
    waiting = await it.node.queue("s", "behind it")
    await it.node.coordinator.cancel("s")
    await it.node.end(waiting.run_id)
    at_once = it.observed("cancel_latency_seconds")
    it.clock.move(2)
    it.node.latches.open("g")
    await ended(it, accepted.run.run_id)
    assert list(at_once) == [1, 0]
    assert it.observed("cancel_latency_seconds") == (2, 2)
    assert it.value("cancels_total", scope="session") == 1
    assert it.value("runs_ended_total", state="cancelled", finish_reason="canceled") == 2


async def test_cancel_latency_is_zero_if_the_agent_stops_at_once(it: Metered) -> None:
    run = await it.node.start_blocked("s", "g")
    await it.node.coordinator.cancel("s", scope=CancelScope.ACTIVE)
    await ended(it, run.run_id)
    assert it.observed("cancel_latency_seconds") == (1, 0)


async def test_cancel_latency_covers_a_run_cancelled_before_its_accept_is_durable(
    it: Metered,
) -> None:
    coordinator = it.node.coordinator
    with coordinator.begin_accepted("s") as accepted:
        await coordinator.cancel("s")
        it.clock.move(1)
        request = RunRequest(accepted.run_id, Prompt("x"))
        await coordinator.run_accepted(accepted, request, allow_missing=True)
    assert it.observed("cancel_latency_seconds") == (1, 1)


async def test_cancels_that_covered_a_run_count_by_scope(it: Metered) -> None:
    cancel = it.node.coordinator.cancel
    runs = [await it.node.start_blocked(f"s{n}", f"g{n}") for n in range(4)]
    await it.node.queue("s0", "x")
    await cancel("s0", scope=CancelScope.WAITING)
    await cancel("s0", scope=CancelScope.ACTIVE)
    await cancel("s1", run_id=runs[1].run_id)
    await it.node.coordinator.cancel_all()
    for run in runs:
        await ended(it, run.run_id)
    await cancel("s0")  # nothing is left to cover
    scopes = ("waiting", "active", "run", "all", "session")
    assert [it.value("cancels_total", scope=scope) for scope in scopes] == [1, 1, 1, 2, 0]


async def test_a_cancel_counts_even_if_its_caller_disconnects(it: Metered) -> None:
    run = await it.node.start_blocked("s", "g")
    caller = asyncio.ensure_future(it.node.coordinator.cancel("s"))
    await asyncio.sleep(0)
    caller.cancel()
    await ended(it, run.run_id)
    assert it.value("cancels_total", scope="session") == 1


# --- Delivery and the store ---------------------------------------------------------------------


async def test_event_lag_lasts_from_the_end_of_a_run_to_its_delivery() -> None:
    class Late(MemoryStore):
        """Takes two seconds for a commit."""

        async def commit(self, base_version: int, transition: Transition) -> int:
            clock.move(2)
            return await super().commit(base_version, transition)

    async with Late() as store, metered(store) as it:
        clock = it.clock
        run = await it.node.start_blocked("s", "g")
        it.node.latches.open("g")
        await ended(it, run.run_id)
        assert it.observed("event_lag_seconds") == (1, 2)


async def test_commit_units_are_the_writes_per_commit(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "db") as store, metered(store) as it:
        sessions = [NewSession(SessionKey(DEFAULT_TENANT, f"s{n}"), 0) for n in range(20)]
        await store.create_session(sessions[0])
        # The last of these shares a commit with others and is rejected.
        made = map(store.create_session, (*sessions[1:], sessions[0]))
        refused = [done for done in await asyncio.gather(*made, return_exceptions=True) if done]
        assert [type(refusal) for refusal in refused] == [SessionTaken]
        commits, units = it.observed("commit_units")
        assert units == 20
        assert commits < 20
        assert it.value("commit_units_bucket", le="1.0") == 1
        assert it.observed("commit_seconds")[0] == commits
        assert it.observed("commit_seconds")[1] > 0


async def test_failed_writes_count_as_store_unavailable(tmp_path: Path) -> None:
    def fill_up(db: sqlite3.Connection) -> None:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")

    async with SqliteStore(tmp_path / "db") as store, metered(store, Limits(0)) as it:
        assert store._writer is not None
        await store._writer._connection.work(fill_up)
        results = await asyncio.gather(
            *(it.node.accept(f"s{n}", "x" * 100_000) for n in range(3)), return_exceptions=True
        )
        assert all(isinstance(result, RunlaneError) for result in results)
        # Accepts that come after the failure are refused before they become writes.
        assert 1 <= it.value("store_unavailable_total") <= 3
        assert it.value("runs_accepted_total") == 0


async def test_only_writes_while_the_database_is_down_count_as_store_unavailable(
    own_server: OwnPostgres,
) -> None:
    from support.postgres import fresh_database, postgres_store  # noqa: PLC0415 - an extra

    async with fresh_database(own_server.url) as url, postgres_store(url) as store:
        metrics = Metrics(lambda: STATE)
        store.write_observer = Meter(metrics, Feed(store), Clock())
        sessions = [NewSession(SessionKey(DEFAULT_TENANT, f"s{n}"), 0) for n in range(4)]
        await asyncio.gather(*map(store.create_session, sessions[:3]))
        await asyncio.to_thread(own_server.stop)
        try:
            with pytest.raises(StoreUnavailable):
                await store.create_session(sessions[3])
        finally:
            await asyncio.to_thread(own_server.start)
        value = metrics.registry.get_sample_value
        assert value("runlane_store_unavailable_total") == 1
        assert value("runlane_commit_units_sum") == 3
        commits = value("runlane_commit_units_count") or 0
        assert 1 <= commits <= 3
        assert value("runlane_commit_seconds_count") == commits
        assert (value("runlane_commit_seconds_sum") or 0) > 0


# --- Memory ------------------------------------------------------------------------------


async def test_the_meter_forgets_runs_that_have_ended(it: Metered) -> None:
    meter = it.node.store.listener
    assert isinstance(meter, Meter)
    run = await it.node.start_blocked("s", "g")
    assert list(meter._silent_since) == [RunKey(DEFAULT_TENANT, run.run_id)]
    await it.node.coordinator.cancel("s")
    failing = await it.node.accept("t", script({"fail": "at once"}))
    for run_id in (run.run_id, failing.run.run_id):
        await ended(it, run_id)
    assert (len(meter._silent_since), len(meter._cancels)) == (0, 0)
