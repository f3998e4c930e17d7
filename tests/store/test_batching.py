"""A writer waits for company only where that pays."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

import pytest

from runlane_server.core.model import Message, Role, SessionKey, Text
from runlane_server.core.transition import Lane, Transition
from runlane_server.store.batching import (
    LARGE_PARTS,
    MAX_APPENDED,
    MAX_DELAY,
    MAX_UNITS,
    SAMPLE,
    SILENCE,
    Batch,
    Pacer,
    WriteQueue,
    encoded,
)


@dataclass
class Clocks:
    """The time, and how much of it the loop has worked."""

    now: float = 0.0
    worked: float = 0.0

    def pass_by(self, seconds: float, share: float) -> None:
        self.now += seconds
        self.worked += seconds * share


def paced(units: int, share: float, commits: int = 100) -> float:
    """The pause after so many commits of so many units, the loop at work for that share of it."""
    clocks = Clocks()
    pace = Pacer(clock=lambda: clocks.now, worked=lambda: clocks.worked)
    for _ in range(commits):
        clocks.pass_by(SAMPLE / 10, share)
        pace.record(units)
    return pace.delay()


def test_first_commit_does_not_wait() -> None:
    assert Pacer().delay() == 0


@pytest.mark.parametrize("units", [1, 50])
def test_idle_loop_delays_no_commit(units: int) -> None:
    assert paced(units, share=0.3) == 0


def test_single_commits_are_not_delayed() -> None:
    """One caller after another may fill the loop's time; none of them gains by a pause."""
    assert paced(1, share=1.0) == 0


def test_a_busy_loop_with_much_to_write_waits_as_long_as_may_be() -> None:
    assert paced(50, share=1.0) == MAX_DELAY


def test_in_between_it_waits_a_little() -> None:
    assert 0 < paced(2, share=0.6) < MAX_DELAY


def test_it_stops_waiting_when_the_rush_is_over() -> None:
    clocks = Clocks()
    pace = Pacer(clock=lambda: clocks.now, worked=lambda: clocks.worked)
    for units in (*[50] * 100, *[1] * 10):
        clocks.pass_by(SAMPLE / 10, 1.0)
        pace.record(units)
    assert pace.delay() == 0


def test_commit_long_after_a_burst_is_not_delayed() -> None:
    clocks = Clocks()
    pace = Pacer(clock=lambda: clocks.now, worked=lambda: clocks.worked)
    for _ in range(100):
        clocks.pass_by(SAMPLE / 10, 1.0)
        pace.record(50)
    assert pace.delay() == MAX_DELAY
    clocks.pass_by(SILENCE * 2, 0.0)
    assert pace.delay() == 0


@pytest.mark.parametrize(("parts", "elsewhere"), [(LARGE_PARTS, False), (LARGE_PARTS + 1, True)])
async def test_only_a_long_turn_is_encoded_in_another_thread(parts: int, elsewhere: bool) -> None:
    message = Message("m", "r", 1, 1, Role.ASSISTANT, (Text("x"),) * parts, None, "", 0)
    transition: Transition[None] = Transition(Lane(SessionKey("t", "s")), messages=(message,))

    def encode(base_version: int, given: Transition[object], future: object) -> int:
        assert (base_version, given) == (7, transition)
        return threading.get_ident()

    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    thread = await encoded(encode, 7, transition, future)
    assert (thread != threading.get_ident()) is elsewhere


# --- What may share a batch ---------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A unit; see `batching.WriteUnit`."""

    tenant: str = "t"
    lane: SessionKey | None = None
    changed: tuple[str, ...] = ()
    appended: str | None = None
    size: int = 0


def commit(session_id: str, *changed: str, tenant: str = "t") -> Written:
    return Written(tenant, SessionKey(tenant, session_id), changed)


def append(run_id: str, tenant: str = "t", *, size: int = 0) -> Written:
    return Written(tenant, appended=run_id, size=size)


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        (commit("s", "a"), commit("s", "b"), False),  # one lane
        (commit("s"), commit("s"), False),
        (commit("s", "a"), commit("u", "b"), True),
        (commit("s", "a"), commit("u", "a"), False),  # one run, accepted in two sessions
        (commit("s", "a"), commit("s", "a", tenant="other"), True),
        (append("a"), append("a"), True),
        (append("a"), commit("s", "a"), True),  # appends are written first
        (commit("s", "a"), append("a"), False),
        (commit("s", "a"), append("b"), True),
        (commit("s", "a"), append("a", tenant="other"), True),
        (Written(), Written(), True),
    ],
)
def test_batch_changes_each_lane_and_run_once(first: Written, second: Written, fits: bool) -> None:
    batch = Batch[Written]()
    assert batch.has_room_for(first)
    batch.add(first)
    assert batch.has_room_for(second) is fits
    assert batch.units == [first]


def test_batch_of_an_earlier_append_takes_a_change_and_then_no_append() -> None:
    batch = Batch[Written]()
    for unit in (append("a"), commit("s", "a", "b")):
        assert batch.has_room_for(unit)
        batch.add(unit)
    assert not batch.has_room_for(append("a"))
    assert not batch.has_room_for(append("b"))
    assert batch.has_room_for(append("c"))


def test_batch_has_a_largest_number_of_units() -> None:
    batch = Batch[Written]()
    for n in range(MAX_UNITS):
        assert batch.has_room_for(commit(f"s{n}", f"r{n}"))
        batch.add(commit(f"s{n}", f"r{n}"))
    assert not batch.has_room_for(commit("another", "run"))


# --- What a transaction takes first -------------------------------------------------------------

LIMIT = 2 * MAX_APPENDED


def queue_of(*units: Written) -> WriteQueue[Written]:
    queue = WriteQueue[Written](LIMIT)
    for unit in units:
        queue.add(unit)
    return queue


def transactions(queue: WriteQueue[Written]) -> list[list[Written]]:
    taken = []
    while queue:
        taken.append(queue.take())
    return taken


def test_a_cancel_is_in_the_next_transaction_whatever_output_waits() -> None:
    output = [append(f"r{n}", size=MAX_APPENDED // 4) for n in range(32)]
    cancel = commit("s", "a")
    first, *others = transactions(queue_of(*output, cancel))
    assert cancel in first
    assert all(sum(unit.size for unit in batch) <= MAX_APPENDED for batch in (first, *others))
    assert [unit for batch in (first, *others) for unit in batch if unit.appended] == output


def test_output_progresses_beside_any_number_of_other_units() -> None:
    others = [commit(f"s{n}", f"r{n}") for n in range(2 * MAX_UNITS)]
    first = queue_of(*others, append("a"), append("b")).take()
    assert first == [*others[: MAX_UNITS - 1], append("a")]


def test_the_end_of_a_run_takes_its_older_output_along_and_no_later_one() -> None:
    noise = [append(f"r{n}", size=MAX_APPENDED // 2) for n in range(6)]
    said, end, late = append("a", size=1), commit("s", "a"), append("a", size=2)
    first, *others = transactions(queue_of(*noise, said, end, late))
    assert first[:2] == [said, end]
    assert [unit for batch in (first, *others) for unit in batch].count(said) == 1
    assert late in others[-1]


def test_output_is_not_in_the_transaction_of_an_earlier_change_of_its_run() -> None:
    output = [append("a"), append("b"), append("c")]
    change = commit("s", "b")
    assert transactions(queue_of(change, *output)) == [
        [change, append("a")],
        [append("b"), append("c")],
    ]


def test_tenants_take_turns_with_their_output() -> None:
    noisy = [append(f"n{n}", "noisy", size=MAX_APPENDED // 2) for n in range(8)]
    quiet = append("q", "quiet", size=1)
    first, second, *_ = transactions(queue_of(*noisy, quiet))
    assert quiet in (*first, *second)


def test_a_large_unit_is_taken_although_output_waits() -> None:
    large = Written(size=2 * LIMIT)
    output = [append(f"r{n}", size=2 * MAX_APPENDED) for n in range(2)]
    assert transactions(queue_of(*output, large)) == [[large, output[0]], [output[1]]]


def test_a_transaction_has_a_largest_size_and_at_least_one_unit() -> None:
    half = LIMIT // 2
    sizes = [half, half, half, 2 * LIMIT, 1, 1]
    queue = queue_of(*(Written(size=size) for size in sizes))
    assert [len(batch) for batch in transactions(queue)] == [2, 1, 1, 2]


def test_what_is_left_in_a_queue_can_be_refused() -> None:
    units = [append("a"), append("b", "other"), commit("s", "a")]
    queue = queue_of(*units)
    assert set(queue) == set(units)
    queue.clear()
    assert not queue
