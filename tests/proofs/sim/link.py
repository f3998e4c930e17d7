"""A connection of a simulated worker to a node: what `rpc/worker` is on the wire, without it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from proofs.sim.agent import WORKED
from proofs.sim.clients import TENANT
from proofs.sim.history import Execution
from proofs.sim.node import Node
from runlane_server.agents.base import AgentError, AgentEvent, Report
from runlane_server.agents.worker.messages import Down, Downstream
from runlane_server.agents.worker.slot import Resumption, Slot
from runlane_server.core.errors import InvalidArgument, RunlaneError
from runlane_server.core.model import Usage


class Offer(NamedTuple):
    """Offers the slot, or continues an attempt."""

    worker: str
    resume: Resumption | None


class Begun(NamedTuple):
    """The worker has the turn."""

    execution: Execution


class Emit(NamedTuple):
    """Events, the first with a number."""

    number: int
    events: Sequence[AgentEvent]


class TakeFolded(NamedTuple):
    """Asks for prompts to fold."""

    number: int


class End(NamedTuple):
    """The end of the turn, whose last event has a number."""

    number: int
    error: AgentError | None
    was_stopped: bool


class HandBack(NamedTuple):
    """Gives the turn back."""

    number: int


Up: TypeAlias = Offer | Begun | Emit | TakeFolded | End | HandBack


class Link:
    """A connection. `is_attached`: the worker may send what belongs to its attempt."""

    def __init__(self, node: Node, wake: asyncio.Event) -> None:
        self.is_closed = False
        self.is_attached = False
        self.node = self._node = node
        self._wake = wake
        self._up: deque[Up] = deque()
        self._down: deque[Down] = deque()
        self._due = asyncio.Event()
        self._handler = node.handle(self._serve())
        # A task that is cancelled before its first step closes nothing itself.
        self._handler.add_done_callback(self._on_served)

    # The worker's end

    def send(self, message: Up) -> None:
        """Sends a message."""
        self._up.append(message)
        self._due.set()

    def begin(self, execution: Execution) -> None:
        """Confirms a turn."""
        self.send(Begun(execution))

    @property
    def has_news(self) -> bool:
        """Whether something came, or the end."""
        return bool(self._down) or self.is_closed

    def take(self) -> list[Down]:
        """The messages that have come."""
        messages = list(self._down)
        self._down.clear()
        return messages

    def fail(self) -> None:
        """The worker notices that nothing comes from the node."""
        self._on_served(None)

    def drop(self) -> None:
        """Loses the connection."""
        self._handler.cancel()

    # The node's end

    def _on_served(self, _: object) -> None:
        self.is_closed = True
        self._wake.set()

    async def _serve(self) -> None:
        down = Downstream()
        slot = Slot(TENANT, down, "caller")
        workers = self._node.workers
        try:
            workers.connect(slot)
        except RunlaneError:
            return
        reading = asyncio.create_task(self._read(slot, down))
        try:
            async for message in down.messages():
                self._down.append(message)
                self._wake.set()
        except RunlaneError:
            pass
        finally:
            reading.cancel()
            self.is_closed = True
            workers.disconnect(slot)
            await asyncio.wait({reading})

    async def _read(self, slot: Slot, down: Downstream) -> None:
        try:
            while True:
                while self._up:
                    await self._take(slot, self._up.popleft())
                    await down.until_room()
                self._due.clear()
                await self._due.wait()
        except InvalidArgument as error:
            self._node.history.broken(f"R34: a worker is refused: {error.message}")
        except RunlaneError as error:
            down.close(error)

    async def _take(self, slot: Slot, message: Up) -> None:
        match message:
            case Offer(worker, resume):
                slot.begin_offer((WORKED,), worker)
                await self._offer(slot, resume)
            case Begun(execution):
                execution.has_begun = True
                slot.begin()
            case Emit(number, events):
                await slot.emit(number, events)
            case TakeFolded(number):
                await slot.take_folded(number)
            case End(number, error, _):
                report = Report(usage=Usage(requests=1), model="sim")
                await slot.finish(number, report, error)
            case HandBack():
                await slot.hand_back()

    async def _offer(self, slot: Slot, resume: Resumption | None) -> None:
        workers, coordinator = self._node.workers, self._node.coordinator
        if resume is None:
            workers.offer(slot)
        elif await coordinator.adopt(resume.key, resume.attempt, resume.fence):
            await workers.resume_adopted(slot, resume)
        else:
            slot.fence("the attempt is not the active one any more")
