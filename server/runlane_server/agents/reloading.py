"""An agent whose code is loaded again when its files change, for development (`--reload`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import structlog

from runlane.worker.reload import Code
from runlane_server.agents.abilities import Ability, abilities_of
from runlane_server.agents.base import Agent, AgentError, AgentEvent, KeepsSessions, Turn
from runlane_server.core.errors import StartError
from runlane_server.core.model import SessionKey

log = structlog.get_logger()


class ReloadingAgent:
    """Gives each run to the agent of the code as it is. Runs under way go on with the agent that
    they have, which is closed after the last of them."""

    def __init__(self, code: Code, make: Callable[[], Agent]) -> None:
        self._code = code
        self._make = make
        self._current = make()
        self._runs: Counter[Agent] = Counter()

    @property
    def resumable(self) -> bool:
        """Whether it may be called again while it waits for input."""
        return bool(getattr(self._current, "resumable", False))

    @property
    def abilities(self) -> tuple[Ability, ...]:
        """The abilities of the code as it is."""
        return abilities_of(self._current)

    async def start(self) -> None:
        """Starts the agent."""
        await self._current.start()

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Executes a turn with the latest code. Raises AgentError if it cannot be loaded."""
        agent = await self._latest()
        self._runs[agent] += 1
        try:
            async with aclosing(agent.run(turn)) as events:
                async for event in events:
                    yield event
        finally:
            self._runs[agent] -= 1
            await self._close_unused(agent)

    async def _latest(self) -> Agent:
        if not self._code.has_changed:
            return self._current
        before = self._current
        try:
            agent = self._make()
            await agent.start()
        except StartError as error:
            raise AgentError(str(error)) from error
        self._current = agent
        log.info("agent loaded again", agent=self._code.name)
        await self._close_unused(before)
        return agent

    async def _close_unused(self, agent: Agent) -> None:
        if agent is not self._current and not self._runs[agent]:
            del self._runs[agent]
            await agent.close()

    def session_deleted(self, key: SessionKey) -> None:
        """Passes the key to the agent."""
        if isinstance(self._current, KeepsSessions):
            self._current.session_deleted(key)

    async def close(self) -> None:
        """Closes the agent."""
        await self._current.close()
