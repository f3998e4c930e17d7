"""An agent that does what the name of its run and the number of its attempt make it draw."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from random import Random

from proofs.sim.history import History, Visit
from runlane_server.agents.base import AgentError, AgentEvent, Report, Turn
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
"""Seconds that a patient agent takes: whoever cancels it does not wait for it."""


class Failed(Exception):
    """A failure that nobody knows."""


class SimAgent:
    """The agent of one node; `dead` when the node is."""

    def __init__(self, node: int, rng: Random, history: History) -> None:
        self.dead = False
        self.closed = False
        self._node = node
        self._rng = rng
        self._history = history
        self._kinds: dict[str, Callable[[Visit, Random], Awaitable[None]]] = {
            "rest": self._rest,
            "nap": self._nap,
            "long": self._long,
            "stubborn": self._stubborn,
        }

    async def start(self) -> None:
        """Takes its time, or fails."""
        drawn = self._rng.random()
        if drawn < 0.2:
            await asyncio.sleep(drawn * 2)
        elif drawn < 0.25:
            await asyncio.sleep(LONG)
        elif drawn < 0.32:
            raise Failed("not today")

    async def close(self) -> None:
        """Nobody may be at work any more, but who was fenced off."""
        self.closed = True
        for visit in self._history.visits:
            if visit.node == self._node and not visit.gone:
                self._history.require(visit.told is not None, "the agent is closed under a run")

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Works on a turn."""
        visit = self._enter(turn)
        plan = Random(f"{turn.run_id}/{turn.attempt}")  # noqa: S311
        try:
            if plan.random() < 0.2:
                await self._look_back(turn)
            for step in range(plan.randrange(6)):
                async with aclosing(self._step(step, visit, plan, turn)) as events:
                    async for event in events:
                        yield event
            yield Report(usage=Usage(requests=1), model="sim")
        except BaseException:
            self._told(visit)
            raise
        finally:
            try:
                if not self.dead and plan.random() < 0.15:
                    await asyncio.sleep(plan.choice([0, 0.01, 0.3]))
            finally:
                self._leave(visit)

    def _enter(self, turn: Turn) -> Visit:
        history = self._history
        history.require(not self.closed, "a run is started on an agent that is closed")
        for other in history.visits:
            if other.session_id != turn.session_id or other.gone:
                continue
            fenced = other.told is not None and history.now - other.told >= GRACE - 1e-6
            history.require(fenced, f"R7: {other.run_id} and {turn.run_id} are active together")
        tick = history.note(f"agent {self._node}", f"enters {turn.run_id} #{turn.attempt}")
        visit = Visit(turn.session_id, turn.run_id, turn.attempt, self._node, tick)
        history.visits.append(visit)
        return visit

    def _told(self, visit: Visit) -> None:
        if visit.told is None:
            visit.told = self._history.now
            self._history.note(f"agent {self._node}", f"is told to leave {visit.run_id}")

    def _leave(self, visit: Visit) -> None:
        if not self.dead:
            self._history.note(f"agent {self._node}", f"leaves {visit.run_id}")
        visit.gone = True

    async def _step(
        self, step: int, visit: Visit, plan: Random, turn: Turn
    ) -> AsyncGenerator[AgentEvent, None]:
        kind = plan.choices(
            ["text", "think", "tool", "fold", "rest", "nap", "long", "stubborn", "fail"],
            [8, 2, 2, 4, 6, 3, 1, 3, 1],
        )[0]
        if kind == "text":
            for n in range(plan.randrange(1, 6)):
                text = f"<{step}.{n}>"
                visit.said.append(text)
                yield TextDelta(text)
        elif kind == "think":
            yield ReasoningDelta(f"hm{step}")
        elif kind == "tool":
            yield ToolCall(f"c{step}", "look", "{}")
            await self._rest(visit, plan)
            yield ToolResult(f"c{step}", "look", "seen")
        elif kind == "fold":
            for one in await turn.take_folded():
                text = f"[{one.run_id}]"
                visit.said.append(text)
                yield TextDelta(text)
        elif kind == "fail":
            raise AgentError("no", reason="NO") if plan.random() < 0.5 else Failed("oh")
        else:
            await self._kinds[kind](visit, plan)
            if kind == "stubborn":
                visit.said.append("still here")
                yield TextDelta("still here")

    async def _rest(self, visit: Visit, plan: Random) -> None:
        await asyncio.sleep(plan.choice([0, 0, 0.002, 0.01, 0.05]))

    async def _nap(self, visit: Visit, plan: Random) -> None:
        await asyncio.sleep(plan.random() * 2)

    async def _long(self, visit: Visit, plan: Random) -> None:
        await asyncio.sleep(LONG)

    async def _stubborn(self, visit: Visit, plan: Random) -> None:
        """Rests, and takes no notice of a cancel; now and then longer than it is given."""
        until = self._history.now + plan.choice([0.3, 0.6, 4.0])
        while not self.dead and (left := until - self._history.now) > 1e-9:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                self._told(visit)

    async def _look_back(self, turn: Turn) -> None:
        """The history is that of turns which are over."""
        messages = await turn.history()
        self._history.require(
            all(message.run_id != turn.run_id for message in messages),
            "the history has nothing of the turn itself",
        )
        last = messages[-1] if messages else None
        self._history.require(
            last is None or last.role is not Role.USER, "a turn of the history has no end"
        )
