"""The agent whose code runs in processes of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from runlane_server.agents.abilities import OF_CODE, Ability
from runlane_server.agents.base import AgentError
from runlane_server.agents.processes.protocol import DELETED
from runlane_server.agents.processes.supervisor import AgentProcess, ProcessSpec
from runlane_server.agents.worker.agent import WorkerAgent
from runlane_server.agents.worker.workers import Workers
from runlane_server.core.model import SessionKey

LOST = "the process of its agent has ended"
"""The message of runs that end INTERRUPTED with a process of their agent."""


class ProcessAgent(WorkerAgent):
    """Gives its turns to processes of this server. They end with it, and so do their runs."""

    outlives_node = False

    def __init__(
        self,
        name: str,
        specs: Sequence[ProcessSpec],
        abilities: frozenset[Ability] = OF_CODE,
    ) -> None:
        self.abilities = abilities
        # A process that has lost its connection has died: nobody waits for it.
        super().__init__(Workers(lease=0.0, why_lost=LOST), name)
        self._changed = asyncio.Event()
        self._processes = [
            AgentProcess(name, number, spec, self.workers, self._changed.set)
            for number, spec in enumerate(specs, start=1)
        ]

    async def load(self) -> None:
        """Starts the processes; returns once all have imported the agent. Raises StartError if one
        cannot."""
        for each in self._processes:
            each.launch()
        while not all(each.is_loaded for each in self._processes):
            await self._next_change()
            for each in self._processes:
                if (error := each.error) is not None:
                    each.error = None
                    raise error

    async def start(self) -> None:
        """Lets the processes start the agent; returns once one of them is ready.

        Raises AgentError if one fails before; it tries again on its own.
        """
        for each in self._processes:
            each.error = None
            each.launch()
            each.allow_start()
        while not any(each.is_ready for each in self._processes):
            await self._next_change()
            if errors := [each.error for each in self._processes if each.error is not None]:
                raise AgentError(str(errors[0]))

    async def _next_change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def session_deleted(self, key: SessionKey) -> None:
        """Passes the key to all processes; their agent may keep something for each session."""
        for each in self._processes:
            each.send(f"{DELETED} {json.dumps(key)}")

    async def close(self) -> None:
        """Ends the processes."""
        if self._processes:
            await asyncio.wait({asyncio.create_task(each.close()) for each in self._processes})
