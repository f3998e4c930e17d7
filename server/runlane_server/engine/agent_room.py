"""The room of each agent on a node: whether it is ready, and how many slots it may still use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from runlane_server.core.model import SessionKey

UNLIMITED = (1 << 31) - 1
"""Stands for no limit: more slots than any node has."""


class OfferedSlots(Protocol):
    """The slots that workers offer; see `agents.worker.workers.Workers`."""

    def offers_to(self, agent: str, tenant: str) -> bool:
        """Whether a free slot of an agent is offered to a tenant."""

    def reserve(self, agent: str, lane: SessionKey) -> None:
        """Reserves one for a lane that is about to start a run of an agent."""

    def give_back(self, lane: SessionKey) -> None:
        """Offers again what was reserved for a lane and was not used."""


class AgentRoom:
    """The slots of the agents of a node (R32).

    `limits` maps each declared agent to its limit of slots, None for no limit of its own. An agent
    that is not declared has no room. None as a name stands for a lane whose agent is not known: it
    has room if any agent has.
    """

    def __init__(self, limits: Mapping[str, int | None], ready: Iterable[str] = ()) -> None:
        self._limits = limits
        self._offered: dict[str, int] = {}
        self._sources: dict[str, OfferedSlots] = {}
        self._ready = set(ready)
        self._in_use = dict.fromkeys(limits, 0)

    def set_offered(self, agent: str, source: OfferedSlots) -> None:
        """Workers execute the agent: it has the slots that they offer, none at first."""
        self._offered[agent] = 0
        self._sources[agent] = source

    def add_offered(self, agent: str, slots: int) -> None:
        """Changes the number of slots that workers offer or use for the agent."""
        self._offered[agent] += slots

    def serves(self, agent: str | None, tenant: str) -> bool:
        """Whether the agent executes runs of a tenant now."""
        if agent is None or agent not in self._sources:
            return True
        return self._sources[agent].offers_to(agent, tenant)

    def reserve(self, agent: str | None, lane: SessionKey) -> None:
        """Reserves the slot of a worker for a lane. A worker may offer one slot for several agents,
        and only one of them can use it."""
        source = None if agent is None else self._sources.get(agent)
        if source is not None and agent is not None:
            source.reserve(agent, lane)

    def give_back(self, agent: str | None, lane: SessionKey) -> None:
        """Offers again what was reserved for a lane and was not used."""
        source = None if agent is None else self._sources.get(agent)
        if source is not None:
            source.give_back(lane)

    def limit(self, agent: str) -> int | None:
        """The number of slots that the agent may use; None for no limit of its own."""
        limit, offered = self._limits[agent], self._offered.get(agent)
        if limit is None or offered is None:
            return offered if limit is None else limit
        return min(limit, offered)

    def set_ready(self, agent: str) -> None:
        """The agent can execute runs from now on."""
        self._ready.add(agent)

    def is_ready(self, agent: str) -> bool:
        """Whether the agent is ready."""
        return agent in self._ready

    def in_use(self, agent: str) -> int:
        """The number of slots that the agent uses, or was granted."""
        return self._in_use[agent]

    def left(self, agent: str | None) -> int:
        """The number of further slots that the agent may use; not positive if it may use none."""
        if agent is None:
            return UNLIMITED if any(self.left(name) > 0 for name in self._ready) else 0
        if agent not in self._ready:
            return 0
        limit = self.limit(agent)
        return UNLIMITED if limit is None else limit - self._in_use[agent]

    def take(self, agent: str | None) -> None:
        """Counts a slot for the agent."""
        if agent is not None and agent in self._in_use:
            self._in_use[agent] += 1

    def put_back(self, agent: str | None) -> None:
        """Ends the count of a slot."""
        if agent is not None and agent in self._in_use:
            self._in_use[agent] -= 1
