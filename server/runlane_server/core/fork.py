"""At which turn a session may be forked.

A fork begins with a copy of finished turns: they never change again, so a copy that takes a while
has the transcript of one instant.
"""

from __future__ import annotations

from runlane_server.core.errors import TurnNotFinished, TurnNotFound
from runlane_server.core.transition import Lane


def finished_turns(lane: Lane) -> int:
    """The number of turns before the first one of a run that has not ended.

    A run that waits for another attempt keeps the turn that it began.
    """
    begun = [run.turn for run in lane.runs if run.turn]
    return min(begun) - 1 if begun else lane.turn


def fork_turn(lane: Lane, at_turn: int) -> int:
    """The last turn of a fork at `at_turn`; 0 for the last finished one.

    Raises TurnNotFound and TurnNotFinished.
    """
    finished = finished_turns(lane)
    if not at_turn:
        return finished
    if at_turn > lane.turn:
        raise TurnNotFound.of(lane.key.session_id, at_turn, lane.turn)
    if at_turn > finished:
        raise TurnNotFinished.of(lane.key.session_id, at_turn, finished)
    return at_turn
