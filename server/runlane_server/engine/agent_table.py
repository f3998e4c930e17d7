"""The agents of a node by name, and their state."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import structlog

from runlane_server.agents.abilities import Ability, abilities_of
from runlane_server.agents.base import Agent, KeepsSessions
from runlane_server.agents.worker.agent import WorkerAgent
from runlane_server.agents.worker.workers import Workers
from runlane_server.core.agents import DEFAULT_AGENT, AgentNames
from runlane_server.core.model import SessionKey
from runlane_server.engine.agent_code import create_own_task
from runlane_server.engine.agent_room import AgentRoom

log = structlog.get_logger()


class DeclaredAgent(NamedTuple):
    """An agent that a server declares. `kind` is for people. `slots` is the maximum number of its
    active runs on a node, None for no limit of its own; with 0 the node only accepts its runs."""

    name: str
    agent: Agent
    kind: str = ""
    slots: int | None = None


class AgentState(NamedTuple):
    """The state of a declared agent on this node."""

    name: str
    kind: str
    is_ready: bool
    is_default: bool
    slots_in_use: int
    slots_limit: int | None
    can: tuple[Ability, ...] = ()


class AgentTable:
    """The agents of a node, in the order of their declaration."""

    def __init__(self, declared: Sequence[DeclaredAgent]) -> None:
        self._declared = {each.name: each for each in declared}
        self.names = AgentNames.of(tuple(self._declared))
        self.room = AgentRoom({each.name: each.slots for each in declared})
        self.workers = self._connect_workers()

    def _connect_workers(self) -> Workers | None:
        """The workers of all agents that workers of the network execute; None if there is none."""
        workers: Workers | None = None
        for each in self:
            if not isinstance(each.agent, WorkerAgent):
                continue
            each.agent.name = each.name
            if each.agent.outlives_node:
                each.agent.workers = workers = workers or each.agent.workers
            self.room.set_offered(each.name, each.agent.workers)
        return workers

    def is_of_workers(self, stored: str) -> bool:
        """Whether a worker that outlives this node executes the agent of a stored run."""
        declared = self._declared.get(self.names.full_name(stored))
        agent = None if declared is None else declared.agent
        return isinstance(agent, WorkerAgent) and agent.outlives_node

    @classmethod
    def of(cls, agents: Agent | AgentTable) -> AgentTable:
        """A table; a single agent is called `default`."""
        if isinstance(agents, AgentTable):
            return agents
        return cls([DeclaredAgent(DEFAULT_AGENT, agents)])

    def __iter__(self) -> Iterator[DeclaredAgent]:
        return iter(self._declared.values())

    def agent_of(self, stored: str) -> Agent:
        """The agent of a stored run. Raises KeyError if it is not declared."""
        return self._declared[self.names.full_name(stored)].agent

    @property
    def are_ready(self) -> bool:
        """Whether all agents that execute runs here are ready."""
        return all(self.room.is_ready(each.name) for each in self if each.slots != 0)

    @property
    def states(self) -> tuple[AgentState, ...]:
        """The state of each agent."""
        return tuple(
            AgentState(
                each.name,
                each.kind,
                self.room.is_ready(each.name),
                each.name == self.names.default,
                self.room.in_use(each.name),
                self.room.limit(each.name),
                abilities_of(each.agent),
            )
            for each in self
        )

    def forget_session(self, key: SessionKey) -> None:
        """Lets the agents remove what they keep for a session; a failure of their code is logged.

        Agents without slots too: they may have had some when the session was in use.
        """
        for each in self:
            if isinstance(each.agent, KeepsSessions):
                try:
                    each.agent.session_deleted(key)
                except Exception:
                    log.exception("agent failed to remove a session", agent=each.name)

    async def close(self, timeout: float) -> None:
        """Closes all agents at once; a failure of their code, or its silence, stops nothing."""
        closing = {create_own_task(_closed(each)): each for each in self}
        _, silent = await asyncio.wait(closing, timeout=timeout)
        for task in silent:
            log.warning("agent did not close", agent=closing[task].name, grace_s=timeout)
            task.cancel()


async def _closed(declared: DeclaredAgent) -> None:
    """Closes an agent, whose code may raise anything; it is logged."""
    try:
        await declared.agent.close()
    except BaseException:  # asyncio lets some of them end the server
        log.exception("agent failed to close", agent=declared.name)
