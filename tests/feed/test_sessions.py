"""Streams of sessions: a snapshot, then everything after exactly its position (R50 to R52)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from runlane_server.core import lane as rules
from runlane_server.core.errors import CursorCompacted, Draining
from runlane_server.core.model import (
    Accepted,
    CancelScope,
    RunComplete,
    RunEvent,
    RunKey,
    RunState,
    SessionKey,
    Started,
    TextDelta,
    ToolCall,
    WhenBusy,
)
from runlane_server.core.transition import Lane
from runlane_server.feed import session_topics, sessions
from runlane_server.feed.feed import Feed
from runlane_server.feed.session_topics import Follower, SessionView
from runlane_server.feed.sessions import QueueChanged, SessionChanged, SessionPlace, Snapshot, Step
from runlane_server.store.base import NewSession, Store
from runlane_server.store.lane_log import LaneChange, LaneEntry, end_of
from support.asking import answer, ask, question, resume
from support.session_reader import Picture, drain, in_order, run_events, streaming
from support.staging import SECONDS
from support.story import PLENTY, START, Story, request

FUTURE = START + 1_000_000_000


def items(steps: list[Step], kind: type[Any]) -> list[Any]:
    return [step.item for step in steps if isinstance(step.item, kind)]


def named(steps: list[Step]) -> list[str]:
    """The events, as `run: kind`."""
    return [f"{it.run_id}: {type(it.body).__name__}" for it in items(steps, RunEvent)]


async def whole_log(story: Story) -> tuple[LaneEntry, ...]:
    page = await story.store.lane_events(story.key, after=0, limit=100_000, max_bytes=PLENTY)
    return page.entries


# --- The snapshot ---------------------------------------------------------------------------------


async def test_r50_snapshot_has_the_session_its_output_its_queue_and_its_questions(
    store: Store,
) -> None:
    feed, story = Feed(store), Story(store)
    await story.accept("a", "b", "c")
    await story.start()
    await story.append(TextDelta("one"), ToolCall("t", "tool", "{}"), TextDelta("two"))
    (name,) = await ask(story, question())
    with streaming(feed, "session") as stream:
        steps = await drain(stream)
        parts = items(steps, Snapshot)
        assert len(parts) == len(steps)
        assert [part.continues for part in parts] == [True] * (len(parts) - 1) + [False]
        first = parts[0]
        assert first.session.session_id == "session"
        assert (first.session.active_run_id, first.session.waiting_runs) == ("a", 2)
        assert (first.active_run.run_id, first.active_run.state) == ("a", RunState.INPUT_REQUIRED)
        output = [event for part in parts for event in part.output]
        assert output == list((await run_events(store, "a"))[1:])
        assert [run.run_id for part in parts for run in part.queue] == ["b", "c"]
        assert [it.input_request_id for part in parts for it in part.inputs] == [name]
        assert await drain(stream) == []


async def test_r50_tail_begins_exactly_at_the_snapshot(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    await story.accept("a", "b")
    await story.start()
    await story.append(TextDelta("before"))
    with streaming(feed, "session") as stream:
        await stream.next(0)
        # In the middle of the snapshot.
        await story.append(TextDelta("after"))
        await story.finish()
        await story.start()
        steps = await drain(stream)
        output = [event for part in items(steps, Snapshot) for event in part.output]
        assert [it.body.text for it in output if isinstance(it.body, TextDelta)] == ["before"]
        assert named(steps) == ["a: TextDelta", "a: RunComplete", "b: Started"]
        assert items(steps, SessionChanged)[-1].active_run.run_id == "b"
        assert items(steps, QueueChanged)[-1] == QueueChanged((), ())


async def test_r50_output_of_an_earlier_attempt_is_not_in_the_snapshot(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    await story.accept("a")
    await story.start()
    await story.append(TextDelta("lost"))
    await story.lose_node()
    await story.start()
    await story.append(TextDelta("kept"))
    with streaming(feed, "session") as stream:
        (output,) = [part.output for part in items(await drain(stream), Snapshot) if part.output]
        assert [type(it.body) for it in output] == [Started, TextDelta]
        assert output[1].body == TextDelta("kept")


async def test_r50_snapshot_has_the_runs_that_joined_the_turn(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    await story.accept("a", request("b", when_busy=WhenBusy.FOLD))
    await story.start()
    await story.fold()
    with streaming(feed, "session") as stream:
        parts = items(await drain(stream), Snapshot)
        (folded,) = [run for part in parts for run in part.folded]
        assert (folded.run_id, folded.state, folded.folded_into) == ("b", RunState.FOLDED, "a")


async def test_r50_large_snapshot_comes_in_parts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "PART_RUNS", 2)
    monkeypatch.setattr(sessions, "PAGE_BYTES", 1)
    feed, story = Feed(store), Story(store)
    await story.accept("a", "b", "c", "d")
    await story.start()
    await story.append(*(TextDelta(f"{n}") for n in range(5)))
    with streaming(feed, "session") as stream:
        parts = items(await drain(stream), Snapshot)
        assert [len(part.queue) for part in parts if part.queue] == [2, 1]
        assert [len(part.output) for part in parts if part.output] == [1] * 6
        assert {step.at for step in await drain(stream)} == set()


async def test_without_deltas_there_is_no_text(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "PAGE_BYTES", 1)
    feed, story = Feed(store), Story(store)
    await story.accept("a")
    await story.start()
    await story.append(TextDelta("1"), ToolCall("t", "tool", "{}"))
    with streaming(feed, "session", with_deltas=False) as stream:
        parts = items(await drain(stream), Snapshot)
        assert [type(it.body) for part in parts for it in part.output] == [Started, ToolCall]
        await story.append(*(TextDelta(f"{n}") for n in range(9)), ToolCall("u", "tool", "{}"))
        await story.append(TextDelta("2"), TextDelta("3"))
        await story.finish()
        assert named(await drain(stream)) == ["a: ToolCall", "a: RunComplete"]


# --- What happens afterwards ----------------------------------------------------------------------


async def test_r50_session_is_created_and_deleted_under_the_stream(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    with streaming(feed, "session", "other") as stream:
        assert [it.session for it in items(await drain(stream), Snapshot)] == [None] * 4
        await store.create_session(NewSession(story.key, START, title="t"))
        (created,) = items(await drain(stream), SessionChanged)
        assert created.session.title == "t"
        story.lane = await store.load_lane(story.key)
        await story.play("a")
        assert named(await drain(stream)) == ["a: Accepted", "a: Started", "a: RunComplete"]
        await story.play("b")
        await story.remove()
        last = await drain(stream)
        # Who keeps up misses nothing of what the deletion removed.
        assert named(last) == ["b: Accepted", "b: Started", "b: RunComplete"]
        assert last[-1] == Step(SessionChanged(None, None), SessionPlace())
        story.lane = Lane(story.key)
        await story.play("c")
        again = await drain(stream)
        assert named(again) == ["c: Accepted", "c: Started", "c: RunComplete"]
        assert items(again, SessionChanged)[-1].session is not None


async def test_r51_session_that_was_deleted_and_created_again_meanwhile(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    await story.play("a")
    with streaming(feed, "session") as stream:
        at = (await drain(stream))[-1].at
    await story.remove()
    story.lane, story.now = Lane(story.key), story.now + 50
    await story.play("b")
    with streaming(feed, "session", at=at) as stream:
        steps = await drain(stream)
        assert steps[0].item == SessionChanged(None, None)
        assert named(steps) == ["b: Accepted", "b: Started", "b: RunComplete"]


async def elsewhere(store: Store, feed: Feed, *steps: Coroutine[Any, Any, Any]) -> None:
    """A commit of another node: this one gets no notice."""
    store.listener = None
    for step in steps:
        await step
    store.listener = feed


@pytest.mark.parametrize("polled", ["", "before", "after", "late"])
@pytest.mark.parametrize("made_there", range(5))
async def test_r51_session_that_another_node_deletes_and_either_node_makes_again(
    store: Store, made_there: int, polled: str
) -> None:
    """The new one has fewer versions than the old one, as many, or more."""
    feed, story = Feed(store), Story(store)
    await story.accept("a")
    with streaming(feed, "session") as stream:
        await drain(stream)
        await story.start()
        await story.finish()
        steps = await drain(stream)
        old = steps[-1].at.created_at
        await elsewhere(store, feed, story.remove())
        if polled == "before":
            feed.sessions.on_version(story.key, 0)
        story.lane, story.now = Lane(story.key), story.now + 50
        await elsewhere(store, feed, *(story.accept(f"t{n}") for n in range(made_there)))
        if polled == "after":
            feed.sessions.on_version(story.key, story.lane.version)
        await story.accept("c", "d")
        if polled == "late":
            # Read before the last commits of this node.
            feed.sessions.on_version(story.key, made_there)
        again = await drain(stream)
        ended = again.index(Step(SessionChanged(None, None), SessionPlace()))
        # As many versions look like none in between, until the session is read.
        assert ended == 0 or made_there == 3
        again = again[ended:]
        assert named(again) == [
            f"{it.event.run_id}: {type(it.event.body).__name__}" for it in await whole_log(story)
        ]
        session = await store.get_session(story.key)
        assert session is not None
        assert {step.at.created_at for step in again[1:]} == {session.created_at} != {old}
        run = await story.start()
        assert named(await drain(stream)) == [f"{run.run_id}: Started"]


@pytest.mark.parametrize("made_there", [1, 2, 4])
async def test_r51_session_that_another_node_deletes_and_makes_again(
    store: Store, made_there: int
) -> None:
    feed, story = Feed(store), Story(store)
    await story.accept("a")
    with streaming(feed, "session") as stream:
        await drain(stream)
        await story.start()
        await story.finish()
        await drain(stream)
        await elsewhere(store, feed, story.remove())
        story.lane, story.now = Lane(story.key), story.now + 50
        await elsewhere(store, feed, *(story.accept(f"t{n}") for n in range(made_there)))
        feed.sessions.on_version(story.key, made_there)
        again = await drain(stream)
        assert again[0] == Step(SessionChanged(None, None), SessionPlace())
        assert named(again) == [f"t{n}: Accepted" for n in range(made_there)]


async def test_r50_poll_before_the_report_of_a_creation_ends_nothing(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    with streaming(feed, "session") as stream:
        await drain(stream)
        # The other nodes' commits are looked for between a commit and its report.
        await elsewhere(store, feed, story.accept("a"))
        feed.sessions.on_version(story.key, 1)
        first = await drain(stream)
        feed.on_lane(LaneChange(story.key, 0, 1, tuple(await run_events(store, "a"))))
        await story.start()
        steps = first + await drain(stream)
        assert named(steps) == ["a: Accepted", "a: Started"]
        assert all(it.session is not None for it in items(steps, SessionChanged))


async def test_r50_what_another_node_commits_after_the_view_is_told_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, story = Feed(store), Story(store)
    await story.accept("a")
    with streaming(feed, "session") as stream:
        await drain(stream)
        view = feed.sessions.view

        async def late(key: SessionKey, reader: Follower) -> SessionView:
            found = await view(key, reader)
            monkeypatch.setattr(feed.sessions, "view", view)
            await elsewhere(store, feed, story.accept("b"), story.start())
            return found

        monkeypatch.setattr(feed.sessions, "view", late)
        # The poll is ahead of the view.
        feed.sessions.on_version(story.key, story.lane.version + 2)
        steps = await drain(stream)
        assert named(steps) == ["b: Accepted", "a: Started"]
        assert items(steps, QueueChanged)[-1].run_ids == ("b",)
        assert items(steps, SessionChanged)[-1].active_run.run_id == "a"


async def test_r50_queue_is_told_with_its_new_runs(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    await story.accept("a")
    await story.start()
    with streaming(feed, "session") as stream:
        await drain(stream)
        await story.accept("b")
        await story.accept(request("c", when_busy=WhenBusy.INTERRUPT))
        steps = await drain(stream)
        queue = items(steps, QueueChanged)[-1]
        assert queue.run_ids == tuple(run.run_id for run in story.lane.waiting) == ("c", "b")
        assert {run.run_id: run.prompt_excerpt for run in queue.runs} == {
            "b": "hello",
            "c": "hello",
        }
        await story.cancel(CancelScope.RUN, "b")
        steps = await drain(stream)
        assert named(steps) == ["b: RunComplete"]
        assert items(steps, QueueChanged) == [QueueChanged(("c",), ())]


async def test_a_cancel_of_the_active_run_is_told(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    await story.accept("a")
    await story.start()
    with streaming(feed, "session") as stream:
        await drain(stream)
        await story.cancel()
        (changed,) = items(await drain(stream), SessionChanged)
        assert changed.active_run.state is RunState.CANCELLING


async def test_many_sessions_take_turns(store: Store) -> None:
    feed = Feed(store)
    stories = [Story(store, f"s{n}") for n in range(3)]
    for story in stories:
        await story.accept("first-" + story.session_id)
    with streaming(feed, "s0", "s1", "s2") as stream:
        order = [found[0] for _ in range(3) if (found := await stream.next(0))]
        assert order == ["s0", "s1", "s2"]
        await drain(stream)
        await stories[2].start()
        found = await stream.next(SECONDS)
        assert found is not None
        assert found[0] == "s2"


async def test_a_waiting_stream_is_woken_by_a_commit_and_by_output(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    with streaming(feed, "session") as stream:
        await drain(stream)
        for step in (
            lambda: story.accept("a"),
            story.start,
            lambda: story.append(TextDelta("x")),
            story.finish,
        ):
            waiting = asyncio.create_task(stream.next(SECONDS))
            await asyncio.sleep(0)
            await step()
            assert await waiting is not None
            await drain(stream)


async def test_an_idle_stream_returns_after_its_timeout_and_ends_with_the_feed(
    store: Store,
) -> None:
    feed, story = Feed(store), Story(store)
    with streaming(feed, "session") as stream:
        await drain(stream)
        assert await stream.next(0.01) is None
        assert feed.subscriptions == 1
        waiting = asyncio.create_task(stream.next(SECONDS))
        await asyncio.sleep(0)
        feed.close()
        with pytest.raises(Draining):
            await waiting
    assert feed.subscriptions == 0
    assert story.lane.version == 0


async def test_a_stream_that_keeps_up_reads_events_from_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, story = Feed(store), Story(store)
    await story.accept("a")
    with streaming(feed, "session") as stream:
        await drain(stream)
        await story.start()
        await drain(stream)

        async def never(*_: object, **__: object) -> None:
            raise AssertionError("the store was read")

        monkeypatch.setattr(type(store), "lane_events", never)
        monkeypatch.setattr(type(store), "run_events", never)
        await story.append(TextDelta("x"))
        await story.finish()
        assert named(await drain(stream)) == ["a: TextDelta", "a: RunComplete"]


async def test_a_slow_stream_holds_a_page_and_costs_no_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_topics, "PAGE_ENTRIES", 4)
    monkeypatch.setattr(sessions, "PAGE_ENTRIES", 4)
    feed, story = Feed(store), Story(store)
    await story.accept("first")
    with streaming(feed, "session") as slow, streaming(feed, "session") as quick:
        await drain(slow)
        await drain(quick)
        for n in range(10):
            await story.accept(f"r{n}")
            await drain(quick)
        (follower,) = slow._followers.values()
        assert len(follower._entries) == 0
        found = await slow.next(0)
        assert found is not None
        assert len(found[1]) == 4
        assert len(follower._entries) <= 4
        assert len(items([*found[1], *await drain(slow)], RunEvent)) == 10


# --- Resumed --------------------------------------------------------------------------------------


async def test_r51_cursor_before_removed_events_is_refused(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    await story.play("a")
    with streaming(feed, "session") as stream:
        at = (await drain(stream))[-1].at
        await story.play("b")
        steps = await drain(stream)
    assert await store.compact(FUTURE, 9) == 2
    with streaming(feed, "session", at=steps[-1].at) as stream:
        assert items(await drain(stream), RunEvent) == []
    for old in (at, steps[0].at):
        with streaming(feed, "session", at=old) as stream:
            with pytest.raises(CursorCompacted) as refused:
                await drain(stream)
            assert refused.value.metadata["session_id"] == "session"


async def test_r51_idle_session_whose_last_run_was_removed_resumes(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    with streaming(feed, "session") as stream:
        await story.play("a")
        at = (await drain(stream))[-1].at
    assert await store.compact(FUTURE, 9) == 1
    with streaming(feed, "session", at=at) as stream:
        assert items(await drain(stream), RunEvent) == []


# --- Everything at random -------------------------------------------------------------------------


class Player:
    """Plays a session at random."""

    def __init__(self, store: Store, rng: random.Random) -> None:
        self.story = Story(store)
        self._rng = rng
        self._names = 0
        self._open: list[tuple[str, str]] = []

    async def step(self) -> None:
        steps: list[Callable[[], Coroutine[Any, Any, None]]] = [self._accept] * 3
        lane = self.story.lane
        active = lane.active
        if lane.can_start:
            steps += [self._start] * 4
        if active is not None and active.state is RunState.ACTIVE:
            steps += [self._append] * 4 + [self._finish] * 2 + [self._ask, self._fold, self._lose]
        elif active is not None and active.state is RunState.CANCELLING:
            steps += [self._append, self._finish]
        elif lane.can_resume:
            steps += [self._resume] * 3
        elif active is not None:
            steps += [self._answer] * 3
        if lane.is_busy:
            steps.append(self._cancel)
        await self._rng.choice(steps)()

    async def _accept(self) -> None:
        self._names += 1
        kinds = [WhenBusy.QUEUE, WhenBusy.FOLD, WhenBusy.INTERRUPT]
        await self.story.accept(request(f"r{self._names}", when_busy=self._rng.choice(kinds)))

    async def _start(self) -> None:
        await self.story.start()

    async def _append(self) -> None:
        await self.story.append(*(TextDelta(f"{n}") for n in range(self._rng.randrange(1, 6))))

    async def _finish(self) -> None:
        await self.story.finish()

    async def _ask(self) -> None:
        active = self.story.lane.active
        assert active is not None
        self._names += 1
        names = await ask(self.story, question(f"q{self._names}"))
        self._open += [(active.run_id, name) for name in names]

    async def _answer(self) -> None:
        active = self.story.lane.active
        assert active is not None
        for pending in active.asking.pending:
            await answer(self.story, active.run_id, pending.input_request_id)

    async def _resume(self) -> None:
        await resume(self.story)

    async def _fold(self) -> None:
        await self.story.fold()

    async def _lose(self) -> None:
        await self.story.lose_node()

    async def _cancel(self) -> None:
        scope = self._rng.choice([CancelScope.SESSION, CancelScope.ACTIVE, CancelScope.WAITING])
        wanted = rules.cancel(self.story.lane, scope, at=self.story.tick(), reason="enough")
        if wanted.needs_commit:
            await self.story.commit(wanted)


@pytest.mark.parametrize("seed", range(6))
async def test_r50_r51_r52_any_snapshot_with_its_tail_is_the_whole_history(
    store: Store, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers come and resume at random positions; some read from the store, some from memory."""
    rng = random.Random(seed)  # noqa: S311 - nothing secret
    monkeypatch.setattr(sessions, "PAGE_ENTRIES", rng.choice([3, 256]))
    monkeypatch.setattr(sessions, "PAGE_BYTES", rng.choice([1, 256 << 10]))
    feed, player = Feed(store), Player(store, rng)
    story = player.story
    readers: list[list[Step]] = [[] for _ in range(3)]
    with streaming(feed, "session") as whole:
        everything = await drain(whole)
        for _ in range(45):
            await player.step()
            if rng.random() < 0.6:
                everything += await drain(whole)
            await _read_on(feed, rng, rng.choice(readers))
        everything += await drain(whole)
    log = await whole_log(story)
    events = items(everything, RunEvent)
    in_order(events, log)
    by_run: dict[str, list[RunEvent]] = {}
    for event in events:
        by_run.setdefault(event.run_id, []).append(event)
    for run_id, own in by_run.items():
        assert own == list(await run_events(store, run_id))
    for steps in readers:
        await _read_on(feed, rng, steps, to_end=True)
        await _check(steps, story, by_run, log)


async def _read_on(
    feed: Feed, rng: random.Random, steps: list[Step], *, to_end: bool = False
) -> None:
    """Reads on from the last step, or from a snapshot, and perhaps loses the last steps."""
    whole = [n for n, it in enumerate(steps) if not getattr(it.item, "continues", False)]
    del steps[whole[-1] + 1 if whole else 0 :]
    at = steps[-1].at if steps else None
    with streaming(feed, "session", at=at) as stream:
        found = await drain(stream)
    if not to_end and found:
        del found[rng.randrange(len(found) + 1) :]
    steps += found


async def _check(
    steps: list[Step], story: Story, by_run: dict[str, list[RunEvent]], log: tuple[LaneEntry, ...]
) -> None:
    picture = Picture()
    picture.take(steps)
    assert picture.snapshots == 1
    in_order(picture.events, log)
    lane = story.lane
    assert picture.active_run_id == ("" if lane.active is None else lane.active.run_id)
    assert picture.queue == [run.run_id for run in lane.waiting]
    for run_id, own in by_run.items():
        known = picture.known.get(run_id, [])
        assert known == own[len(own) - len(known) :], f"{run_id} ends with something else"
        if not known:
            # It had ended before the snapshot, or has waited since.
            assert isinstance(own[-1].body, RunComplete) or story.lane.find(run_id) is not None
    first = [step.item for step in steps if isinstance(step.item, Snapshot)]
    seen = {run.run_id for part in first for run in (*part.queue, *part.folded)}
    seen |= {event.run_id for part in first for event in part.output}
    for event in picture.events:
        # A run that the snapshot does not show begins with its acceptance.
        if event.run_id not in seen:
            assert isinstance(picture.known[event.run_id][0].body, Accepted | Started), event


async def test_r50_key_of_the_run_is_that_of_its_tenant(store: Store) -> None:
    feed = Feed(store)
    mine, other = Story(store), Story(store, tenant="other")
    await mine.accept("a")
    await other.play("b")
    with streaming(feed, "session") as stream:
        await drain(stream)
        await other.play("a")
        await mine.start()
        await mine.append(TextDelta("mine"))
        steps = await drain(stream)
        assert named(steps) == ["a: Started", "a: TextDelta"]
    assert await store.get_run(RunKey("other", "a")) is not None


async def test_r50_commits_that_are_reported_in_another_order(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, story = Feed(store), Story(store)
    await story.accept("a")
    await story.start()
    with streaming(feed, "session") as stream:
        await drain(stream)
        await story.accept("b")
        assert named(await drain(stream)) == ["b: Accepted"]
        known = end_of(story.lane.version)
        changes: list[LaneChange] = []
        monkeypatch.setattr(feed, "on_lane", changes.append)
        before = await store.get_session(story.key)
        assert before is not None
        assert await store.edit_session(story.key, before, replace(before, title="new"))
        story.lane = await store.load_lane(story.key)
        await story.finish()
        monkeypatch.undo()
        earlier, later = changes
        feed.on_lane(later)
        feed.on_lane(earlier)
        # Memory must not hide what the later one has.
        assert feed.sessions.read(story.key, known) != ()
        steps = await drain(stream)
        assert named(steps) == ["a: RunComplete"]
        assert [it.session.title for it in items(steps, SessionChanged)] == ["new"]
        await story.start()
        assert named(await drain(stream)) == ["b: Started"]
