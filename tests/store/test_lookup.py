"""Filtered lists of runs and sessions, over every store."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

import pytest

from runlane_server.core.model import Run, RunState, Session, SessionKey, Text, TextDelta
from runlane_server.store import lookup_sql
from runlane_server.store.base import NewSession, Page, Store
from runlane_server.store.lookup import (
    ALWAYS,
    Count,
    ListPlace,
    RunFilter,
    RunOrder,
    SessionFilter,
    Span,
)
from support.story import START, TENANT, Story, request

Item = TypeVar("Item")

ODD = 'o"d\\d\0 é=:{}'
"""A text that an index of labels must not take for another."""


@pytest.fixture
async def runs(store: Store) -> list[Run]:
    """Runs of two sessions in all kinds of states, the first accepted first."""
    one, two = Story(store, "one"), Story(store, "two", now=START + 1_000)
    await one.play(request("a")._replace(metadata={"kind": "x", ODD: ODD}))
    await two.play(request("b", kind="y")._replace(agent="b"))
    await one.accept(request("c", kind="x", size="9"), request("d")._replace(agent="a"), "e")
    await two.accept(request("f", size="9", kind="x"), "g")
    await one.start()
    await one.finish()
    await one.start()
    await two.cancel()
    await Story(store, "one", tenant="another").play(request("other", kind="x"))
    found = [await store.get_run(one.run_key(name)) for name in "abcdefg"]
    return [run for run in found if run is not None]


async def collect(page: Callable[[ListPlace | None], Any], limit: int) -> AsyncIterator[Any]:
    """All items of a list."""
    after: ListPlace | None = None
    while True:
        found: Page[Any, ListPlace] = await page(after)
        assert len(found.items) <= limit
        for item in found.items:
            yield item
        if found.next is None:
            return
        after = found.next


async def run_ids(store: Store, wanted: RunFilter, limit: int) -> str:
    pages = collect(lambda after: store.list_runs(TENANT, wanted, after=after, limit=limit), limit)
    return "".join([run.run_id async for run in pages])


FILTERS = [
    (RunFilter(), "gfedcba"),
    (RunFilter(order=RunOrder.EARLIEST_ACCEPTED), "abcdefg"),
    (RunFilter("one"), "edca"),
    (RunFilter("one", order=RunOrder.EARLIEST_ACCEPTED), "acde"),
    (RunFilter("nobody"), ""),
    (RunFilter(states=frozenset({RunState.CANCELLED})), "gf"),
    (RunFilter(states=frozenset({RunState.ACTIVE, RunState.COMPLETED})), "dcba"),
    (RunFilter(states=frozenset({RunState.QUEUED}), agent="default"), "e"),
    (RunFilter(agent="b"), "b"),
    (RunFilter(agent="default"), "gfeca"),
    (RunFilter(agent="default", states=frozenset({RunState.COMPLETED})), "ca"),
    (RunFilter(agent="nobody"), ""),
    (RunFilter(labels={"kind": "x"}), "fca"),
    (RunFilter(labels={"kind": "x", "size": "9"}), "fc"),
    (RunFilter(labels={"size": "9", "kind": "y"}), ""),
    (RunFilter(labels={ODD: ODD}), "a"),
    (RunFilter(labels={ODD: ODD[:-1]}), ""),
    (RunFilter("two", labels={"kind": "x"}), "f"),
    (RunFilter(labels={"kind": "x"}, agent="default", order=RunOrder.EARLIEST_ACCEPTED), "acf"),
    (RunFilter(order=RunOrder.LATEST_ENDED), "gfbca"),
    (RunFilter(order=RunOrder.EARLIEST_ENDED), "acbfg"),
    (RunFilter("one", order=RunOrder.LATEST_ENDED), "ca"),
    (RunFilter(accepted=Span(until=START + 1_000)), "edca"),
    (RunFilter(accepted=Span(since=START + 1_000), states=frozenset({RunState.COMPLETED})), "b"),
    (RunFilter(ended=Span(until=START + 1_000)), "ca"),
    (RunFilter(ended=Span(since=START + 1_000), order=RunOrder.EARLIEST_ENDED), "bfg"),
    (RunFilter("two", accepted=Span(until=START)), ""),
]


@pytest.mark.parametrize(("wanted", "expected"), FILTERS)
async def test_runs_are_filtered_and_ordered(
    store: Store, runs: list[Run], wanted: RunFilter, expected: str
) -> None:
    assert "".join(sorted(expected)) == "".join(run.run_id for run in runs if wanted.matches(run))
    for limit in (1, 2, 100):
        assert await run_ids(store, wanted, limit) == expected
    assert await store.count_runs(TENANT, wanted) == Count(len(expected), is_exact=True)


def combinations() -> Iterable[RunFilter]:
    """Every combination of filters, each with a value that selects some runs."""
    for session_id, states, agent, labels, accepted, ended, order in itertools.product(
        (None, "one"),
        (frozenset[RunState](), frozenset({RunState.QUEUED, RunState.COMPLETED})),
        ("", "default"),
        ({}, {"kind": "x"}),
        (ALWAYS, Span(START + 2, START + 1_003)),
        (ALWAYS, Span(since=START + 4)),
        RunOrder,
    ):
        yield RunFilter(session_id, states, agent, labels, accepted, ended, order)


async def test_every_combination_of_filters_selects_the_runs_that_match_all(
    store: Store, runs: list[Run]
) -> None:
    for wanted in combinations():
        expected = [run.run_id for run in runs if wanted.matches(run)]
        page = await store.list_runs(TENANT, wanted, limit=100)
        assert page.next is None
        assert sorted(run.run_id for run in page.items) == expected, wanted
        by_end = wanted.order.by_end
        times = [(run.ended_at or 0) if by_end else run.accepted_at for run in page.items]
        if by_end or wanted.session_id:
            assert times == sorted(times, reverse=wanted.order.is_descending), wanted
        assert (await store.count_runs(TENANT, wanted)).items == len(expected), wanted


@pytest.mark.stores("sqlite", "postgres")
async def test_page_stops_after_a_bounded_read_and_the_next_continues(
    store: Store, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup_sql, "SCAN_ROWS", 2)
    monkeypatch.setattr(lookup_sql, "COUNT_ROWS", 3)
    wanted = RunFilter("one", agent="a")
    first = await store.list_runs(TENANT, wanted, limit=5)
    assert [run.run_id for run in first.items] == ["d"]
    assert first.next is not None
    second = await store.list_runs(TENANT, wanted, after=first.next, limit=5)
    assert second.items == ()
    for filters, expected in FILTERS:
        assert await run_ids(store, filters, 1) == expected
    assert await store.count_runs(TENANT, RunFilter("one")) == Count(3, is_exact=False)
    assert await store.count_runs(TENANT, RunFilter("two")) == Count(3, is_exact=True)


async def test_labels_are_gone_with_their_session(store: Store, runs: list[Run]) -> None:
    assert runs
    story = Story(store, "two")
    story.lane = await store.load_lane(story.key)
    await story.remove()
    assert await run_ids(store, RunFilter(labels={"kind": "x"}), 5) == "ca"
    assert await run_ids(store, RunFilter(labels={"kind": "y"}), 5) == ""


SESSIONS = [
    (SessionFilter(), "edcba"),
    (SessionFilter(is_descending=False), "abcde"),
    (SessionFilter(agent="a"), "db"),
    (SessionFilter(labels={"team": "x"}), "cb"),
    (SessionFilter(labels={"team": "x", "n": "1"}), "b"),
    (SessionFilter(labels={"team": "x"}, agent="a", is_descending=False), "b"),
    (SessionFilter(busy=True), "e"),
    (SessionFilter(busy=True, agent="a"), ""),
    (SessionFilter(busy=False), "dcba"),
    (SessionFilter(busy=False, labels={"team": "x"}), "cb"),
    (SessionFilter(created=Span(START + 2, START + 4)), "cb"),
    (SessionFilter(created=Span(until=START + 4), agent="a"), "b"),
    (SessionFilter(created=Span(since=START + 100), is_descending=False), ""),
]


async def test_sessions_are_filtered_and_ordered(store: Store) -> None:
    made: list[Session] = []
    for n, (name, agent, labels) in enumerate(
        [
            ("a", "", {}),
            ("b", "a", {"team": "x", "n": "1"}),
            ("c", "", {"team": "x"}),
            ("d", "a", {}),
        ],
        start=1,
    ):
        await store.create_session(
            NewSession(SessionKey(TENANT, name), START + n, metadata=labels, agent=agent)
        )
    await Story(store, "e", now=START + 4).accept("run")
    await Story(store, "f", tenant="another").accept("run")
    for name in "abcde":
        session = await store.get_session(SessionKey(TENANT, name))
        assert session is not None
        made.append(session)
    for wanted, expected in SESSIONS:
        matching = [session.session_id for session in made if wanted.matches(session)]
        assert "".join(sorted(expected)) == "".join(matching)
        for limit in (1, 2, 100):
            pages = collect(
                lambda after, w=wanted, n=limit: store.list_sessions(  # type: ignore[misc]
                    TENANT, w, after=after, limit=n
                ),
                limit,
            )
            assert "".join([one.session_id async for one in pages]) == expected, wanted
        count = await store.count_sessions(TENANT, wanted)
        assert count == Count(len(expected), is_exact=True)


async def test_run_has_the_index_of_its_last_event(store: Store) -> None:
    story = Story(store)
    await story.accept("a")
    assert await last_index(story) == 1
    await story.start()
    await story.append(*story_text())
    assert await last_index(story) == 4
    await story.finish()
    assert await last_index(story) == 5
    (run,) = (await store.list_runs(TENANT, limit=2)).items
    assert run.last_event_index == 5


async def last_index(story: Story) -> int:
    run = await story.store.get_run(story.run_key("a"))
    assert run is not None
    return run.last_event_index


def story_text() -> tuple[TextDelta, TextDelta]:
    return TextDelta("one "), TextDelta("two")


async def test_messages_of_one_run_are_listed(store: Store) -> None:
    story = Story(store)
    await story.play("a", "first")
    await story.play("b", "second")
    await story.play("c", "third")
    page = await store.list_messages(story.key, limit=1, max_bytes=1 << 20, run_id="b")
    assert [(it.run_id, it.turn) for it in page.items] == [("b", 2)]
    assert page.next is not None
    rest = await store.list_messages(
        story.key, after=page.next, limit=5, max_bytes=1 << 20, run_id="b"
    )
    assert [(it.run_id, it.parts) for it in rest.items] == [("b", (Text("second"),))]
    assert rest.next is None
    for run_id in ("nobody", "other"):
        nothing = await store.list_messages(story.key, limit=5, max_bytes=9, run_id=run_id)
        assert nothing.items == ()
