"""The input of an agent whose events are acknowledged, and whose attempt may outlive this node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from runlane_server.agents.base import AgentError, AgentEvent, FoldedPrompt, Turn
from runlane_server.agents.questions import Asked
from runlane_server.core.input import InputRequest
from runlane_server.core.model import Micros, SessionKey


class AttemptEnd:
    """The end of an attempt, as its supervisor reports it to the agent.

    `committed` is done once the end of the run is durable, or no longer this node's to commit.
    `is_leaving`: this node stops or has lost the run, and the attempt may continue elsewhere.
    `is_parked`: the run waits for people.
    `is_followed` is set by the agent, once a cancel of its task waits for the worker.
    """

    def __init__(self) -> None:
        self.committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_leaving = False
        self.is_parked = False
        self.is_followed = asyncio.Event()

    def commit(self) -> None:
        """Reports the end."""
        if not self.committed.done():
            self.committed.set_result(None)


class JsonText(str):
    """A value of an agent as JSON that was read and written once: strict, compact, without lone
    surrogates. As the value of an event it stands for what it says, not for a string."""

    __slots__ = ()


class KeptStep(NamedTuple):
    """The result of a step; among the events of a worker it has a number of its own."""

    key: str
    result: object


Emitted: TypeAlias = AgentEvent | KeptStep
"""The output that a worker numbers."""


class DurableTurn(Turn, Protocol):
    """A turn whose agent learns when its events are durable.

    Every event that is emitted is stored as one event of the run.
    """

    @property
    def key(self) -> SessionKey:
        """The session and its tenant."""

    @property
    def fence(self) -> str:
        """The token of this attempt. It is the same on every node, and cannot be guessed."""

    @property
    def deadline(self) -> Micros | None:
        """When the run times out."""

    @property
    def is_resumed(self) -> bool:
        """Whether the attempt was begun by another process."""

    @property
    def stored(self) -> int:
        """How many events of the attempt are durable."""

    @property
    def folded(self) -> Sequence[FoldedPrompt]:
        """The prompts that joined a resumed turn before."""

    @property
    def end(self) -> AttemptEnd:
        """The end of the attempt."""

    async def keep(self, step: KeptStep) -> None:
        """Adds the result of a step to the output (R39). Raises AgentError if it has one."""

    async def find_durable_step(self, key: str) -> str | None:
        """The result of a step as JSON, once it is durable; None if there is none."""

    async def park(self, questions: Sequence[Asked], checkpoint: str = "") -> bool:
        """Makes the run wait for people once the agent has returned (R40), unless the result is
        False: then all is answered. With a checkpoint the same attempt continues later. Raises
        AgentError."""

    async def answered(self, key: str) -> InputRequest:
        """An answered question of the run. Raises AgentError."""

    def follow_stored(self, on_stored: Callable[[int], None]) -> None:
        """Calls `on_stored` with the number of durable events, whenever it grows."""


class AttemptLost(AgentError):
    """The executor of the attempt is gone. The run is retried if an attempt is left, else it ends
    as INTERRUPTED."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="INTERRUPTED")


class HandedBack(AttemptLost):
    """The executor gave the run back. Without output, the attempt does not count."""
