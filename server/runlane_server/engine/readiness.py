"""Gets the agent ready. Until it is, accepted runs wait (R30)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import structlog

from runlane_server.agents.base import Agent
from runlane_server.core import lane as rules
from runlane_server.core.limits import Limits
from runlane_server.core.model import Micros, RunError
from runlane_server.core.transition import Lane, Transition
from runlane_server.engine.agent_output import describe
from runlane_server.engine.batches import await_in_batches
from runlane_server.engine.lanes import Lanes
from runlane_server.harness.gates import Gates, Point

log = structlog.get_logger()

BACKOFF = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds between attempts to start the agent; the last value repeats."""


class Readiness:
    """Starts the agent, with retries for as long as that takes.

    After each failed attempt the runs that wait on this node end failed. `on_ready` is called once
    the agent is ready.
    """

    def __init__(
        self,
        agent: Agent,
        lanes: Lanes,
        limits: Limits,
        gates: Gates,
        on_ready: Callable[[], None],
    ) -> None:
        self.is_ready = False
        self._agent = agent
        self._lanes = lanes
        self._limits = limits
        self._gates = gates
        self._on_ready = on_ready
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the agent in the background, if this node may run any."""
        if self._limits.max_active_runs > 0:
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
            log.error("agent is not ready", error=failure)
            error = RunError("AGENT_NOT_READY", f"the agent did not get ready: {failure}")
            await self._fail_waiting(error)
            await asyncio.sleep(BACKOFF[min(attempt, len(BACKOFF) - 1)])
        self.is_ready = True
        self._on_ready()

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
            self._lanes.post(key, lambda lane, at: _fail_waiting(lane, error, at))
            for key in self._lanes.slots.queue
        )


def _is_cancelled() -> bool:
    """Whether this task is being cancelled; an agent may raise CancelledError of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _fail_waiting(lane: Lane, error: RunError, at: Micros) -> Transition[int]:
    """Spares a lane whose run another node, which got ready earlier, has started."""
    if not lane.can_start:
        return Transition(lane, reply=0)
    return rules.fail_waiting(lane, error, at=at)
