"""The remains of an attempt that does not continue: its output is dropped, and the runs that it
folded in wait again (R38, R44)."""

from __future__ import annotations

from typing import cast

from runlane_server.core.lane.edit import Edit
from runlane_server.core.lane.states import Trigger, advance
from runlane_server.core.transition import LaneRun
from runlane_server.core.turn import DraftMessage


def park_for_restart(edit: Edit, content: tuple[DraftMessage, ...]) -> None:
    """Leaves the active run waiting for input without a node; its output is dropped (R44)."""
    active = cast("LaneRun", edit.active)
    drop_output(edit, active, content)
    parked = active.asking._replace(parked=True, restarts=True)
    edit.active = active._replace(asking=parked, host="")
    edit.record(edit.active)
    edit.put_back(unfold(edit))


def drop_output(edit: Edit, active: LaneRun, content: tuple[DraftMessage, ...]) -> None:
    """Drops the output of the attempt, except for the prompts of withdrawn folded runs."""
    folded = {run.run_id for run in edit.folded}
    withdrawn = (draft for draft in content if draft.run_id and draft.run_id not in folded)
    edit.write(active, tuple(withdrawn), "", attempt=active.attempt)


def unfold(edit: Edit) -> list[LaneRun]:
    """The runs folded into the active turn, as they were before."""
    folded, edit.folded = edit.folded, ()
    return [advance(run, Trigger.RETRY, folded_into="", turn=0) for run in folded]
