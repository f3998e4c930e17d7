"""Subscriptions: no event is lost, repeated or reordered, and no subscriber delays another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from runlane_server.core.errors import CursorCompacted, CursorInvalid, Draining, RunNotFound
from runlane_server.core.model import Prompt, Run, RunComplete, RunEvent, RunKey, TextDelta
from runlane_server.feed import feed as feed_module
from runlane_server.feed.feed import Subscription
from runlane_server.store.base import EventFilter
from support.node import Node
from support.staging import SECONDS, say, script, wait

pytestmark = pytest.mark.stores("memory", "sqlite")

TENANT = "default"
ALL = EventFilter()


@contextmanager
def subscribed(
    node: Node, wanted: EventFilter = ALL, after: int | None = None
) -> Iterator[Subscription]:
    """A subscription, by default from the current position."""
    start = node.feed.position if after is None else after
    subscription = node.feed.subscribe(TENANT, wanted, start)
    try:
        yield subscription
    finally:
        subscription.close()


async def take(subscription: Subscription, number: int) -> list[RunComplete]:
    """Returns the next events; there must be exactly `number`."""
    taken: list[RunComplete] = []
    while len(taken) < number:
        page = await subscription.next(SECONDS)
        assert page.events, f"only {len(taken)} of {number} events came"
        taken += [event.complete for event in page.events]
    assert len(taken) == number
    return taken


async def test_an_idle_subscription_returns_no_events_after_its_timeout(node: Node) -> None:
    with subscribed(node) as subscription:
        page = await subscription.next(0.01)
        assert (page.events, page.scanned) == ((), node.feed.position)


async def test_a_filter_passes_only_its_sessions_and_runs(node: Node) -> None:
    named = await node.start_blocked("named", "g")
    wanted = EventFilter(session_ids=frozenset({"a", "b"}), run_ids=frozenset({named.run_id}))
    with subscribed(node, wanted) as subscription:
        for session_id in ("a", "x", "y", "b", "named"):
            await node.coordinator.run(session_id, Prompt("x")) if session_id != "named" else None
        node.latches.open("g")
        await node.end(named.run_id)
        await node.coordinator.run("named", Prompt("x"))
        taken = await take(subscription, 3)
        assert [complete.session_id for complete in taken] == ["a", "b", "named"]
        page = await subscription.next(0.01)
        assert (page.events, page.scanned) == ((), node.feed.position)


async def test_the_position_of_a_filter_without_matches_moves_with_the_log(node: Node) -> None:
    wanted = EventFilter(session_ids=frozenset({"a"}))
    with subscribed(node, wanted, after=0) as subscription:
        assert (await subscription.next(0.01)).events == ()
        for _ in range(5):
            await node.coordinator.run("b", Prompt("x"))
        assert (await subscription.next(0.01)).scanned == node.feed.position == 5
        await node.coordinator.run("a", Prompt("x"))
        assert [c.session_id for c in await take(subscription, 1)] == ["a"]


async def test_r25_a_subscription_resumes_after_any_position(node: Node) -> None:
    for n in range(6):
        await node.coordinator.run("s", Prompt(str(n)))
    for after in range(7):
        with subscribed(node, after=after) as subscription:
            if after < 6:
                taken = await take(subscription, 6 - after)
                assert [c.text for c in taken] == [str(n) for n in range(after, 6)]
            assert (await subscription.next(0.01)).events == ()


async def test_r25_a_subscriber_behind_the_tail_reads_from_the_store(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.feed._tails, "_budget", 4 * 4100)
    monkeypatch.setattr(feed_module, "PAGE_EVENTS", 3)
    with subscribed(node) as slow, subscribed(node) as fast:
        received: list[RunComplete] = []
        for n in range(20):
            await node.coordinator.run("s", Prompt(str(n)))
            received += await take(fast, 1)
        assert await take(slow, 20) == received


async def test_r25_a_subscription_opened_during_writes_misses_no_event(node: Node) -> None:
    subscriptions: list[Subscription] = []

    async def subscribe_often() -> None:
        for _ in range(30):
            subscriptions.append(node.feed.subscribe(TENANT, ALL, 0))
            await asyncio.sleep(0)

    runs = [node.coordinator.run(f"s{n}", Prompt("x")) for n in range(30)]
    await asyncio.gather(subscribe_often(), *runs)
    expected = [complete.run_id for complete in await node.completes()]
    for subscription in subscriptions:
        assert [c.run_id for c in await take(subscription, 30)] == expected
        subscription.close()


async def test_r25_a_compacted_cursor_is_refused(node: Node) -> None:
    for n in range(5):
        await node.coordinator.run("s", Prompt(str(n)))
    third = (await node.completes())[2]
    removed = await node.store.compact(third.ended_at + 1, limit=100)
    assert removed >= 3
    with pytest.raises(CursorCompacted):
        node.feed.subscribe(TENANT, ALL, removed - 1)
    with subscribed(node, after=removed) as subscription:
        assert len(await take(subscription, 5 - removed)) == 5 - removed
    run = (await node.store.list_runs(TENANT, limit=100)).items[-1]
    assert (await node.end(run.run_id)).text == "0"


async def test_r25_a_cursor_from_the_future_is_refused(node: Node) -> None:
    with pytest.raises(CursorInvalid):
        node.feed.subscribe(TENANT, ALL, node.feed.position + 1)


async def test_closing_the_feed_ends_all_waits_with_draining(node: Node) -> None:
    run = await node.start_blocked("s", "g")
    with subscribed(node) as subscription:
        follower = node.feed.follow(RunKey(TENANT, run.run_id), 100)
        waiting = [
            asyncio.ensure_future(subscription.next(SECONDS)),
            asyncio.ensure_future(follower.next()),
            asyncio.ensure_future(node.coordinator.wait_run(run.run_id, timeout=None)),
        ]
        await asyncio.sleep(0)
        node.feed.close()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, Draining)
        follower.close()
    with pytest.raises(Draining):
        node.feed.subscribe(TENANT, ALL, 0)


async def test_events_committed_before_the_feed_closed_are_delivered_first(
    node: Node,
) -> None:
    with subscribed(node) as subscription:
        run = await node.queue("s", "last words")
        await node.end(run.run_id)
        follower = node.feed.follow(RunKey(TENANT, run.run_id), 0)
        node.feed.close()
        assert [c.text for c in await take(subscription, 1)] == ["last words"]
        with pytest.raises(Draining):
            await subscription.next(SECONDS)
        assert isinstance((await follower.next())[-1].body, RunComplete)
        with pytest.raises(Draining):
            await follower.next()
        follower.close()


async def test_closed_subscriptions_leave_nothing_in_the_feed(node: Node) -> None:
    wanted = EventFilter(session_ids=frozenset({"a", "b"}), run_ids=frozenset({"r"}))
    with subscribed(node, wanted), subscribed(node):
        assert node.feed.subscriptions == 2
        follower = node.feed.follow(RunKey(TENANT, "r"), 0)
        assert node.feed.subscriptions == 3
        follower.close()
    assert node.feed.subscriptions == 0


async def test_follower_of_a_deleted_run_gets_its_end_with_its_number(node: Node) -> None:
    run = (await node.accept("s", script(say("a"), say("b")))).run
    complete = await node.end(run.run_id)
    everything = await follow(node, run.run_id)
    # It has read the first event only when the session is deleted.
    follower = node.feed.follow(RunKey(TENANT, run.run_id), 1)
    await node.coordinator.sessions.delete("s")
    rest = await follower.next()
    follower.close()
    assert len(rest) == 1
    assert rest[-1].body == complete
    assert rest[-1].index == everything[-1].index


async def test_follower_that_keeps_up_does_not_read_the_store_for_each_event(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"word {n}" for n in range(20)]
    steps = (step for word in words for step in (say(word), wait(word)))
    run = (await node.accept("s", script(*steps))).run
    reads: list[RunKey] = []
    get_run = node.store.get_run

    async def counted(key: RunKey) -> Run | None:
        reads.append(key)
        return await get_run(key)

    monkeypatch.setattr(node.store, "get_run", counted)
    follower = node.feed.follow(RunKey(TENANT, run.run_id), 0)
    for word in words:
        # It is called before there is an event, and waits for it.
        while (await follower.next())[-1].body != TextDelta(word):
            pass
        node.latches.open(word)
    await node.end(run.run_id)
    follower.close()
    assert len(reads) < 5


async def test_follower_of_a_run_deleted_with_its_log_is_told_so(node: Node) -> None:
    run = await node.queue("s", "x")
    await node.end(run.run_id)
    follower = node.feed.follow(RunKey(TENANT, run.run_id), 1)
    await node.coordinator.sessions.delete("s")
    await node.store.compact(1 << 62, 9)
    with pytest.raises(RunNotFound):
        await follower.next()
    follower.close()


async def follow(node: Node, run_id: str, after: int = 0) -> list[RunEvent]:
    """Returns all events of a run up to its end."""
    follower = node.feed.follow(RunKey(TENANT, run_id), after)
    events: list[RunEvent] = []
    while not (events and isinstance(events[-1].body, RunComplete)):
        events += await follower.next()
    follower.close()
    return events


async def test_followers_get_all_events_of_a_run_whenever_they_start(node: Node) -> None:
    steps = [say("a"), wait("one"), say("b"), wait("two"), say("c")]
    run = (await node.accept("s", script(*steps))).run
    await node.latches.reached("one")
    early = asyncio.create_task(follow(node, run.run_id))
    node.latches.open("one")
    await node.latches.reached("two")
    middle = asyncio.create_task(follow(node, run.run_id))
    node.latches.open("two")
    await node.end(run.run_id)
    late = await follow(node, run.run_id)
    assert await early == await middle == late
    assert [event.index for event in late] == list(range(1, len(late) + 1))
    assert await follow(node, run.run_id, after=2) == late[2:]


async def test_waiting_for_a_run_ends_with_its_timeout(node: Node) -> None:
    run = await node.start_blocked("s", "g")
    seen = await node.coordinator.wait_run(run.run_id, timeout=0)
    assert not seen.state.is_terminal
    seen = await node.coordinator.wait_run(run.run_id, timeout=0.01)
    assert not seen.state.is_terminal
    node.latches.open("g")
    assert (await node.end(run.run_id)).run_id == run.run_id


async def test_unfiltered_subscriptions_that_keep_up_share_a_page(node: Node) -> None:
    with subscribed(node) as one, subscribed(node) as other:
        run = await node.queue("s", "x")
        await node.end(run.run_id)
        assert await one.next(SECONDS) is await other.next(SECONDS)
        run = await node.queue("s", "y")
        await node.end(run.run_id)
        assert [c.run_id for c in await take(other, 1)] == [run.run_id]


async def test_each_wait_of_a_subscription_has_its_own_timeout(node: Node) -> None:
    """The timer of one wait also serves later ones, and must neither shorten nor extend them."""
    nothing = EventFilter(session_ids=frozenset({"nobody"}))
    with subscribed(node) as subscription, subscribed(node, nothing) as idle:
        waiting = asyncio.create_task(subscription.next(SECONDS))
        await asyncio.sleep(0)
        await node.coordinator.run("s", Prompt("x"))
        assert (await waiting).events
        assert (await subscription.next(0.01)).events == ()
        waiting = asyncio.create_task(subscription.next(0.05))
        await asyncio.sleep(0)
        await node.coordinator.run("s", Prompt("x"))
        assert (await waiting).events
        waiting = asyncio.create_task(subscription.next(SECONDS))
        await idle.next(0.1)
        assert not waiting.done()
        await node.coordinator.run("s", Prompt("x"))
        assert (await waiting).events


# --- Events written by another node --------------------------------------------------------------


@contextmanager
def disconnected(node: Node) -> Iterator[None]:
    """Disconnects the feed from the store, as if another node made the commits."""
    node.store.listener = None
    yield
    node.store.listener = node.feed


async def run_unpublished(node: Node, number: int) -> None:
    """Executes runs whose events are not published to the feed."""
    with disconnected(node):
        for n in range(number):
            await node.queue(f"unpublished{n}", "x")
        assert await node.coordinator.wait_idle(SECONDS)


async def publish(node: Node, after: int) -> None:
    """Publishes the log after a position to the feed."""
    page = await node.store.completes(TENANT, ALL, after=after, limit=99, max_bytes=1 << 30)
    node.feed.on_completes(page.events)


NO_MATCH = EventFilter(session_ids=frozenset({"nobody"}))


@pytest.mark.parametrize("wanted", [ALL, NO_MATCH], ids=["all", "filter"])
async def test_r25_events_compacted_before_publication_are_not_skipped(
    node: Node, wanted: EventFilter
) -> None:
    await node.coordinator.run("s", Prompt("before"))
    with subscribed(node, wanted) as idle, subscribed(node, wanted, after=0) as behind:
        waiting = asyncio.create_task(idle.next(SECONDS))
        await asyncio.sleep(0)
        await run_unpublished(node, 3)
        assert await node.store.compact(1 << 62, limit=4) == 4
        await node.coordinator.run("s", Prompt("after"))
        with pytest.raises(CursorCompacted):
            await waiting
        with pytest.raises(CursorCompacted):
            await behind.next(SECONDS)
    with subscribed(node, after=4) as subscription:
        assert [c.text for c in await take(subscription, 1)] == ["after"]


async def test_r25_a_subscription_past_the_compacted_events_continues(node: Node) -> None:
    """The cursor of a node that had received the removed events lies behind them."""
    with subscribed(node, after=0) as early:
        await run_unpublished(node, 3)
        with subscribed(node, after=2) as late:
            assert await node.store.compact(1 << 62, limit=2) == 2
            await publish(node, 2)
            assert len(await take(late, 1)) == 1
            with pytest.raises(CursorCompacted):
                await early.next(SECONDS)


async def test_r25_a_fully_compacted_log_ends_a_waiting_subscription(node: Node) -> None:
    with subscribed(node) as subscription:
        waiting = asyncio.create_task(subscription.next(SECONDS))
        await asyncio.sleep(0)
        await run_unpublished(node, 2)
        assert await node.store.compact(1 << 62, limit=9) == 2
        node.feed.on_completes(())
        with pytest.raises(CursorCompacted):
            await waiting
    assert node.feed.position == 2
    with subscribed(node) as subscription:
        await node.coordinator.run("s", Prompt("x"))
        assert [c.text for c in await take(subscription, 1)] == ["x"]


async def test_a_follower_gets_the_end_that_another_node_wrote(node: Node) -> None:
    run = (await node.accept("s", script(say("a"), wait("g"), say("b")))).run
    await node.latches.reached("g")
    key = RunKey(TENANT, run.run_id)
    known = len(await node.events(run.run_id))
    early = asyncio.create_task(follow(node, run.run_id))
    waiting = asyncio.create_task(follow(node, run.run_id, after=known))
    idle = node.feed.follow(key, known)
    await asyncio.sleep(0)
    # The tail exists and lacks the end.
    node.feed.on_run_events(key, (await node.events(run.run_id))[-1:])
    with disconnected(node):
        node.latches.open("g")
        assert await node.coordinator.wait_idle(SECONDS)
    await publish(node, 0)
    events = list(await node.events(run.run_id))
    async with asyncio.timeout(SECONDS):
        assert await early == events
        assert await waiting == events[known:]
        # A later follower finds the same tail.
        assert await follow(node, run.run_id, after=known) == events[known:]
    idle.close()


async def test_a_follower_gets_an_end_that_was_compacted_in_the_log(node: Node) -> None:
    run = await node.start_blocked("s", "g")
    following = asyncio.create_task(
        follow(node, run.run_id, after=len(await node.events(run.run_id)))
    )
    await asyncio.sleep(0)
    with disconnected(node):
        node.latches.open("g")
        assert await node.coordinator.wait_idle(SECONDS)
    assert await node.store.compact(1 << 62, limit=9) == 1
    await node.coordinator.run("other", Prompt("x"))
    async with asyncio.timeout(SECONDS):
        assert isinstance((await following)[-1].body, RunComplete)


async def test_a_follower_does_not_skip_events_that_another_node_wrote_in_between(
    node: Node,
) -> None:
    steps = [say("a"), wait("one"), say("b"), wait("two"), say("c")]
    run = (await node.accept("s", script(*steps))).run
    await node.latches.reached("one")
    key = RunKey(TENANT, run.run_id)
    following = asyncio.create_task(follow(node, run.run_id))
    await asyncio.sleep(0)
    node.feed.on_run_events(key, (await node.events(run.run_id))[-1:])
    known = len(await node.events(run.run_id))
    slow = node.feed.follow(key, known)
    with disconnected(node):
        node.latches.open("one")
        await node.latches.reached("two")
        while len(await node.events(run.run_id)) == known:
            await asyncio.sleep(0)
    node.latches.open("two")
    await node.end(run.run_id)
    events = list(await node.events(run.run_id))
    assert await following == events
    assert [event.index for event in await slow.next()] == [e.index for e in events[known:]]
    slow.close()
