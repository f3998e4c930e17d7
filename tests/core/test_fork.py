"""At which turn a session may be forked."""

from __future__ import annotations

import pytest

from runlane_server.core.errors import TurnNotFinished, TurnNotFound
from runlane_server.core.fork import fork_turn
from runlane_server.core.model import RunState, SessionKey, WhenBusy
from runlane_server.core.transition import Lane, LaneRun

KEY = SessionKey("tenant", "session")


def run(number: int, state: RunState, turn: int = 0) -> LaneRun:
    """A run of a lane, in a turn if it has one."""
    return LaneRun(f"r{number}", number, state, WhenBusy.QUEUE, 1, number, turn=turn)


IDLE = Lane(KEY, 5, accept_seq=4, turn=4)
ACTIVE = Lane(KEY, 5, accept_seq=5, turn=4, active=run(5, RunState.ACTIVE, 4))
ASKING = ACTIVE._replace(active=run(5, RunState.INPUT_REQUIRED, 4))
QUEUED = ACTIVE._replace(waiting=(run(6, RunState.QUEUED),))
RETRYING = Lane(KEY, 5, accept_seq=4, turn=3, waiting=(run(4, RunState.ACCEPTED, 3),))
OVERTAKEN = Lane(
    KEY,
    9,
    accept_seq=6,
    turn=5,
    active=run(6, RunState.ACTIVE, 5),
    waiting=(run(4, RunState.QUEUED, 3),),
)


@pytest.mark.parametrize(
    ("lane", "last"),
    [
        (Lane(KEY, 1), 0),
        (IDLE, 4),
        (ACTIVE, 3),
        (ASKING, 3),
        (QUEUED, 3),
        (RETRYING, 2),
        (OVERTAKEN, 2),
    ],
)
def test_fork_ends_with_the_last_finished_turn(lane: Lane, last: int) -> None:
    assert fork_turn(lane, 0) == last
    for turn in range(1, last + 1):
        assert fork_turn(lane, turn) == turn
    for turn in range(last + 1, lane.turn + 1):
        with pytest.raises(TurnNotFinished, match=f"fork at turn {last}") as refused:
            fork_turn(lane, turn)
        assert refused.value.metadata["finished_turn"] == str(last)
    with pytest.raises(TurnNotFound, match=f"its last turn is {lane.turn}"):
        fork_turn(lane, lane.turn + 1)
