"""Supervises one attempt of one run: drives the agent, stores its output, and commits its end.

The agent works in a task of its own, which may be cancelled, time out or fail. The supervisor is
never cancelled, and only the supervisor commits the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import structlog

from runlane_server.agents.base import Agent, AgentError
from runlane_server.agents.worker.agent import WorkerAgent
from runlane_server.agents.worker.turn import AttemptEnd, AttemptLost, HandedBack
from runlane_server.core import lane as rules
from runlane_server.core.errors import (
    CorruptRecord,
    IllegalCommand,
    RunlaneError,
    StoreUnavailable,
)
from runlane_server.core.limits import RETRY_PAUSE, Limits, RunTimeout
from runlane_server.core.model import (
    NO_USAGE,
    EventBody,
    FinishReason,
    Micros,
    RunError,
)
from runlane_server.core.trace import log_fields
from runlane_server.core.transition import LaneRun, Outcome
from runlane_server.engine.agent_code import AgentCode, create_own_task
from runlane_server.engine.agent_output import describe, run_error
from runlane_server.engine.agent_turn import AgentTurn, Job
from runlane_server.engine.asking import Asking
from runlane_server.engine.attempt_output import AttemptOutput
from runlane_server.engine.folds import Folds
from runlane_server.engine.lane_access import LaneAccess
from runlane_server.engine.lanes import LaneContended
from runlane_server.engine.outbox import Outbox
from runlane_server.engine.pulse import Pulse
from runlane_server.engine.replay import Replays
from runlane_server.engine.worker_turn import WorkerTurn
from runlane_server.harness.gates import Gates, Point
from runlane_server.store.base import Store

log = structlog.get_logger()


class Runner:
    """One attempt of one run, from its start to the commit of its end."""

    def __init__(
        self,
        job: Job,
        *,
        agent: Agent,
        store: Store,
        lane: LaneAccess,
        now: Callable[[], Micros],
        limits: Limits,
        gates: Gates,
        pulse: Pulse,
    ) -> None:
        self.job = job
        self.is_settled = False
        """Whether the end is committed, or no longer this node's to commit."""
        self.is_abandoned = False
        """Whether the lane of the run can no longer be read: nothing can be committed for it."""
        self.strays: set[asyncio.Task[Any]] = set()
        """The tasks of the agent that did not return within the grace period."""
        self._agent = agent
        self._lane = lane
        self._store = store
        self._limits = limits
        self._cancel_grace = limits.cancel_grace
        self._rest: tuple[EventBody, ...] | None = None
        self._gates = gates
        self._now = now
        # Set when the supervisor must act: the agent returned, was stopped, or timed out.
        self._due: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopped = False
        self._cancelled: str | None = None
        self._handing_over = ""
        self._is_unused = False
        self._end = AttemptEnd() if isinstance(agent, WorkerAgent) else None
        # Only of an agent whose attempts may outlive this node.
        self._can_leave = isinstance(agent, WorkerAgent) and agent.outlives_node
        self._timed_out = False
        self._is_broken = False
        self._code = AgentCode(job.run_key, job.key.session_id)
        self._working: asyncio.Task[None] | None = None
        self._outbox = Outbox(
            job.run_key, job.run, store, now, max_output=limits.max_run_output, pulse=pulse
        )
        self._output = AttemptOutput(job, self._outbox, gates, self._due)
        self._folds = Folds(job, lane, self._outbox, gates, self._due)
        self._asking = Asking(
            job,
            store,
            lane,
            self._outbox,
            resumable=bool(getattr(agent, "resumable", False)),
            used=self._elapsed,
        )
        self._has_expired = False

    def start(self) -> asyncio.Task[None]:
        """Starts the agent; returns the supervisor's task, which must never be cancelled."""
        return create_own_task(self._supervise())

    def start_last_resort(self) -> asyncio.Task[None]:
        """Ends the run after its supervisor died without doing so; returns the new supervisor."""
        return create_own_task(self._end_without_output())

    def cancel(self, reason: str) -> None:
        """Stops the agent for a cancel; its further output is dropped.

        The cancel may not be committed yet. If that commit fails, the end of the run carries the
        cancel: a stopped agent has not completed.
        """
        if self._cancelled is None:
            self._cancelled = reason
        self._stop()

    def follow(self, run: LaneRun) -> None:
        """Takes over the state of the run, which waits for input or goes on after it."""
        self._asking.follow(run)

    def expire(self) -> None:
        """Stops the agent because nobody answered in time; the lane knows the reason."""
        self._has_expired = True
        self._stop()

    @property
    def is_waiting(self) -> bool:
        """Whether the run waits for input, and its agent with it."""
        return self._asking.is_waiting

    def _stop(self) -> None:
        self._outbox.close()
        self._stopped = True
        self._wake()

    def abandon(self) -> None:
        """Stops the agent because the lane of its run can no longer be read. The run ends when its
        session is deleted."""
        self.is_abandoned = True
        self._stop()

    def _break_off(self) -> None:
        """Stops the agent because its output cannot be stored."""
        self._is_broken = True
        self._stop()

    def hand_over(self, why: str = rules.NODE_LOST) -> None:
        """Stops the agent because the node stops; the run is handed over unless it has ended.

        `why` is the message of a run that has no attempt left. An attempt of a worker is left as it
        is: it continues where the worker reconnects (R36).
        """
        if not self._is_over:
            if self._end is not None and self._can_leave:
                self._end.is_leaving = True
            else:
                self._handing_over = why
        self._stop()

    def give_up(self, why: str) -> None:
        """Hands the run over to the other nodes, which take this one for dead. A worker may have
        sent its end already, which this node cannot commit: it repeats it elsewhere (R36)."""
        if self._end is not None and self._can_leave and not self.is_settled:
            self._end.is_leaving = True
        self.hand_over(why)

    def supersede(self) -> None:
        """Leaves the attempt to another runner of this node. It has moved away and come back: what
        this one knows of it is out of date, even if it is to end the run for a cancel."""
        self.job.hold.is_over = True
        self.hand_over()

    @property
    def events(self) -> int:
        """The number of events of the run that this node knows to be stored."""
        return self._outbox.events

    @property
    def was_left(self) -> bool:
        """Whether the attempt was left to its worker, without an end."""
        return self.is_settled and self._is_leaving

    @property
    def _is_leaving(self) -> bool:
        return self._end is not None and self._end.is_leaving and self._cancelled is None

    def _settle(self) -> None:
        self.is_settled = True
        if self._end is not None:
            self._end.commit()

    @property
    def _is_stopped(self) -> bool:
        return self._stopped or self._folds.is_fenced

    @property
    def _is_over(self) -> bool:
        """Whether the end is decided: the agent returned, was stopped or refused, or timed out."""
        returned = self._working is not None and self._working.done()
        return returned or self._timed_out or self._is_stopped or self._output.refused is not None

    async def _pass_gate(self, point: Point) -> None:
        """Waits at a point of the run while a harness gate holds it."""
        await self._gates.wait_at(point, self.job.key.session_id, self.job.run.run_id)

    # --- The supervisor -----------------------------------------------------------------------

    async def _supervise(self) -> None:
        try:
            await self._run_attempt()
        except Exception:
            # A run without an end would block its session forever (R21).
            log.exception("supervisor failed; ending its run without output")
            await self._end_without_output()

    async def _run_attempt(self) -> None:
        run = self.job.run
        structlog.contextvars.bind_contextvars(
            session_id=self.job.key.session_id, run_id=run.run_id, **log_fields(self.job.trace)
        )
        event = "run continued" if self.job.is_resumed else "run started"
        log.info(event, attempt=run.attempt)
        if self.job.is_resumed or run.asking.checkpoint:
            # Before the agent starts: a cancel keeps the output of the attempt too (R16).
            await self._restore_output()
        work = self._working = self._code.start(self._work())
        self._outbox.follow(work, on_lost=self.hand_over, on_broken=self._break_off)
        work.add_done_callback(self._wake)
        timeout = self._limits.run_timeout(run.timeout)
        self._asking.timer.begin(None if timeout is None else timeout.seconds, self._wake)
        await self._due
        self._asking.timer.end()
        self._timed_out = not self._is_over
        if self._output.refused is not None:
            # The agent is being closed, and may need as long as after a cancel.
            await asyncio.wait({work}, timeout=self._cancel_grace)
        if not work.done():
            await self._stop_agent(work)
        # Read in any case: asyncio logs an exception that nobody has read.
        failure = _failure_of(work, stopped=self._is_stopped)
        error = self._output.refused or failure
        if self._timed_out:
            error = _timeout_error(timeout)
        elif (lost := _loss_of(work)) is not None:
            self._handing_over, self._is_unused = lost.message, isinstance(lost, HandedBack)
        if error is None and self._may_leave(work):
            error = await self._leave()
            if self.is_settled:
                return
        # A stopped agent has not completed, even if it returned: its output was dropped.
        await self._report_end(error)

    @property
    def _elapsed(self) -> float:
        """Seconds that the attempt was active in another process, or before it was parked."""
        used = self.job.run.asking.used / 1e6
        if not self.job.is_resumed or self.job.run.started_at is None:
            return used
        return max(used, (self._now() - self.job.run.started_at) / 1e6)

    def _may_leave(self, work: asyncio.Task[None]) -> bool:
        """Whether the agent has returned to wait for input, and the run is not about to end."""
        has_left = self._asking.leaving is not None and not work.cancelled()
        ends = self._cancelled is not None or self._has_expired
        return has_left and not (ends or self._is_broken or self.is_abandoned)

    async def _leave(self) -> RunError | None:
        """Parks the run, and settles it here; or returns why that is not possible."""
        tail = await self._outbox.take_rest()
        self._rest = tail
        try:
            is_parked = await self._asking.leave(tail, self._outbox.messages)
        except IllegalCommand:
            log.warning("run fenced off", attempt=self.job.run.attempt)
            self._settle()
        except AgentError as refused:
            return run_error(refused)
        else:
            if is_parked:
                self._rest = ()
            # A run that was about to end when it parked is for this runner to end.
            ends = self._cancelled is not None or self._has_expired
            if is_parked and not ends:
                if self._end is not None:
                    self._end.is_parked = True
                self._settle()
        return None

    def _wake(self, _: object = None) -> None:
        if not self._due.done():
            self._due.set_result(None)

    async def _stop_agent(self, work: asyncio.Task[None]) -> None:
        """Cancels the agent's task, and waits until it has returned, and all tasks that it started,
        or the grace period is over (R9)."""
        self._outbox.close()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._cancel_grace
        if self.job.is_resumed:
            await self._until_followed(work)
        work.cancel()
        # A task may start others before it returns.
        while (left := self._code.working()) and loop.time() < until:
            await asyncio.wait(left, timeout=until - loop.time())
        if left:
            log.warning("agent did not return; fenced off", grace_s=self._cancel_grace)
            self.strays = left
            for task in left:
                task.add_done_callback(_log_stray)

    async def _until_followed(self, work: asyncio.Task[None]) -> None:
        """Waits until a cancel of the agent's task waits for the worker, which has had the attempt
        since before this process began to supervise it (R9)."""
        if self._end is None or self._is_leaving:
            return
        followed = create_own_task(self._end.is_followed.wait())
        await asyncio.wait(
            {work, followed}, timeout=self._cancel_grace, return_when=asyncio.FIRST_COMPLETED
        )
        followed.cancel()

    async def _report_end(self, error: RunError | None) -> None:
        """Commits the end, after everything that is in progress for this run."""
        if self._folds.committing is not None:
            await asyncio.wait({self._folds.committing})
        await self._end_asking()
        rest = self._rest if self._rest is not None else await self._outbox.take_rest()
        outcome = self._outcome(error, rest)
        if self._is_broken:
            await self._end_without_output()
            return
        if self.is_abandoned:
            self._settle_abandoned()
            return
        if not self._is_leaving:
            await self._pass_gate(Point.BEFORE_FINISH)
        while not (self._is_leaving or await self._commit_end(outcome)):
            await asyncio.sleep(RETRY_PAUSE)
        if self._is_leaving:
            log.info("run left to its worker", attempt=self.job.run.attempt)
        self._settle()

    async def _end_asking(self) -> None:
        """Waits for an ask that is being committed."""
        posting = self._asking.posting
        if posting is None or posting.done():
            return
        # It waits for nothing else once the output is closed and the lane has decided.
        await asyncio.wait({posting}, timeout=self._cancel_grace)
        posting.cancel()

    async def _end_without_output(self) -> None:
        """The last resort, after a failure to write the real end."""
        if self._working is not None and not self._working.done():
            await self._stop_agent(self._working)
        await self._outbox.take_rest()
        try:
            await self._lane.end_without_output(self.job, self._cancelled)
        except CorruptRecord:
            self._settle_abandoned()
        else:
            self._settle()

    def _settle_abandoned(self) -> None:
        log.error(
            "run abandoned: the record of its session is damaged; deleting the session ends it"
        )
        self.is_abandoned = True
        self._settle()

    def _outcome(self, error: RunError | None, tail: tuple[EventBody, ...]) -> Outcome:
        reason = self._output.report.finish_reason or FinishReason.STOP
        if error is not None:
            reason = FinishReason.TIMEOUT if self._timed_out else FinishReason.ERROR
        return Outcome(
            finish_reason=reason,
            error=error,
            content=self._outbox.messages(),
            tail=tail,
            usage=self._output.report.usage or NO_USAGE,
            model=self._output.report.model or "",
            result=self._output.result,
        )

    async def _commit_end(self, outcome: Outcome) -> bool:
        """Returns whether the end is committed, or no longer this node's to commit.

        A commit that the store did not confirm is repeated: if the first one succeeded, the attempt
        is no longer the active one.
        """
        try:
            if self._handing_over and self._cancelled is None:
                why = self._handing_over
                await self._lane.hand_over(
                    self.job, outcome, self._outbox.events, why, is_unused=self._is_unused
                )
            else:
                await self._lane.finish(self.job, outcome, self._outbox.events, self._cancelled)
        except IllegalCommand:
            log.warning("run fenced off", attempt=self.job.run.attempt)
            if self._end is not None:
                # Its worker must not take that for the end: another node may have the attempt.
                self._end.is_leaving = True
        except CorruptRecord:
            self._settle_abandoned()
        except (RunlaneError, LaneContended) as error:
            log.warning("end of run not written", error=str(error))
            return self._store.failed is not None
        return True

    # --- The agent ----------------------------------------------------------------------------

    async def _work(self) -> None:
        """Runs the agent. An exception that would end the process ends the run only: asyncio lets
        SystemExit and KeyboardInterrupt of a task leave the event loop."""
        self._code.enter()
        try:
            await self._run_agent()
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            raise AgentError(f"the agent raised {describe(error)}") from error

    async def _run_agent(self) -> None:
        # The turn refers to the runner, so the runner does not refer to the turn: without a
        # reference cycle the run is freed at once, not by the garbage collector.
        turn = self._make_turn()
        await turn.load()
        async with aclosing(self._agent.run(turn)) as events:
            async for event in events:
                await self._output.accept(event)

    def _make_turn(self) -> AgentTurn:
        if self._end is None:
            return AgentTurn(
                self.job,
                self._store,
                fold=self._folds.fold,
                accept=self._output.accept,
                store_step=self._output.store_step,
                asking=self._asking,
                max_history=self._limits.max_history,
            )
        return WorkerTurn(
            self.job,
            self._store,
            fold=self._folds.fold,
            accept=self._output.accept,
            store_step=self._output.store_step,
            put_step=self._output.put_step,
            asking=self._asking,
            outbox=self._outbox,
            end=self._end,
            limits=self._limits,
            folded=list(self._folds.taken),
        )

    async def _restore_output(self) -> None:
        """Continues after the output that the attempt has stored before."""
        replays = Replays(self._store, self._limits.max_run_output)
        while True:
            try:
                async with replays.replay(self.job.run_key) as replay:
                    self._outbox.restore(replay)
            except StoreUnavailable:
                if self._store.failed is not None:
                    raise
                await asyncio.sleep(RETRY_PAUSE)
                continue
            self._folds.taken = dict.fromkeys(replay.folded)
            self._output.is_silent = not replay.output_events
            return


def _failure_of(work: asyncio.Task[None], *, stopped: bool) -> RunError | None:
    """Why the agent failed; None if it returned or was stopped."""
    if not work.done() or (stopped and work.cancelled()):
        return None
    if work.cancelled():
        return RunError("AGENT_ERROR", "the agent cancelled its own task")
    failure = work.exception()
    return None if failure is None else run_error(failure)


def _loss_of(work: asyncio.Task[None]) -> AttemptLost | None:
    """How the executor of the attempt was lost, if it was."""
    if not work.done() or work.cancelled():
        return None
    failure = work.exception()
    return failure if isinstance(failure, AttemptLost) else None


def _timeout_error(timeout: RunTimeout | None) -> RunError:
    assert timeout is not None  # noqa: S101 - without one it did not time out
    limit = f"{timeout.seconds:g} s ({timeout.source})"
    return RunError("RUN_TIMEOUT", f"the run was active for more than {limit}")


def _log_stray(work: asyncio.Task[Any]) -> None:
    """Logs the end of a fenced-off task, so that its failure is not lost."""
    failure = None if work.cancelled() else work.exception()
    log.info("fenced-off agent returned", exc_info=failure)
