"""The output and the reports of the agent of one attempt."""

from __future__ import annotations

import asyncio

from runlane_server.agents.base import AgentError, AgentEvent, Report, Result
from runlane_server.core.model import RunError, StepResult
from runlane_server.core.turn import InvalidAgentEvent
from runlane_server.engine.agent_output import ReportCheck, run_error
from runlane_server.engine.agent_turn import Job
from runlane_server.engine.outbox import Outbox, pieces_of
from runlane_server.harness.gates import Gates, Point

_EMPTY_REPORT = Report()

SLICE_EVENTS = 256
"""Events and reports after which an agent lets others use the event loop, even if it never awaits.
Its cancel reaches it there too. Each of them has a slice in one iteration of the loop, so with 32
such agents a call waits for some milliseconds."""

EVENT_CHARS = 256
"""Each of so many characters of a text counts as one more event of a slice."""


class AttemptOutput:
    """Checks what an agent emits, and passes it to the outbox; adds up what it reports.

    `due` is done when the supervisor must act: something was refused. It does not refer to the
    runner, so that the runner is freed without the garbage collector.
    """

    def __init__(self, job: Job, outbox: Outbox, gates: Gates, due: asyncio.Future[None]) -> None:
        self.report = _EMPTY_REPORT
        self.result = ""
        """The structured result, as JSON."""
        self.refused: RunError | None = None
        """Why the run fails, if the agent emitted something that is refused."""
        self.is_silent = True
        """Whether the agent has not emitted anything yet."""
        self._ids = job.key.session_id, job.run.run_id
        self._outbox = outbox
        self._gates = gates
        self._due = due
        self._check = ReportCheck()
        self._slice = 0

    async def accept(self, event: AgentEvent) -> None:
        """Takes an event that the agent yielded or emitted.

        Raises InvalidAgentEvent, and AgentError with the reason OUTPUT_LIMIT.

        A refused event fails the run, even if the agent catches the exception or takes long to
        return.
        """
        self._slice += 1
        if self._slice >= SLICE_EVENTS:
            self._slice = 0
            await asyncio.sleep(0)
        try:
            if isinstance(event, Report):
                self._add_report(event)
                return
            if isinstance(event, Result):
                self._add_result(event)
                return
            body = self._check.event(event)
            if self.is_silent:
                self.is_silent = False
                await self._gates.wait_at(Point.BEFORE_FIRST_MESSAGE, *self._ids)
            for piece in pieces_of(body):
                self._outbox.put(piece)
                self._slice += len(getattr(piece, "text", "")) // EVENT_CHARS
                if self._outbox.is_full:
                    await self._outbox.flush()
        except (InvalidAgentEvent, AgentError) as refused:
            self._refuse(refused)
            raise

    def _add_report(self, report: Report) -> None:
        """Adds up usage; of the other fields the last value counts. Raises InvalidAgentEvent."""
        known, later = self.report, self._check.report(report)
        usage = later.usage
        if known.usage is not None:
            usage = known.usage if usage is None else known.usage + usage
        self.report = Report(
            usage=usage,
            model=known.model if later.model is None else later.model,
            finish_reason=(
                known.finish_reason if later.finish_reason is None else later.finish_reason
            ),
        )

    def _add_result(self, result: Result) -> None:
        """Takes the structured result; the last one counts. Raises InvalidAgentEvent, and
        AgentError with the reason OUTPUT_LIMIT."""
        json = self._check.result(result)
        self._outbox.count_result(json)
        self.result = json

    async def store_step(self, key: str, result: object) -> StepResult:
        """Makes the result of a step durable before the agent continues (R39). Raises AgentError,
        and InvalidAgentEvent for a result that is no JSON."""
        step = self.put_step(key, result)
        await self._outbox.flush()
        if self._outbox.is_closed:
            raise AgentError("the run was stopped before the step was stored", reason="INTERRUPTED")
        return step

    def put_step(self, key: str, result: object) -> StepResult:
        """Adds the result of a step to the output. Raises as `store_step`."""
        try:
            step = self._check.step(key, result)
            self._outbox.put(step)
        except (InvalidAgentEvent, AgentError) as refused:
            self._refuse(refused)
            raise
        return step

    def _refuse(self, error: InvalidAgentEvent | AgentError) -> None:
        """Fails the run because of something that its agent emitted."""
        if self.refused is None:
            # Not the exception, which refers to the runner: see `Runner._run_agent`.
            self.refused = run_error(error)
        self._outbox.close()
        if not self._due.done():
            self._due.set_result(None)
