"""Supervises one attempt of one run: drives the agent, stores what it says, reports how it ended.

The agent works in a task of its own. It may be cancelled, time out or fail; the supervisor is never
cancelled, and it alone reports the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Sequence
from contextlib import aclosing
from typing import Protocol

import structlog

from runlane_server.agents.base import Agent, AgentError, Report
from runlane_server.core.errors import IllegalCommand, RunlaneError
from runlane_server.core.limits import RETRY_PAUSE
from runlane_server.core.model import (
    NO_USAGE,
    EventBody,
    FinishReason,
    Folded,
    Micros,
    RunError,
    SessionKey,
    clean_text,
)
from runlane_server.core.trace import log_fields
from runlane_server.core.transition import LaneRun, Outcome
from runlane_server.core.turn import InvalidAgentEvent
from runlane_server.engine.agent_turn import AgentTurn, Job
from runlane_server.engine.outbox import Outbox
from runlane_server.harness.gates import Point, Stage
from runlane_server.store.base import Store

log = structlog.get_logger()

ERROR_CHARS = 2048
"""An error's message is cut here: with four bytes a character it stays within 8 KiB."""

_NOTHING_TOLD = Report()


class LaneAccess(Protocol):
    """What a supervisor needs of the lane whose run it has."""

    def may_fold(self, key: SessionKey) -> bool:
        """Whether a run seems to wait to be folded in."""

    async def fold(self, job: Job, events: int, taken: Container[str]) -> Sequence[LaneRun]:
        """Folds what waits to be folded; raises IllegalCommand if the attempt is fenced off."""

    async def finish(self, job: Job, outcome: Outcome, events: int, cancelled: str | None) -> None:
        """Ends the run, for a cancel of that reason if there is one; raises IllegalCommand if the
        attempt is fenced off."""

    async def hand_over(self, job: Job, outcome: Outcome, events: int) -> None:
        """Gives up the run, as this node stops; raises IllegalCommand as above."""


class Runner:
    """One attempt of one run, from its activation to the report of its end."""

    def __init__(
        self,
        job: Job,
        *,
        agent: Agent,
        store: Store,
        lane: LaneAccess,
        now: Callable[[], Micros],
        cancel_grace: float,
        stage: Stage,
    ) -> None:
        self.job = job
        self.stray: asyncio.Task[None] | None = None
        """The agent's task, if it did not return in its grace period."""
        self._agent = agent
        self._lane = lane
        self._store = store
        self._cancel_grace = cancel_grace
        self._stage = stage
        # Is set when there is something for the supervisor to do: the agent returned, was stopped,
        # or took too long.
        self._due: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopped = False
        self._cancelled: str | None = None
        self._handing_over = False
        self._timed_out = False
        self._working: asyncio.Task[None] | None = None
        self._outbox = Outbox(job.run_key, job.run, store, now)
        self._report = _NOTHING_TOLD
        self._folding: asyncio.Task[Sequence[LaneRun]] | None = None
        self._taken: set[str] = set()

    def start(self) -> asyncio.Task[None]:
        """Starts the agent; the task returned is its supervisor, which is never to be cancelled."""
        return asyncio.create_task(self._supervise())

    def cancel(self, reason: str) -> None:
        """Stops the agent for a cancel. What it says from now on does not count.

        The cancel is about to be committed. Should that fail, the end of the run carries it: who
        was stopped has not completed.
        """
        if self._cancelled is None:
            self._cancelled = reason
        self._stop()

    def _stop(self) -> None:
        self._outbox.close()
        self._stopped = True
        self._wake()

    def hand_over(self) -> None:
        """Stops the agent, as the node stops: the run is given up, unless it is over already."""
        if not self._over:
            self._handing_over = True
        self._stop()

    @property
    def _over(self) -> bool:
        """Whether how it ends is settled: the agent returned, was stopped, or took too long."""
        returned = self._working is not None and self._working.done()
        return returned or self._timed_out or self._stopped

    async def _at(self, point: Point) -> None:
        """The run has come to a point at which a harness may hold it."""
        await self._stage.pass_by(point, self.job.key.session_id, self.job.run.run_id)

    # The supervisor

    async def _supervise(self) -> None:
        run = self.job.run
        structlog.contextvars.bind_contextvars(
            session_id=self.job.key.session_id, run_id=run.run_id, **log_fields(self.job.trace)
        )
        log.debug("run started", attempt=run.attempt)
        work = self._working = asyncio.create_task(self._work())
        self._outbox.follow(work, on_lost=self.hand_over)
        work.add_done_callback(self._wake)
        timeout = None if run.timeout is None else run.timeout / 1e6
        await self._until_due(timeout)
        self._timed_out = not self._over
        if not work.done():
            await self._end_work(work)
        error = _what_failed(work, stopped=self._stopped)
        if self._timed_out:
            error = RunError("RUN_TIMEOUT", f"the run was active for more than {timeout:g} s")
        # Whatever it made of being stopped: what it said since is not stored, so it has not ended.
        await self._tell(error)

    async def _until_due(self, timeout: float | None) -> None:
        """One future for all that may end the agent: `asyncio.wait` costs a multiple of it."""
        if timeout is None:
            await self._due
            return
        timer = asyncio.get_running_loop().call_later(timeout, self._wake)
        try:
            await self._due
        finally:
            timer.cancel()

    def _wake(self, _: object = None) -> None:
        if not self._due.done():
            self._due.set_result(None)

    async def _end_work(self, work: asyncio.Task[None]) -> None:
        """Cancels the agent and waits until its code has returned, or its grace is over (R9)."""
        self._outbox.close()
        work.cancel()
        await asyncio.wait({work}, timeout=self._cancel_grace)
        if not work.done():
            log.warning("agent does not return; it is fenced off", grace_s=self._cancel_grace)
            self.stray = work
            work.add_done_callback(_note_stray)

    async def _tell(self, error: RunError | None) -> None:
        """Reports the end: nothing that is under way for this run is left behind it."""
        if self._folding is not None:
            await asyncio.wait({self._folding})
        outcome = self._outcome(error, await self._outbox.take_rest())
        await self._at(Point.BEFORE_FINISH)
        while not await self._told(outcome):
            await asyncio.sleep(RETRY_PAUSE)

    def _outcome(self, error: RunError | None, tail: tuple[EventBody, ...]) -> Outcome:
        reason = self._report.finish_reason or FinishReason.STOP
        if error is not None:
            reason = FinishReason.TIMEOUT if self._timed_out else FinishReason.ERROR
        return Outcome(
            finish_reason=reason,
            error=error,
            content=self._outbox.messages(),
            tail=tail,
            usage=self._report.usage or NO_USAGE,
            model=self._report.model or "",
        )

    async def _told(self, outcome: Outcome) -> bool:
        """Whether the end is written, or is not this node's to write any more.

        Where a store did not confirm it, it is written again: if the first try did succeed, the
        attempt is not the active one by now.
        """
        try:
            if self._handing_over and self._cancelled is None:
                await self._lane.hand_over(self.job, outcome, self._outbox.events)
            else:
                await self._lane.finish(self.job, outcome, self._outbox.events, self._cancelled)
        except IllegalCommand:
            log.warning("run was taken away from this node", attempt=self.job.run.attempt)
        except RunlaneError as error:
            log.warning("the end of the run could not be written", error=error.message)
            return self._store.failed is not None
        return True

    # The agent

    async def _work(self) -> None:
        # The turn knows the runner, so the runner does not know the turn: without a circle of
        # references a run is freed at its end, and not by the collector.
        turn = AgentTurn(self.job, self._store, self._fold)
        await turn.load()
        silent = True
        async with aclosing(self._agent.run(turn)) as events:
            async for event in events:
                if isinstance(event, Report):
                    self._report = _merge(self._report, event)
                    continue
                if silent:
                    silent = False
                    await self._at(Point.BEFORE_FIRST_MESSAGE)
                self._outbox.put(event)
                if self._outbox.full:
                    await self._outbox.emptied()

    async def _fold(self) -> Sequence[LaneRun]:
        """Takes the runs in that wait to be folded.

        A cancel of the agent does not undo what was committed, so the folding is a task of its own
        that the supervisor waits for.
        """
        await self._at(Point.BEFORE_STEP)
        if self._outbox.closed or not self._lane.may_fold(self.job.key):
            return ()
        self._folding = asyncio.create_task(self._fold_in())
        return await asyncio.shield(self._folding)

    async def _fold_in(self) -> Sequence[LaneRun]:
        await self._outbox.emptied()
        if self._outbox.closed:
            # The turn is ending. What joined it now would be answered by nobody.
            return ()
        try:
            folded = await self._lane.fold(self.job, self._outbox.events, self._taken)
        except IllegalCommand:
            self._stop()
            return ()
        for run in folded:
            self._taken.add(run.run_id)
            self._outbox.note(Folded(run.run_id, self.job.run.run_id))
        return folded


def _what_failed(work: asyncio.Task[None], *, stopped: bool) -> RunError | None:
    """Why the agent's code did not return in good order; None where it did or was told to stop."""
    if not work.done() or (stopped and work.cancelled()):
        return None
    if work.cancelled():
        return RunError("AGENT_ERROR", "the agent cancelled its own task")
    failure = work.exception()
    return None if failure is None else _explained(failure)


def _explained(failure: BaseException) -> RunError:
    match failure:
        case AgentError():
            return RunError(failure.reason, _short(failure.message))
        case InvalidAgentEvent():
            return RunError("AGENT_ERROR", _short(str(failure)))
        case RunlaneError():
            # What was to be read or folded for it; the store has told the log what is wrong.
            log.warning("the agent could not go on", error=failure.message)
            return RunError("AGENT_ERROR", _short(failure.message))
        case _:
            log.error("agent failed", exc_info=failure)
            return RunError("AGENT_ERROR", _short(f"{type(failure).__name__}: {failure}"))


def _short(message: str) -> str:
    return clean_text(message[:ERROR_CHARS])


def _merge(report: Report, later: Report) -> Report:
    usage = later.usage
    if report.usage is not None:
        usage = report.usage if usage is None else report.usage + usage
    return Report(
        usage=usage,
        model=later.model if later.model is not None else report.model,
        finish_reason=(
            later.finish_reason if later.finish_reason is not None else report.finish_reason
        ),
    )


def _note_stray(work: asyncio.Task[None]) -> None:
    """Looks at how a fenced-off agent ended after all, so that it is not lost silently."""
    failure = None if work.cancelled() else work.exception()
    log.info("fenced-off agent has returned", failure=repr(failure) if failure else None)
