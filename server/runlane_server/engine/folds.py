"""Folds waiting runs into the turn of one attempt (R26)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from runlane_server.core.errors import IllegalCommand
from runlane_server.core.model import Folded
from runlane_server.core.transition import LaneRun
from runlane_server.engine.agent_code import create_own_task
from runlane_server.engine.agent_turn import Job
from runlane_server.engine.lane_access import LaneAccess
from runlane_server.engine.outbox import Outbox
from runlane_server.harness.gates import Gates, Point


class Folds:
    """The runs that were folded into the turn of an attempt.

    `due` is done when the supervisor must act: the attempt was fenced off.
    """

    def __init__(
        self, job: Job, lane: LaneAccess, outbox: Outbox, gates: Gates, due: asyncio.Future[None]
    ) -> None:
        self.taken: dict[str, None] = {}
        """The ids of the folded runs, in order."""
        self.committing: asyncio.Task[Sequence[LaneRun]] | None = None
        """The last fold. Its commit may still be in progress."""
        self.is_fenced = False
        """Whether the attempt is no longer the active one."""
        self._job = job
        self._lane = lane
        self._outbox = outbox
        self._gates = gates
        self._due = due

    async def fold(self) -> Sequence[LaneRun]:
        """Folds the waiting FOLD runs into the turn.

        Cancelling the agent must not interrupt the commit, so the fold is a task of its own, which
        the supervisor waits for.
        """
        await self._gates.wait_at(Point.BEFORE_STEP, self._job.key.session_id, self._job.run.run_id)
        if self._outbox.is_closed or not self._lane.may_fold(self._job.key):
            return ()
        self.committing = create_own_task(self._fold_in())
        return await asyncio.shield(self.committing)

    async def _fold_in(self) -> Sequence[LaneRun]:
        await self._outbox.flush()
        if self._outbox.is_closed:
            # The turn is ending: a prompt that joined it now would get no answer.
            return ()
        before = self._outbox.events
        try:
            folded = await self._lane.fold(self._job, self._outbox.events, self.taken)
        except IllegalCommand:
            self._outbox.close()
            self.is_fenced = True
            if not self._due.done():
                self._due.set_result(None)
            return ()
        for run in folded:
            self.taken[run.run_id] = None
            self._outbox.add_stored(Folded(run.run_id, self._job.run.run_id))
        # A commit that follows may have counted them already.
        self._outbox.events = max(self._outbox.events, before + len(folded))
        return folded
