"""The contract of every store about input requests."""

from __future__ import annotations

import pytest

from runlane_server.core.input import InputState
from runlane_server.core.model import (
    InputAnswered,
    InputExpired,
    InputRequested,
    InputWithdrawn,
    Resumed,
    RunEvent,
    RunKey,
    RunState,
    SessionKey,
    TextDelta,
)
from runlane_server.store.base import BusySession, DueInput, Stale, Store
from support.asking import DAY, answer, ask, expire, question, reply_of, resume
from support.story import MANY, PLENTY, TENANT, Story


async def bodies(story: Story, run_id: str) -> list[object]:
    found: list[RunEvent] = list(
        await story.store.run_events(story.run_key(run_id), after=0, limit=MANY, max_bytes=PLENTY)
    )
    assert [event.index for event in found] == list(range(1, len(found) + 1))
    return [event.body for event in found]


async def test_r40_a_request_is_stored_with_its_run(store: Store, story: Story) -> None:
    await story.accept("a", "b")
    await story.start()
    await story.append(TextDelta("x"))
    asked = question(arguments_json='{"path": "\\u0000"}', choices=("a", "b\x00"), timeout=DAY)
    [name] = await ask(story, asked)
    assert await store.load_lane(story.key) == story.lane
    found = await store.get_input(TENANT, name)
    assert found is not None
    assert (found.question, found.state, found.answer) == (asked, InputState.OPEN, None)
    assert (found.session_id, found.run_id) == ("session", "a")
    assert found.expires_at == found.requested_at + DAY
    run = await store.get_run(story.run_key("a"))
    assert run is not None
    assert run.state is RunState.INPUT_REQUIRED
    assert list(await store.busy_sessions()) == [BusySession(story.key, True, 1, "default")]
    requested = (await bodies(story, "a"))[-1]
    assert isinstance(requested, InputRequested)
    assert (requested.input_request_id, requested.text) == (name, asked.text)


async def test_r40_a_run_that_asks_emits_nothing(story: Story) -> None:
    await story.accept("a")
    await story.start()
    await ask(story, question())
    with pytest.raises(Stale):
        await story.append(TextDelta("late"))


async def test_r41_an_answer_is_stored_with_its_origin(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    [name] = await ask(story, question())
    given = reply_of('{"yes": "\\u0000 ü"}', at=5)
    await answer(story, "a", name, given)
    assert await store.load_lane(story.key) == story.lane
    found = await store.get_input(TENANT, name)
    assert found is not None
    assert (found.state, found.answer, found.closed_at) == (
        InputState.ANSWERED,
        given,
        story.now,
    )
    await resume(story)
    assert await store.load_lane(story.key) == story.lane
    await story.finish()
    assert [InputAnswered(name), Resumed(1)] == (await bodies(story, "a"))[-3:-1]


async def test_r42_the_end_of_a_run_withdraws_its_requests(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    names = await ask(story, question("k"), question("l"))
    await story.cancel()
    await story.finish()
    for name in names:
        found = await store.get_input(TENANT, name)
        assert found is not None
        assert found.state is InputState.WITHDRAWN
    assert [InputWithdrawn(name) for name in names] == (await bodies(story, "a"))[-3:-1]


async def test_r43_due_requests_are_found(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    await ask(story, question("never"), question("later", timeout=1 << 60))
    [first] = await ask(story, question("now", timeout=1, default_json='"no"'))
    # The tests' clock is long ago, so it is due by any clock.
    [due] = await store.due_inputs(story.now + 1, 10)
    assert due == DueInput(story.key, "a", first)
    await expire(story, "a", first)
    assert list(await store.due_inputs(story.now + 1, 10)) == []
    found = await store.get_input(TENANT, first)
    assert found is not None
    assert found.state is InputState.EXPIRED
    assert found.answer is not None
    assert (found.answer.value_json, found.answer.how) == ('"no"', "default")
    assert InputExpired(first) in await bodies(story, "a")


async def test_r44_a_request_outlives_its_attempt(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    [name] = await ask(story, question())
    lane = story.lane
    assert lane.active is not None
    story.lane = lane._replace(active=lane.active._replace(max_attempts=2))
    await story.lose_node()
    assert (await store.load_lane(story.key)).waiting[0].asking == story.lane.waiting[0].asking
    await story.start()
    await answer(story, "a", name)
    stored = (await store.load_lane(story.key)).active
    assert stored is not None
    assert story.lane.active is not None
    assert stored.asking == story.lane.active.asking
    assert stored.asking.late
    found = await store.find_input(story.run_key("a"), "k")
    assert found is not None
    assert found.answer == reply_of()
    await story.finish()
    assert InputAnswered(name) in await bodies(story, "a")


async def test_r44_a_session_tells_whether_only_an_answer_goes_on_with_its_run(
    store: Store, story: Story
) -> None:
    await story.accept("a")
    await story.start()
    names = await ask(story, question("k"), question("l"), park=True)

    async def asks() -> bool:
        (busy,) = await store.busy_sessions()
        assert busy.active
        return busy.asks

    # No node restores the work of a store that it shares.
    assert await asks() is (store.cluster is None)
    await answer(story, "a", names[0])
    assert await asks() is (store.cluster is None)
    await answer(story, "a", names[1])
    assert not await asks()


async def test_r43_a_session_with_a_run_that_an_expiry_ends_does_not_ask(
    store: Store, story: Story
) -> None:
    await story.accept("a")
    await story.start()
    names = await ask(story, question("k", timeout=1), question("l"), park=True)
    await expire(story, "a", names[0])
    (busy,) = await store.busy_sessions()
    assert (busy.active, busy.asks) == (True, False)


async def test_r44_a_parked_run_is_read_back(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    await ask(story, question(), park=True)
    stored = (await store.load_lane(story.key)).active
    assert stored is not None
    assert stored.asking.parked
    assert (stored.asking.checkpoint, stored.asking.used) == ("state", 7)
    assert await store.load_lane(story.key) == story.lane


async def test_an_ended_run_asks_nothing_any_more(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    await ask(story, question())
    await story.finish()
    await story.play("b")
    assert await store.load_lane(story.key) == story.lane
    assert story.lane.active is None


async def test_requests_are_listed_by_pages(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    names = [(await ask(story, question(str(n))))[0] for n in range(5)]
    other = Story(store, session_id="other", now=story.now)
    await other.accept("b")
    await other.start()
    [last] = await ask(other, question())
    stranger = Story(store, tenant="stranger", now=story.now)
    await stranger.accept("a")
    await stranger.start()
    await ask(stranger, question())
    await answer(story, "a", names[0])

    async def listed(limit: int = 2, **where: object) -> list[str]:
        found: list[str] = []
        place: int | None = None
        while True:
            page = await store.list_inputs(TENANT, after=place, limit=limit, **where)  # type: ignore[arg-type]
            assert len(page.items) <= limit
            found += (it.input_request_id for it in page.items)
            if page.next is None:
                return found
            place = page.next

    latest_first = [last, *reversed(names)]
    assert await listed() == latest_first
    assert await listed(states=[InputState.OPEN]) == latest_first[:-1]
    assert await listed(states=[InputState.ANSWERED]) == [names[0]]
    assert await listed(session_id="other") == [last]
    assert await listed(session_id="session", states=[InputState.OPEN]) == latest_first[1:-1]
    assert await listed(run_id="a") == latest_first[1:]
    assert await listed(run_id="a", session_id="other") == []
    assert await listed(limit=6) == latest_first


async def test_requests_are_removed_with_their_session(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    [name] = await ask(story, question())
    stranger = Story(store, tenant="stranger", now=story.now)
    await stranger.accept("a")
    await stranger.start()
    [kept] = await ask(stranger, question())
    await story.finish()
    await story.remove()
    assert await store.get_input(TENANT, name) is None
    assert await store.find_input(RunKey(TENANT, "a"), "k") is None
    assert await store.get_input("stranger", kept) is not None
    assert (await store.load_lane(SessionKey("stranger", "session"))).active is not None


async def test_questions_and_answers_are_counted(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    before = await store.stored_bytes(TENANT)
    [name] = await ask(story, question(text="x" * 10_000))
    assert 10_000 < await store.stored_bytes(TENANT) - before < 11_500
    before = await store.stored_bytes(TENANT)
    await answer(story, "a", name, reply_of('"' + "y" * 5_000 + '"'))
    assert 5_000 < await store.stored_bytes(TENANT) - before < 6_000
