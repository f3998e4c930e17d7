"""A lane recognizes updates by their ids (R46)."""

from __future__ import annotations

import pytest

from runlane_server.core import lane as rules
from runlane_server.core.errors import InvalidArgument
from runlane_server.core.model import FinishReason, Prompt, RunRequest, SessionKey, WhenBusy
from runlane_server.core.transition import Lane, Outcome
from runlane_server.core.update import Move, Place, RunUpdate

NOW = RunUpdate("r", "digest", when_busy=WhenBusy.INTERRUPT, update_id="u")


def lane_of(run_ids: str) -> Lane:
    """A lane whose first run is active."""
    lane = Lane(SessionKey("t", "s"))
    for run_id in run_ids:
        reserved = rules.reserve(lane, run_id, run_id).lane
        wanted = RunRequest(run_id, Prompt(run_id))
        lane = rules.accept(
            reserved, wanted, at=1, token=run_id, max_waiting=9, allow_missing=True
        ).lane
    return rules.dispatch(lane, at=2).lane


def test_r46_a_repeated_interrupt_spares_the_run_that_is_active_now() -> None:
    lane = rules.update(lane_of("arx"), NOW, at=3).lane
    first = RunUpdate("x", "move", move=Move(Place.FIRST))
    lane = rules.update(lane, first, at=4).lane
    lane = rules.finish(lane, "a", 1, Outcome(FinishReason.CANCELED), at=5, events=2).lane
    lane = rules.dispatch(lane, at=6).lane
    assert lane.active_run_id == "x"
    again = rules.update(lane, NOW, at=7)
    assert (again.lane, again.needs_commit) == (lane, False)
    assert again.reply.run_id == "r"


def test_r46_another_update_with_the_same_id_is_refused() -> None:
    lane = rules.update(lane_of("arx"), NOW, at=3).lane
    with pytest.raises(InvalidArgument):
        rules.update(lane, NOW._replace(digest="another"), at=4)
