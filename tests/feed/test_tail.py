"""Tails in memory: one budget for all, and a share for each tenant that no other takes."""

from __future__ import annotations

import time
from operator import itemgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runlane_server.core.model import RunEvent as Event
from runlane_server.core.model import RunKey, TextDelta
from runlane_server.feed import feed as feed_module
from runlane_server.feed.feed import Feed
from runlane_server.feed.tail import TailPool
from support.node import Node

BUDGET = 100 * 1000

Key = tuple[str, int]


def pool() -> TailPool[Key, int]:
    return TailPool(itemgetter(0), budget=BUDGET, entry_weight=100)


def test_a_tenant_below_its_share_loses_nothing_whatever_another_writes() -> None:
    tails = pool()
    for place in range(1, 100):
        tails.add(("quiet", 0), place, place, 100, 0)
    for place in range(100, 20_000):
        # Many logs or few, long texts or short: each is one tenant's.
        tails.add(("noisy", place % 7), place, place, 1_000 * (place % 3), 0)
    quiet = tails.get(("quiet", 0))
    assert quiet is not None
    assert quiet.covers(0)
    assert list(quiet.read(0, 1000, BUDGET)) == list(range(1, 100))


def test_shares_are_equal_with_many_noisy_tenants() -> None:
    tails = pool()
    share = BUDGET * 3 // 4 // 11
    kept = share // 200
    for place in range(1, kept + 1):
        tails.add(("quiet", 0), place, place, 100, 0)
    for place in range(kept + 1, 20_000):
        tails.add((f"noisy {place % 10}", 0), place, place, 100, 0)
    quiet = tails.get(("quiet", 0))
    assert quiet is not None
    assert len(quiet.read(0, 1000, BUDGET)) == kept


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60_000)), max_size=60))
def test_the_budget_holds_and_a_tail_never_claims_what_it_evicted(
    added: list[tuple[int, int]],
) -> None:
    tails = pool()
    texts: dict[Key, list[int]] = {}
    for place, (log, size) in enumerate(added, 1):
        key = (f"t{log // 2}", log)
        tails.add(key, place, place, size, 0)
        texts.setdefault(key, []).append(place)
        held = [tails.get(each) for each in texts]
        assert sum(tail.weight for tail in held if tail) <= BUDGET
    for key, places in texts.items():
        tail = tails.get(key)
        assert tail is not None
        for after in range(len(added) + 1):
            if tail.covers(after):
                assert list(tail.read(after, 1000, BUDGET)) == [at for at in places if at > after]
    for key in texts:
        tails.drop(key)
    assert len(tails) == 0


def test_an_event_costs_the_same_with_many_tenants() -> None:
    tails = pool()
    began = time.process_time()
    for place in range(1, 20_001):
        tails.add((f"t{place}", 0), place, place, 0, 0)
    assert time.process_time() - began < 2


@pytest.mark.stores("memory")
async def test_followed_runs_of_one_tenant_share_the_budget(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "RUN_TAIL_BYTES", 100_000)
    feed = Feed(node.store)
    keys = [RunKey("noisy", f"r{n}") for n in range(50)] + [RunKey("quiet", "r")]
    followers = [feed.follow(key, 0) for key in keys]
    feed.on_run_events(keys[-1], [Event("r", 1, 0, TextDelta("quiet"))])
    for index in range(1, 40):
        for key in keys[:-1]:
            feed.on_run_events(key, [Event(key.run_id, index, 0, TextDelta("x" * 1000))])
    tails = [feed._run_tails.get(key) for key in keys]
    assert sum(tail.weight for tail in tails if tail) <= 100_000
    assert [event.body for event in await followers[-1].next()] == [TextDelta("quiet")]
    for follower in followers:
        follower.close()
    assert len(feed._run_tails) == 0
