"""Nodes learn of each other through their database. Two stores over one database are two nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from runlane_server.core.model import (
    CancelScope,
    FinishReason,
    RunError,
    RunKey,
    SessionKey,
    WhenBusy,
)
from runlane_server.core.retry import RetryPolicy
from runlane_server.core.transition import Outcome
from runlane_server.store.base import (
    AgentShare,
    ClaimOrder,
    HostedRun,
    NewSession,
    TenantShare,
)
from runlane_server.store.postgres import log as postgres_log
from runlane_server.store.postgres.connection import Connector
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.notifier import WakeUp
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.store import PostgresStore
from support.postgres import Connection, listening, postgres_store
from support.story import START, TENANT, Story, Witness, request

SECONDS = 60.0
LEASE = 3.0
HOLD = 60.0


@pytest.fixture
async def nodes(
    postgres_url: str, beside: Connection
) -> AsyncIterator[tuple[PostgresStore, PostgresStore]]:
    """Two nodes, `one` and `two`, which have joined a database that has run for a lease."""
    while not await beside.fetchval(
        "SELECT pg_postmaster_start_time() < now() - $1 * interval '1 second'", LEASE
    ):
        await asyncio.sleep(0.1)
    async with AsyncExitStack() as closing:
        one = await closing.enter_async_context(postgres_store(postgres_url))
        two = await closing.enter_async_context(postgres_store(postgres_url))
        one.listener, two.listener = Witness(), Witness()
        await one.cluster.join("one", "one:1")
        await two.cluster.join("two", "two:2")
        yield one, two


async def silence(beside: Connection, node_id: str, seconds: float = LEASE + 1) -> None:
    """A node has said nothing for so long."""
    changed = await beside.execute(
        "UPDATE nodes SET heartbeat = now() - $2 * interval '1 second' WHERE node_id = $1",
        node_id,
        seconds,
    )
    assert changed == "UPDATE 1"


async def known(beside: Connection) -> dict[str, bool]:
    """The nodes that are known, and whether each is lost."""
    rows = await beside.fetch("SELECT node_id, lost FROM nodes ORDER BY node_id")
    return {row["node_id"]: row["lost"] for row in rows}


async def started(store: PostgresStore, session_id: str, host: str, *more: str) -> Story:
    """A session with a run that is active on a node, and those that wait behind it."""
    story = Story(store, session_id)
    await story.accept(session_id, *more)
    await story.start(host)
    return story


def hosted(*stories: Story) -> list[HostedRun]:
    """The active runs of those sessions."""
    found = []
    for story in stories:
        active = story.lane.active
        assert active is not None
        found.append(HostedRun(story.key, active.run_id, active.attempt, active.host))
    return found


# --- Who is alive -------------------------------------------------------------------------------


async def test_a_node_is_alive_from_when_it_joins_until_it_leaves(
    nodes: Sequence[PostgresStore],
) -> None:
    one, two = nodes
    assert await one.cluster.heartbeat("one", LEASE)
    assert not await one.cluster.heartbeat("nobody", LEASE)
    await one.cluster.leave("one")
    assert not await one.cluster.heartbeat("one", LEASE)
    assert await two.cluster.heartbeat("two", LEASE)


async def test_a_node_that_was_silent_for_its_lease_is_lost_for_good(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    one, two = nodes
    await silence(beside, "one", LEASE - 1)
    assert await two.cluster.heartbeat("two", LEASE)
    assert await known(beside) == {"one": False, "two": False}
    await silence(beside, "one")
    assert await two.cluster.heartbeat("two", LEASE)
    assert await known(beside) == {"one": True, "two": False}
    assert not await one.cluster.heartbeat("one", LEASE)
    await one.cluster.join("one", "one:1")
    assert not await one.cluster.heartbeat("one", LEASE)
    await one.cluster.join("one again", "one:1")
    assert await one.cluster.heartbeat("one again", LEASE)
    assert await known(beside) == {"one": True, "one again": False, "two": False}


async def test_lost_node_declares_no_other_lost(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    one, two = nodes
    await silence(beside, "one")
    assert await two.cluster.heartbeat("two", LEASE)
    await silence(beside, "two")
    assert not await one.cluster.heartbeat("one", LEASE)
    assert await known(beside) == {"one": True, "two": False}


async def test_first_node_back_after_an_outage_declares_no_other_lost(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    one, two = nodes
    await silence(beside, "one")
    await silence(beside, "two")
    for _ in range(3):
        assert await one.cluster.heartbeat("one", LEASE)
    assert await known(beside) == {"one": False, "two": False}
    assert await two.cluster.heartbeat("two", LEASE)
    # Who still says nothing when a lease has passed by is lost.
    await beside.execute(
        "UPDATE nodes SET steady_since = steady_since - $1 * interval '1 second'"
        " WHERE node_id = 'one'",
        LEASE,
    )
    await silence(beside, "two")
    assert await one.cluster.heartbeat("one", LEASE)
    assert await known(beside) == {"one": False, "two": True}


async def test_no_node_is_lost_within_a_lease_after_the_start_of_the_database(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    _, two = nodes
    days = 1_000 * 86_400.0
    await silence(beside, "one", days + 1)
    assert await two.cluster.heartbeat("two", days)
    assert await known(beside) == {"one": False, "two": False}
    assert await two.cluster.heartbeat("two", LEASE)
    assert await known(beside) == {"two": False}  # gone for more than a day


async def test_nodes_that_are_gone_for_a_day_are_forgotten(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    one, two = nodes
    day = 24 * 3600.0
    await two.cluster.join("lost", "")
    await two.cluster.join("long lost", "")
    for name in ("lost", "long lost"):
        await silence(beside, name)
    assert await one.cluster.heartbeat("one", LEASE)
    await silence(beside, "lost", day - 60)
    await silence(beside, "long lost", day + 60)
    await silence(beside, "two", day + 60)
    assert await one.cluster.heartbeat("one", LEASE)
    assert await known(beside) == {"lost": True, "one": False}
    assert not await two.cluster.heartbeat("two", LEASE)


async def test_a_beat_does_not_wait_for_the_rows_of_others(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    one, two = nodes
    await silence(beside, "two")
    async with beside.transaction():
        await beside.execute("SELECT FROM nodes WHERE node_id = 'two' FOR UPDATE")
        assert await one.cluster.heartbeat("one", LEASE)
    assert await known(beside) == {"one": False, "two": False}
    assert await two.cluster.heartbeat("two", LEASE)


async def test_concurrent_heartbeats_do_not_block_each_other(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    """Half of the nodes are silent, and all the others notice at once."""
    names = [f"n{n}" for n in range(20)]
    for name in names:
        await nodes[0].cluster.join(name, "")
    for name in names[::2]:
        await silence(beside, name)
    talking = names[1::2]
    async with asyncio.timeout(SECONDS):
        for _ in range(10):
            answers = await asyncio.gather(
                *(nodes[n % 2].cluster.heartbeat(name, LEASE) for n, name in enumerate(talking))
            )
            assert all(answers)
    lost = await known(beside)
    assert [name for name in names if lost[name]] == names[::2]


# --- Runs of nodes ------------------------------------------------------------------------------


async def test_host_of_a_run_is_kept_while_it_is_active(nodes: Sequence[PostgresStore]) -> None:
    one, two = nodes
    story = await started(one, "s", "one")
    await story.accept(request("joins", when_busy=WhenBusy.FOLD), "waits")
    await story.fold()
    lane = await two.load_lane(story.key)
    assert lane == story.lane
    assert lane.active is not None
    assert lane.active.host == "one"
    assert [run.host for run in (*lane.folded, *lane.waiting)] == ["", ""]
    await story.lose_node()
    lane = await two.load_lane(story.key)
    assert lane == story.lane
    assert [run.host for run in lane.waiting] == [""] * 3
    await story.start("two")
    await story.cancel(CancelScope.ACTIVE)
    lane = await one.load_lane(story.key)
    assert lane == story.lane
    assert lane.active is not None
    assert lane.active.host == "two"


async def test_r09_runs_of_nodes_that_are_lost_or_gone_are_found(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    one, two = nodes
    await started(one, "alive", "one")
    ended = await started(one, "ended", "two")
    await ended.finish()
    retried = await started(one, "retried", "two")
    await retried.lose_node()
    late, early, left = (Story(one, name) for name in ("late", "early", "left"))
    for n, (story, host) in enumerate(((early, "two"), (left, "left"), (late, "two"))):
        story.now = START + 100 * (n + 1)
        await story.accept(story.session_id)
        await story.start(host)
    await early.accept(request("joins", when_busy=WhenBusy.FOLD), "waits")
    await early.fold()
    await early.cancel(CancelScope.ACTIVE)
    await one.cluster.join("left", "")
    assert await one.cluster.lost_runs(9) == []
    await one.cluster.leave("left")
    assert await one.cluster.lost_runs(9) == hosted(left)
    await silence(beside, "two")
    assert await one.cluster.lost_runs(9) == hosted(left)
    assert await one.cluster.heartbeat("one", LEASE)
    for store in (one, two):
        assert await store.cluster.lost_runs(9) == hosted(early, left, late)
        assert await store.cluster.lost_runs(2) == hosted(early, left)
    await late.lose_node()
    assert await one.cluster.lost_runs(9) == hosted(early, left)
    assert [run.host for run in await one.cluster.lost_runs(9)] == ["two", "left"]


async def test_r21_each_lost_run_is_in_the_share_of_one_living_node(
    nodes: Sequence[PostgresStore],
) -> None:
    one, _ = nodes
    await one.cluster.join("three", "")
    stories = [await started(one, f"s{n}", "gone") for n in range(30)]
    shares = [await one.cluster.lost_runs(99, name) for name in ("one", "two", "three")]
    assert all(shares)
    assert sorted(run.run_id for share in shares for run in share) == sorted(
        run.run_id for run in hosted(*stories)
    )
    await one.cluster.leave("three")
    shares = [await one.cluster.lost_runs(99, name) for name in ("one", "two")]
    assert sum(map(len, shares)) == 30


async def test_r19_runs_that_were_cancelled_elsewhere_are_found(
    nodes: Sequence[PostgresStore],
) -> None:
    one, two = nodes
    here = await started(one, "here", "one", "waits")
    await here.accept(request("joins", when_busy=WhenBusy.FOLD))
    await here.fold()
    there = await started(one, "there", "two")
    await started(one, "other", "one")
    assert await one.cluster.cancelled_runs("one") == []
    for story in (here, there):
        elsewhere = replace(story, store=two)
        elsewhere.lane = await two.load_lane(story.key)
        await elsewhere.cancel(CancelScope.ACTIVE)
        story.lane = elsewhere.lane
    assert await one.cluster.cancelled_runs("one") == hosted(here)
    assert await two.cluster.cancelled_runs("two") == hosted(there)
    await here.finish()
    assert await one.cluster.cancelled_runs("one") == []


async def test_hosts_returns_the_addresses_of_active_runs(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    one, two = nodes
    nul = "a\0b"
    other = Story(one, nul, tenant=nul)
    await other.accept(nul)
    await other.start("two")
    await started(one, "mine", "one", "waits")
    ended = await started(one, "ended", "one")
    await ended.finish()
    await started(one, "nobodys", "")
    names = ("mine", "waits", "ended", "nobodys", "unknown")
    keys = [RunKey(nul, nul), *(RunKey(TENANT, name) for name in names)]
    mine = {RunKey(TENANT, "mine"): "one:1"}
    assert await two.cluster.hosts(keys) == {RunKey(nul, nul): "two:2"} | mine
    assert await two.cluster.hosts([]) == {}
    await silence(beside, "two")
    assert await one.cluster.heartbeat("one", LEASE)
    assert await one.cluster.hosts(keys) == mine


# --- Lanes that wait ----------------------------------------------------------------------------


async def waiting(store: PostgresStore, count: int) -> list[Story]:
    """Sessions with a run that waits; the last one has waited longest."""
    stories = [Story(store, f"s{n:02}", now=START + 1_000 - 10 * n) for n in range(count)]
    for story in stories:
        await story.accept(f"r{story.session_id}")
    return stories


def keys_of(stories: Sequence[Story]) -> list[SessionKey]:
    return [story.key for story in stories]


async def test_r08_each_lane_that_waits_is_claimed_by_one_node_the_oldest_first(
    nodes: Sequence[PostgresStore],
) -> None:
    one, two = nodes
    oldest = (await waiting(one, 5))[::-1]
    await started(one, "busy", "one", "more")
    await Story(one, "idle").play("idle")
    assert await one.cluster.claim("one", 2, HOLD) == keys_of(oldest[:2])
    assert await two.cluster.claim("two", 2, HOLD) == keys_of(oldest[2:4])
    assert await one.cluster.claim("one", 9, HOLD) == keys_of([*oldest[:2], oldest[4]])
    assert await two.cluster.claim("two", 9, HOLD) == keys_of(oldest[2:4])


async def test_nodes_that_claim_at_once_get_different_lanes(
    nodes: Sequence[PostgresStore],
) -> None:
    stories = await waiting(nodes[0], 40)
    names = [f"n{n}" for n in range(10)]
    found = await asyncio.gather(
        *(nodes[n % 2].cluster.claim(name, 4, HOLD) for n, name in enumerate(names))
    )
    claimed = [key for keys in found for key in keys]
    assert len(set(claimed)) == len(claimed)
    rest = await nodes[0].cluster.claim("rest", 40, HOLD)
    assert sorted(claimed + list(rest)) == sorted(keys_of(stories))


async def test_a_claim_ends_with_its_time(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    one, two = nodes
    stories = await waiting(one, 2)
    assert len(await one.cluster.claim("one", 9, HOLD)) == 2
    assert await two.cluster.claim("two", 9, HOLD) == []
    await beside.execute(
        "UPDATE sessions SET claimed_until = claimed_until - $1 * interval '1 second'"
        " WHERE session_id = $2",
        HOLD,
        stories[0].session_id,
    )
    assert await two.cluster.claim("two", 9, HOLD) == keys_of(stories[:1])
    assert await one.cluster.claim("one", 9, HOLD) == keys_of(stories[1:])


async def test_r38_no_node_claims_a_lane_before_its_backoff_is_over(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    one, two = nodes
    policy = RetryPolicy((), 3, initial_backoff=60_000_000, max_backoff=60_000_000)
    story = Story(one)
    await story.accept(request("first")._replace(retry=policy))
    await story.start("one")
    assert await two.cluster.claim("two", 9, HOLD) == []
    failed = Outcome(FinishReason.ERROR, RunError("BUSY", "try again"))
    assert await story.commit(story.finishing(failed)) is None
    await story.accept("second")
    for store, node in ((one, "one"), (two, "two")):
        assert await store.cluster.claim(node, 9, HOLD) == []
        assert (await store.load_lane(story.key)).backing_off == story.lane.waiting[0]
    over = "UPDATE sessions SET claimed_until = claimed_until - interval '61 seconds'"
    await beside.execute(over)
    assert await two.cluster.claim("two", 9, HOLD) == [story.key]


async def test_r38_no_run_behind_a_backoff_changes_its_hold(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    one, two = nodes
    policy = RetryPolicy((), 3, initial_backoff=60_000_000, max_backoff=60_000_000)
    story = Story(one)
    await story.accept(request("first")._replace(retry=policy))
    await story.start("one")
    await story.commit(story.finishing(Outcome(FinishReason.ERROR, RunError("BUSY", "again"))))
    for name in ("second", "third"):
        story.now += 29_000_000
        await story.accept(request(name)._replace(retry=policy))
        assert await two.cluster.claim("two", 9, HOLD) == []
    left = "SELECT claimed_until - clock_timestamp() < interval '3 seconds' FROM sessions"
    assert await beside.fetchval(left)
    await story.cancel(CancelScope.RUN, "second")
    assert await two.cluster.claim("two", 9, HOLD) == []
    await story.cancel(CancelScope.RUN, "first")
    assert await two.cluster.claim("two", 9, HOLD) == [story.key]


async def test_r38_a_lane_is_claimed_at_once_after_a_cancel_during_the_backoff(
    nodes: Sequence[PostgresStore],
) -> None:
    one, two = nodes
    policy = RetryPolicy((), 3, initial_backoff=60_000_000, max_backoff=60_000_000)
    story = Story(one)
    await story.accept(request("first")._replace(retry=policy), "second")
    await story.start("one")
    await story.commit(story.finishing(Outcome(FinishReason.ERROR, RunError("BUSY", "again"))))
    assert await two.cluster.claim("two", 9, HOLD) == []
    await story.cancel(CancelScope.RUN, "first")
    assert await two.cluster.claim("two", 9, HOLD) == [story.key]


async def test_a_claim_does_not_touch_the_lane_and_ends_when_it_is_started(
    nodes: Sequence[PostgresStore],
) -> None:
    one, two = nodes
    (story,) = await waiting(one, 1)
    assert await two.cluster.claim("two", 9, HOLD) == [story.key]
    assert await two.load_lane(story.key) == story.lane
    await story.accept("second")  # with the lane as it was cached
    assert await one.cluster.claim("one", 9, HOLD) == []
    await story.start("one")
    assert await two.cluster.claim("two", 9, HOLD) == []
    await story.finish()
    assert await one.cluster.claim("one", 9, HOLD) == [story.key]


async def test_a_lane_that_is_being_written_is_passed_over(
    nodes: Sequence[PostgresStore], beside: Connection
) -> None:
    story, other = await waiting(nodes[0], 2)
    async with asyncio.timeout(SECONDS), beside.transaction():
        await beside.execute(
            "UPDATE sessions SET title = 'held' WHERE session_id = $1", story.session_id
        )
        assert await nodes[0].cluster.claim("one", 9, HOLD) == [other.key]


async def crowds(store: PostgresStore, **counts: int) -> dict[str, list[SessionKey]]:
    """Tenants with so many lanes that wait, those of the first for longest."""
    found: dict[str, list[SessionKey]] = {}
    now = START
    for tenant, count in counts.items():
        stories = [Story(store, f"s{n:03}", tenant, now + n) for n in range(count)]
        now += 1_000
        await asyncio.gather(*(story.accept(story.session_id) for story in stories))
        found[tenant] = keys_of(stories)
    return found


async def test_lanes_are_claimed_in_equal_shares_for_the_tenants(
    nodes: Sequence[PostgresStore],
) -> None:
    one, two = nodes
    lanes = await crowds(one, noisy=50, quiet=2, other=9)
    first = await one.cluster.claim("one", 9, HOLD)
    assert sorted(first) == sorted(lanes["noisy"][:3] + lanes["quiet"] + lanes["other"][:3])
    # What the one with less than its share has left is another's with the next claim.
    assert sorted(await two.cluster.claim("two", 8, HOLD)) == sorted(
        lanes["noisy"][3:7] + lanes["other"][3:7]
    )


async def test_served_tenant_comes_after_an_unserved_one(nodes: Sequence[PostgresStore]) -> None:
    one, two = nodes
    lanes = await crowds(one, noisy=50, other=5, quiet=5)
    served = ClaimOrder((TenantShare("other", 9), TenantShare("noisy", 9)))
    assert await one.cluster.claim("one", 1, HOLD, served) == lanes["quiet"][:1]
    served = ClaimOrder((TenantShare("other", 9), TenantShare("noisy", 9), TenantShare("quiet", 9)))
    assert await two.cluster.claim("two", 1, HOLD, served) == lanes["other"][:1]
    # Of those who had none, the longest waiting comes first.
    assert await two.cluster.claim("three", 1, HOLD) == lanes["noisy"][:1]


def for_agents(**rooms: int) -> ClaimOrder:
    return ClaimOrder(agents=tuple(AgentShare(agent, room) for agent, room in rooms.items()))


async def of_agents(store: PostgresStore, tenant: str, *agents: str) -> list[Story]:
    """Sessions with one waiting run each, of these agents, the first waiting for longest."""
    stories = []
    for n, agent in enumerate(agents):
        story = Story(store, f"{tenant}-{n}", tenant, START + n)
        await store.create_session(NewSession(story.key, START, agent=agent))
        story.lane = await store.load_lane(story.key)
        await story.accept(f"{tenant}-{n}")
        stories.append(story)
    return stories


async def test_r32_a_node_claims_only_lanes_whose_next_run_it_can_execute(
    nodes: Sequence[PostgresStore],
) -> None:
    one, two = nodes
    first, second, third = await of_agents(one, "t", "a", "b", "a")
    assert await one.cluster.claim("one", 9, HOLD, for_agents(c=9)) == []
    assert await one.cluster.claim("one", 9, HOLD, for_agents(b=9)) == [second.key]
    # No more than the agent has room for, the longest waiting first.
    assert await two.cluster.claim("two", 9, HOLD, for_agents(a=1)) == [first.key]
    # The next run of a lane counts, and not those behind it.
    await third.accept(request("behind")._replace(agent="b"))
    await third.cancel(CancelScope.RUN, "t-2")
    assert await one.cluster.claim("one", 9, HOLD, for_agents(b=9)) == [second.key, third.key]
    assert await two.cluster.claim("two", 9, HOLD, for_agents(a=9)) == [first.key]


async def test_a_claim_takes_no_more_of_a_tenant_than_it_has_room_for(
    nodes: Sequence[PostgresStore],
) -> None:
    one, two = nodes
    lanes = await crowds(one, noisy=50, full=5, quiet=5)
    order = ClaimOrder((TenantShare("noisy", 2), TenantShare("full", 0)), others=3)
    found = await one.cluster.claim("one", 64, HOLD, order)
    assert sorted(found) == sorted(lanes["noisy"][:2] + lanes["quiet"][:3])
    assert await two.cluster.claim("two", 64, HOLD, ClaimOrder(others=0)) == []


async def test_tenant_without_unclaimed_lanes_uses_no_share(
    nodes: Sequence[PostgresStore],
) -> None:
    one, two = nodes
    lanes = await crowds(one, quiet=2, noisy=5)
    assert sorted(await one.cluster.claim("one", 4, HOLD)) == sorted(
        lanes["quiet"] + lanes["noisy"][:2]
    )
    assert await two.cluster.claim("two", 1, HOLD) == lanes["noisy"][2:3]


async def test_a_claim_reads_a_few_lanes_of_a_tenant_that_has_thousands(
    nodes: Sequence[PostgresStore], postgres_url: str
) -> None:
    """Also by a plan that was made while there were none, and if half of them, the longest waiting
    among them, wait for another agent."""
    beside = await Connector(Database.parse(postgres_url)).connect()
    claim = "EXECUTE claim('one', 8, '60 s', '{noisy}', '{5}', 9, '{\"\",default}', '{9,9}')"
    await beside.execute("SET plan_cache_mode = force_generic_plan")
    await beside.execute(f"PREPARE claim AS {SQL['claim']}")
    assert await beside.fetch(claim) == []
    await crowds(nodes[0], quiet=1)
    await beside.execute(
        "INSERT INTO sessions (version, accept_seq, turn, waiting_runs, waiting_since, created_at,"
        " updated_at, tenant, session_id, active_run_id, title)"
        " SELECT 1, 1, 0, 1, $1::bigint + n, $1, $1, 'noisy', 'x' || n, '', ''"
        " FROM generate_series(1, 20000) AS n",
        START,
    )
    await beside.execute("UPDATE sessions SET next_agent = 'a' WHERE waiting_since % 2 = 1")
    rows = await beside.fetch(f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {claim}")
    plan = json.loads(rows[0][0])[0]["Plan"]
    touched = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    # A seek is a few blocks, and a row that is claimed some more; all lanes would be thousands.
    assert touched < 300, rows[0][0]
    assert plan["Actual Rows"] == 5
    await beside.close()


async def test_runs_that_wait_are_counted(nodes: Sequence[PostgresStore]) -> None:
    one, two = nodes
    assert await one.cluster.waiting_runs() == {}
    await waiting(one, 3)
    busy = await started(one, "busy", "one", "b1", "b2")
    elsewhere = Story(one, tenant="a\0b")
    await elsewhere.accept("x")
    assert await two.cluster.waiting_runs() == {TENANT: 5, "a\0b": 1}
    await busy.finish()
    await busy.start("one")
    assert await two.cluster.waiting_runs() == {TENANT: 4, "a\0b": 1}
    await busy.cancel()
    assert await two.cluster.waiting_runs() == {TENANT: 3, "a\0b": 1}
    await elsewhere.cancel()
    assert await two.cluster.waiting_runs() == {TENANT: 3}


# --- Wake-ups -----------------------------------------------------------------------------------


async def test_a_wake_up_reaches_the_others_and_not_oneself(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_log, "POLL_SECONDS", 3_600.0)
    async with (
        postgres_store(postgres_url) as one,
        postgres_store(postgres_url) as two,
    ):
        one.listener, two.listener = here, there = Witness(), Witness()
        await listening(postgres_url, 2)
        woken = {"one": 0, "two": 0}
        heard = asyncio.Event()

        def wake(name: str) -> None:
            woken[name] += 1
            heard.set()

        one.cluster.on_wake = lambda: wake("one")
        two.cluster.on_wake = lambda: wake("two")
        async with asyncio.timeout(SECONDS):
            # What is said of the log is not said of work.
            await Story(one, "a").play("a")
            while not there.log:
                await asyncio.sleep(0.001)
            assert woken == {"one": 0, "two": 0}
            for _ in range(50):
                one.cluster.wake()
            await heard.wait()
            assert woken == {"one": 0, "two": 1}
            # What this node says comes to the other one after its own: it passed that over.
            await Story(two, "b").play("b")
            while len(here.log) < 2:
                await asyncio.sleep(0.001)
        assert woken == {"one": 0, "two": 1}


async def test_wake_up_names_its_purpose(nodes: Sequence[PostgresStore]) -> None:
    notifier = nodes[0]._open.notifier
    assert notifier.parse("other 17 0") == WakeUp(17, work=False)
    assert notifier.parse("other 0 1") == WakeUp(0, work=True)
    assert notifier.parse(f"{notifier._sender} 17 1") is None
    for foreign in ("", "17", "a b c", "a 1 2", "a 1 1 x"):
        said = notifier.parse(foreign)
        assert said is not None
        assert said.work
        assert said.position > 1 << 60
