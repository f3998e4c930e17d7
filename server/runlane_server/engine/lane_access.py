"""The commands that the supervisor of an attempt posts to its lane."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Sequence

import structlog

from runlane_server.access.admission import QuestionRate
from runlane_server.agents.base import AgentError
from runlane_server.core import lane as rules
from runlane_server.core.errors import CorruptRecord, IllegalCommand, RunlaneError, StoreUnavailable
from runlane_server.core.input import InputRequest, Park
from runlane_server.core.limits import RETRY_PAUSE
from runlane_server.core.model import (
    EventBody,
    FinishReason,
    Micros,
    Reasoning,
    RunError,
    SessionKey,
    Text,
    ToolCall,
    ToolResult,
    WhenBusy,
)
from runlane_server.core.observer import Observer
from runlane_server.core.transition import Lane, LaneRun, Outcome, Transition
from runlane_server.core.turn import DraftMessage
from runlane_server.engine.agent_turn import Job
from runlane_server.engine.lanes import Lanes
from runlane_server.engine.mailbox import Command, Reply
from runlane_server.engine.standing_approvals import StandingApprovals
from runlane_server.store.base import Store
from runlane_server.store.retry import retry_read

log = structlog.get_logger()

LARGE_END = 1 << 18
"""The characters of a turn from which its end is committed apart from other commands: its commit
takes longer than `CANCEL_PATIENCE`."""

INPUT_RATE_LIMITED = "INPUT_RATE_LIMITED"
"""Reason of a run that failed because agents of its tenant ask too often."""


class LaneAccess:
    """Folds runs into an active run, and ends it or hands it over.

    All commands raise IllegalCommand if the attempt was fenced off.
    """

    def __init__(
        self,
        lanes: Lanes,
        store: Store,
        observer: Observer,
        *,
        rate: QuestionRate,
        approvals: StandingApprovals,
    ) -> None:
        self._lanes = lanes
        self._store = store
        self._observer = observer
        self._rate = rate
        self._approvals = approvals

    def may_fold(self, key: SessionKey) -> bool:
        """Whether a run may wait to be folded in, as far as this node knows."""
        if self._lanes.is_shared:
            return True  # another node may have accepted one
        lane = self._lanes.peek(key)
        return lane is None or any(run.when_busy is WhenBusy.FOLD for run in lane.waiting)

    async def fold(self, job: Job, events: int, taken: Container[str]) -> Sequence[LaneRun]:
        """Folds the waiting runs that want to be folded into the turn of a run.

        If the store did not confirm the commit, the stored lane shows which runs were folded and
        are not in `taken` yet.
        """
        while True:
            try:
                return await self._post(
                    job,
                    lambda lane, at: rules.drain_for_step(
                        lane, *job.attempt, at=at, events=events, host=job.run.host
                    ),
                )
            except StoreUnavailable:
                if self._store.failed is not None:
                    raise
            await asyncio.sleep(RETRY_PAUSE)
            lane = await retry_read(self._store, lambda: self._store.load_lane(job.key))
            missed = [run for run in lane.folded if run.run_id not in taken]
            active = lane.active
            if missed and active and (active.run_id, active.attempt) == job.attempt:
                return missed

    def _post(
        self, job: Job, command: Command[Reply], *, is_large: bool = False
    ) -> asyncio.Future[Reply]:
        """Posts a command of the supervisor of an attempt, which must not have lost it since."""

        def guarded(lane: Lane, at: Micros) -> Transition[Reply]:
            if job.hold.is_over:
                raise IllegalCommand("another supervisor has the attempt")
            return command(lane, at)

        return self._lanes.post(job.key, guarded, is_large=is_large)

    def admit_questions(self, tenant: str, count: int) -> None:
        """Counts new questions toward the quota of a tenant. Raises AgentError at its limit."""
        refusal = self._rate.refusal(tenant, count)
        if refusal is not None:
            after = refusal.retry_after or 0.0
            raise AgentError(
                f"{refusal.message}; ask again in {after:.1f} s", reason=INPUT_RATE_LIMITED
            )

    async def ask(
        self,
        job: Job,
        requests: tuple[InputRequest, ...],
        events: int,
        *,
        number: int,
        resumable: bool,
        park: Park | None,
        tail: tuple[EventBody, ...],
        content: tuple[DraftMessage, ...],
    ) -> Sequence[str]:
        """Asks people; replies as `core.lane.ask` does. Raises StoreUnavailable and InputLimit."""
        if park is not None:
            self._observer.on_agent_returned(job.run_key)
        names = await self._post(
            job,
            lambda lane, at: rules.ask(
                lane,
                *job.attempt,
                requests,
                at=at,
                events=events,
                number=number,
                resumable=resumable,
                park=park,
                tail=tail,
                content=content,
            ),
        )
        self._approvals.answer_soon(job, requests, names)
        return names

    async def finish(self, job: Job, outcome: Outcome, events: int, cancelled: str | None) -> None:
        """Ends the run, or repeats the attempt as its retry policy asks (R38).

        `cancelled` is the reason of the cancel that its agent was stopped for.
        """
        self._observer.on_agent_returned(job.run_key)
        complete = await self._post(
            job,
            lambda lane, at: rules.finish(
                lane,
                *job.attempt,
                outcome,
                at=at,
                events=events,
                cancelled=cancelled,
                host=job.run.host,
            ),
            is_large=_is_large(outcome),
        )
        if complete is None and outcome.error is not None:
            log.info("attempt failed; repeated", error=outcome.error.reason)

    async def end_without_output(self, job: Job, cancelled: str | None) -> None:
        """The last resort: an end of safe fields only, after a failure to write the real one.

        Repeats it until it is committed, or no longer this node's to commit (R21). Raises
        CorruptRecord if the lane cannot be read.
        """
        error = RunError("AGENT_ERROR", "the end of the run could not be written with its output")
        outcome = Outcome(FinishReason.ERROR, error, is_final=True)
        while self._store.failed is None:
            try:
                await self.finish(job, outcome, await self._stored_events(job), cancelled)
            except IllegalCommand:
                log.warning("run fenced off", attempt=job.run.attempt)
                return
            except CorruptRecord:
                raise
            except RunlaneError as failure:
                log.warning("end of run not written", error=failure.message)
            except Exception:
                log.exception("end of run not written")
            else:
                return
            await asyncio.sleep(RETRY_PAUSE)

    async def _stored_events(self, job: Job) -> int:
        """The number of stored events of the run: after a failure nobody else knows it."""
        active = (await self._store.load_lane(job.key)).active
        if active is None or (active.run_id, active.attempt) != job.attempt:
            raise IllegalCommand("the attempt is not the active one")
        return active.events

    async def hand_over(
        self, job: Job, outcome: Outcome, events: int, why: str, *, is_unused: bool = False
    ) -> None:
        """Hands the run over because this node or its worker stops: it is retried, or ends
        INTERRUPTED."""
        self._observer.on_agent_returned(job.run_key)
        await self._post(
            job,
            lambda lane, at: rules.hand_over(
                lane,
                *job.attempt,
                outcome,
                at=at,
                events=events,
                why=why,
                is_unused=is_unused,
                host=job.run.host,
            ),
        )
        log.info("run handed over")


def _is_large(outcome: Outcome) -> bool:
    """Whether others should not wait until an end is written."""
    chars = 0
    for message in outcome.content:
        for part in message.parts:
            match part:
                case Text(text) | Reasoning(text):
                    chars += len(text)
                case ToolCall(arguments_json=text) | ToolResult(content=text):
                    chars += len(text)
                case _:
                    pass
    return chars > LARGE_END
