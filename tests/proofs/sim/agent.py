"""An agent whose behaviour is drawn from the id of its run and the number of its attempt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from random import Random

from proofs.sim.history import Execution, History
from runlane_server.agents.base import AgentError, AgentEvent, Report, Turn
from runlane_server.core.agents import DEFAULT_AGENT
from runlane_server.core.model import (
    ReasoningDelta,
    Role,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)

GRACE = 1.0
"""Seconds after which a cancelled agent is fenced off."""

LONG = 60.0
"""Seconds that a long-running agent takes; cancels do not wait for it."""


class Failed(Exception):
    """An exception that the engine does not know."""


OTHER = "other"
"""The agent besides the default one."""


WORKED = "worked"
"""The agent that workers execute."""

LEASE = 3.0
"""Seconds that a worker without a connection keeps its run."""

_SLACK = 1e-6


def agent_of(run_id: str) -> str:
    """The agent that a run names, the same for a repeated accept; empty for the default."""
    drawn = Random(f"agent of {run_id}").random()  # noqa: S311
    likely = 0.3 if run_id.startswith("client 0") else 0.7  # some sessions are for workers
    return WORKED if drawn > likely else OTHER if drawn < 0.3 else ""


def is_at_work(history: History, execution: Execution) -> bool:
    """Whether nobody else may be active in the session of an execution."""
    if execution.host in history.lost_hosts and execution.node in history.paused_nodes:
        return False  # it is not at work, and what it does when it continues is refused
    since, away_since = execution.cancelled_at, execution.away_since
    if execution.has_ended or execution.is_fenced:
        return False
    if since is not None and history.now - since >= GRACE - _SLACK:
        return False
    if away_since is None:
        return True
    is_kept = execution.has_begun and history.now - away_since < LEASE - _SLACK
    return is_kept and not history.has_ended(execution.run_id)


class SimAgent:
    """An agent of one node, with its limit of slots; `dead` once the node has crashed."""

    def __init__(  # noqa: PLR0917 - what it is made of
        self,
        node: int,
        rng: Random,
        history: History,
        name: str,
        slots: int | None,
        host_of: Callable[[str], str],
    ) -> None:
        self.name = name
        self.slots = slots
        self.dead = False
        self.closed = False
        self._is_ready = False
        self._node = node
        self._rng = rng
        self._history = history
        self._host_of = host_of
        self._kinds: dict[str, Callable[[Execution, Random], Awaitable[None]]] = {
            "rest": self._rest,
            "nap": self._nap,
            "long": self._long,
            "stubborn": self._stubborn,
        }

    async def start(self) -> None:
        """Takes a while, or fails."""
        drawn = self._rng.random()
        if drawn < 0.2:
            await asyncio.sleep(drawn * 2)
        elif drawn < 0.25:
            await asyncio.sleep(LONG)
        elif drawn < 0.32:
            raise Failed("not today")
        self._is_ready = True

    async def close(self) -> None:
        """Checks that no execution is left except fenced-off ones."""
        self.closed = True
        for execution in self._history.executions:
            if self._is_own(execution) and not execution.has_ended:
                self._history.require(
                    execution.cancelled_at is not None, "the agent is closed under a run"
                )

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Works on a turn."""
        execution = self._enter(turn)
        plan = Random(f"{turn.run_id}/{turn.attempt}")  # noqa: S311
        try:
            if plan.random() < 0.2:
                await self._check_history(turn)
            for step in range(plan.randrange(6)):
                async with aclosing(self._step(step, execution, plan, turn)) as events:
                    async for event in events:
                        yield event
            yield Report(usage=Usage(requests=1), model="sim")
        except BaseException:
            self._note_cancelled(execution)
            raise
        finally:
            try:
                if not self.dead and plan.random() < 0.15:
                    await asyncio.sleep(plan.choice([0, 0.01, 0.3]))
            finally:
                self._leave(execution)

    def _enter(self, turn: Turn) -> Execution:
        history = self._history
        history.require(not self.closed, "a run is started on an agent that is closed")
        history.require(self._is_ready, "R32: a run is started on an agent that is not ready")
        self._check_name(turn.run_id)
        at_work = [it for it in history.executions if is_at_work(history, it)]
        for other in at_work:
            history.require(
                other.session_id != turn.session_id,
                f"R7: {other.run_id} and {turn.run_id} are active together",
            )
        own = sum(map(self._is_own, at_work))
        history.require(
            self.slots is None or own < self.slots, f"R32: {self.name} is above its limit"
        )
        tick = history.note(f"agent {self._node}", f"enters {turn.run_id} #{turn.attempt}")
        execution = Execution(
            turn.session_id, turn.run_id, turn.attempt, self._node, tick, agent=self.name
        )
        execution.host = self._host_of(turn.session_id)
        history.executions.append(execution)
        return execution

    def _check_name(self, run_id: str) -> None:
        wanted = agent_of(run_id) or DEFAULT_AGENT
        self._history.require(
            wanted == self.name, f"R31: {self.name} executes {run_id} of {wanted}"
        )

    def _is_own(self, execution: Execution) -> bool:
        return (execution.node, execution.agent) == (self._node, self.name)

    def _note_cancelled(self, execution: Execution) -> None:
        if execution.cancelled_at is None:
            execution.cancelled_at = self._history.now
            self._history.note(f"agent {self._node}", f"is cancelled in {execution.run_id}")

    def _leave(self, execution: Execution) -> None:
        if not self.dead:
            self._history.note(f"agent {self._node}", f"leaves {execution.run_id}")
        execution.has_ended = True

    async def _step(
        self, step: int, execution: Execution, plan: Random, turn: Turn
    ) -> AsyncGenerator[AgentEvent, None]:
        kind = plan.choices(
            ["text", "think", "tool", "fold", "rest", "nap", "long", "stubborn", "fail"],
            [8, 2, 2, 4, 6, 3, 1, 3, 1],
        )[0]
        if kind == "text":
            for n in range(plan.randrange(1, 6)):
                text = f"<{step}.{n}>"
                execution.said.append(text)
                yield TextDelta(text)
        elif kind == "think":
            yield ReasoningDelta(f"hm{step}")
        elif kind == "tool":
            yield ToolCall(f"c{step}", "look", "{}")
            await self._rest(execution, plan)
            yield ToolResult(f"c{step}", "look", "seen")
        elif kind == "fold":
            for one in await turn.take_folded():
                self._check_name(one.run_id)
                text = f"[{one.run_id}]"
                execution.said.append(text)
                yield TextDelta(text)
        elif kind == "fail":
            raise AgentError("no", reason="NO") if plan.random() < 0.5 else Failed("oh")
        else:
            await self._kinds[kind](execution, plan)
            if kind == "stubborn":
                execution.said.append("still here")
                yield TextDelta("still here")

    async def _rest(self, execution: Execution, plan: Random) -> None:
        await asyncio.sleep(plan.choice([0, 0, 0.002, 0.01, 0.05]))

    async def _nap(self, execution: Execution, plan: Random) -> None:
        await asyncio.sleep(plan.random() * 2)

    async def _long(self, execution: Execution, plan: Random) -> None:
        await asyncio.sleep(LONG)

    async def _stubborn(self, execution: Execution, plan: Random) -> None:
        """Rests and ignores a cancel, sometimes for longer than the grace period."""
        until = self._history.now + plan.choice([0.3, 0.6, 4.0])
        while not self.dead and (left := until - self._history.now) > 1e-9:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                self._note_cancelled(execution)

    async def _check_history(self, turn: Turn) -> None:
        """Checks that the history contains only ended turns."""
        messages = await turn.history()
        self._history.require(
            all(message.run_id != turn.run_id for message in messages),
            "the history has nothing of the turn itself",
        )
        last = messages[-1] if messages else None
        self._history.require(
            last is None or last.role is not Role.USER, "a turn of the history has no end"
        )
