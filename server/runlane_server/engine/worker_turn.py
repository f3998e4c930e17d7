"""The input of an agent whose runs workers execute."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from typing import Any

from runlane_server.agents.base import AgentError, FoldedPrompt
from runlane_server.agents.questions import Asked
from runlane_server.agents.worker.turn import AttemptEnd, KeptStep
from runlane_server.core.input import InputRequest
from runlane_server.core.limits import Limits
from runlane_server.core.model import Micros, SessionKey, StepResult
from runlane_server.core.transition import LaneRun
from runlane_server.engine.agent_turn import AgentTurn, Job
from runlane_server.engine.outbox import Outbox
from runlane_server.store.base import Store


class WorkerTurn(AgentTurn):
    """Implements `agents.worker.turn.DurableTurn`. `folded` are the runs that joined a resumed turn
    before; `put_step` adds the result of a step to the output."""

    def __init__(
        self,
        job: Job,
        store: Store,
        *,
        outbox: Outbox,
        put_step: Callable[[str, object], StepResult],
        end: AttemptEnd,
        limits: Limits,
        folded: Sequence[str],
        **options: Any,
    ) -> None:
        super().__init__(job, store, max_history=limits.max_history, **options)
        self.key: SessionKey = job.key
        self.fence = fence_of(store, job.key, job.run)
        self.deadline = deadline_of(job.run, limits)
        self.is_resumed = job.is_resumed
        self.stored = outbox.stored
        self.end = end
        self.folded: Sequence[FoldedPrompt] = ()
        self._folded_ids = folded
        self._outbox = outbox
        self._put_step = put_step

    async def load(self) -> None:
        """Loads what the worker does not have yet."""
        if not self.is_resumed:
            await super().load()
            return
        self.folded = [await self.prompt_of(run_id) for run_id in self._folded_ids]

    async def keep(self, step: KeptStep) -> None:
        """Adds the result of a step to the output. Raises AgentError."""
        if await self._journal.find_step(step.key) is not None:
            raise AgentError(
                f"step {step.key!r} has a result already; ask with find_step before the work"
            )
        self._journal.remember(self._put_step(step.key, step.result))

    async def find_durable_step(self, key: str) -> str | None:
        """The result of a step, once it is durable."""
        found = await self._journal.find_step(key)
        if found is not None:
            await self._outbox.flush()
        return found

    async def park(self, questions: Sequence[Asked], checkpoint: str = "") -> bool:
        """Makes the run wait for people, unless all is answered."""
        # The process has checked what its agent keeps, to which it adds the questions.
        return await self._asking.begin_to_leave(questions, checkpoint)

    async def answered(self, key: str) -> InputRequest:
        """An answered question of the run."""
        return await self._asking.settled(key)

    def follow_stored(self, on_stored: Callable[[int], None]) -> None:
        """Calls `on_stored` with the number of durable events, whenever it grows."""
        self._outbox.follow_stored(on_stored)


def deadline_of(run: LaneRun, limits: Limits) -> Micros | None:
    """When an active run times out."""
    timeout = limits.run_timeout(run.timeout)
    if timeout is None or run.started_at is None:
        return None
    return run.started_at + round(timeout.seconds * 1e6)


def fence_of(store: Store, key: SessionKey, run: LaneRun) -> str:
    """The token of an attempt: the same on all nodes of a store, also after a restart."""
    what = repr(("worker", *key, run.run_id, run.attempt, run.started_at))
    return hmac.new(store.store_id, what.encode(), hashlib.sha256).hexdigest()
