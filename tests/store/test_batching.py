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
    MAX_DELAY,
    SAMPLE,
    SILENCE,
    Pacer,
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


def test_the_first_commit_waits_for_nobody() -> None:
    assert Pacer().delay() == 0


@pytest.mark.parametrize("units", [1, 50])
def test_a_loop_with_time_to_spare_keeps_nobody_waiting(units: int) -> None:
    assert paced(units, share=0.3) == 0


def test_nobody_is_waited_for_where_nobody_comes() -> None:
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


def test_who_comes_when_the_rush_is_long_over_does_not_wait() -> None:
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
