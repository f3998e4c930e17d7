"""Gets an agent ready. Until it is, its accepted runs wait (R30, R32)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import structlog

from runlane_server.core import lane as rules
from runlane_server.core.agents import AgentNames
from runlane_server.core.errors import RunlaneError
from runlane_server.core.limits import Limits
from runlane_server.core.model import Micros, RunError, SessionKey
from runlane_server.core.transition import Lane, Transition
from runlane_server.engine.agent_output import describe
from runlane_server.engine.agent_table import DeclaredAgent
from runlane_server.engine.batches import await_in_batches
from runlane_server.engine.lanes import Lanes
from runlane_server.harness.gates import Gates, Point

log = structlog.get_logger()

BACKOFF = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds between attempts to start the agent; the last value repeats."""


class Readiness:
    """Starts an agent, with retries for as long as that takes.

    After each failed attempt its runs that wait on this node end failed; the runs of other agents
    are not affected. `on_ready` is called once the agent is ready.
    """

    def __init__(
        self,
        declared: DeclaredAgent,
        names: AgentNames,
        lanes: Lanes,
        limits: Limits,
        *,
        gates: Gates,
        on_ready: Callable[[str], None],
    ) -> None:
        self._name = declared.name
        self._agent = declared.agent
        self._runs_here = declared.slots != 0 and limits.max_active_runs > 0
        # How its runs are stored: without a name if they are from before agents had names.
        self._stored = {declared.name} | ({""} if declared.name == names.default else set())
        self._lanes = lanes
        self._limits = limits
        self._gates = gates
        self._on_ready = on_ready
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the agent in the background, if this node may run it."""
        if self._runs_here:
            self._task = asyncio.create_task(self._get_ready())

    async def stop(self) -> None:
        """Stops trying; waits at most the grace period of a cancel."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=self._limits.cancel_grace)

    async def _get_ready(self) -> None:
        for attempt in itertools.count():
            failure = await self._start_agent()
            if failure is None:
                break
            log.error("agent is not ready", agent=self._name, error=failure)
            error = RunError(
                "AGENT_NOT_READY", f"the agent {self._name!r} did not get ready: {failure}"
            )
            await self._fail_waiting(error)
            await asyncio.sleep(BACKOFF[min(attempt, len(BACKOFF) - 1)])
        self._on_ready(self._name)

    async def _start_agent(self) -> str | None:
        """Makes one attempt; returns why it failed, None if the agent is ready."""
        timeout = asyncio.timeout(self._limits.ready_timeout)
        try:
            async with timeout:
                await self._gates.wait_at(Point.BEFORE_AGENT_READY)
                await self._agent.start()
        except TimeoutError as error:
            if not timeout.expired():
                return describe(error)  # the agent's own
            return f"not within {self._limits.ready_timeout:g} s"
        except BaseException as error:
            if _is_cancelled():
                raise
            return describe(error)
        return None

    async def _fail_waiting(self, error: RunError) -> None:
        await await_in_batches(
            self._fail_lane(key, error) for key in self._lanes.slots.queue_of(self._name)
        )

    async def _fail_lane(self, key: SessionKey, error: RunError) -> None:
        """Ends the waiting runs of a lane. One that cannot be read or written now is left to the
        next attempt: the agent must be tried again all the same."""
        try:
            await self._lanes.post(key, lambda lane, at: self._fail_waiting_of(lane, error, at))
        except RunlaneError as why:
            log.warning("waiting runs not ended", agent=self._name, error=why.message)

    def _fail_waiting_of(self, lane: Lane, error: RunError, at: Micros) -> Transition[int]:
        """Spares a lane whose run another node, which got ready earlier, has started, and one whose
        next run is for another agent."""
        if not lane.can_start or lane.waiting[0].agent not in self._stored:
            return Transition(lane, reply=0)
        return rules.fail_waiting(lane, error, at=at, agents=self._stored)


def _is_cancelled() -> bool:
    """Whether this task is being cancelled; an agent may raise CancelledError of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
