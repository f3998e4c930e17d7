"""The states of a run, and the triggers that move one run from state to state."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from runlane_server.core.errors import IllegalCommand
from runlane_server.core.model import RunState
from runlane_server.core.transition import LaneRun


class Trigger(StrEnum):
    """Moves one run from state to state."""

    ENTER = "enter"  # it is accepted as the first run of its lane
    WAIT = "wait"  # another run is active or comes before it
    ADVANCE = "advance"  # it becomes first in its lane
    START = "start"  # its agent is started
    FOLD = "fold"  # it joins the active turn
    CANCEL = "cancel"  # a cancel covers it, or the run whose turn it joined
    WITHDRAW = "withdraw"  # a cancel covers it alone; the turn it joined continues
    COMPLETE = "complete"  # its turn completes
    FAIL = "fail"  # its turn fails, or it cannot start
    RETRY = "retry"  # its node was lost or stops, or its agent failed, and it has an attempt left
    ASK = "ask"  # its agent asks people, and it releases its slot
    RESUME = "resume"  # all its questions are answered, and it has a slot again


_S, _H = RunState, Trigger

TABLE: Mapping[tuple[RunState | None, Trigger], RunState] = MappingProxyType(
    {
        (None, _H.ENTER): _S.ACCEPTED,
        (None, _H.WAIT): _S.QUEUED,
        (_S.ACCEPTED, _H.WAIT): _S.QUEUED,
        (_S.ACCEPTED, _H.START): _S.ACTIVE,
        (_S.ACCEPTED, _H.CANCEL): _S.CANCELLED,
        (_S.ACCEPTED, _H.FAIL): _S.FAILED,
        (_S.QUEUED, _H.ADVANCE): _S.ACCEPTED,
        (_S.QUEUED, _H.FOLD): _S.FOLDED,
        (_S.QUEUED, _H.CANCEL): _S.CANCELLED,
        (_S.QUEUED, _H.FAIL): _S.FAILED,
        (_S.ACTIVE, _H.CANCEL): _S.CANCELLING,
        (_S.ACTIVE, _H.COMPLETE): _S.COMPLETED,
        (_S.ACTIVE, _H.FAIL): _S.FAILED,
        (_S.ACTIVE, _H.RETRY): _S.ACCEPTED,
        (_S.ACTIVE, _H.ASK): _S.INPUT_REQUIRED,
        (_S.INPUT_REQUIRED, _H.RESUME): _S.ACTIVE,
        (_S.INPUT_REQUIRED, _H.CANCEL): _S.CANCELLING,
        (_S.INPUT_REQUIRED, _H.COMPLETE): _S.COMPLETED,
        (_S.INPUT_REQUIRED, _H.FAIL): _S.FAILED,
        (_S.INPUT_REQUIRED, _H.RETRY): _S.ACCEPTED,
        (_S.FOLDED, _H.CANCEL): _S.CANCELLING,
        (_S.FOLDED, _H.WITHDRAW): _S.CANCELLED,
        (_S.FOLDED, _H.COMPLETE): _S.COMPLETED,
        (_S.FOLDED, _H.FAIL): _S.FAILED,
        (_S.FOLDED, _H.RETRY): _S.QUEUED,
        # A confirmed cancel stays in force, however the turn ends (R19).
        (_S.CANCELLING, _H.COMPLETE): _S.CANCELLED,
        (_S.CANCELLING, _H.FAIL): _S.CANCELLED,
    }
)
"""The next state of a run for each legal pair of state and trigger. None: not in its lane yet."""

AT_WORK = frozenset({RunState.ACTIVE, RunState.INPUT_REQUIRED})
"""The states of an active run that no cancel covers."""


def advance(run: LaneRun, trigger: Trigger, **changes: Any) -> LaneRun:
    """The run after a trigger. Raises IllegalCommand if `TABLE` has no such entry."""
    return run._replace(state=next_state(run.state, trigger), **changes)


def next_state(state: RunState | None, trigger: Trigger) -> RunState:
    """The state after a trigger; None stands for a run that has not entered its lane."""
    after = TABLE.get((state, trigger))
    if after is None:
        raise IllegalCommand(f"a run that is {state} cannot {trigger}")
    return after
