"""Matches the turns of this node with the offers of workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from hmac import compare_digest
from typing import NamedTuple

import structlog

from runlane_server.agents.base import AgentError
from runlane_server.agents.worker.execution import (
    GIVEN_BACK,
    HANDED_BACK,
    REFUSED,
    WORKER_LOST,
    Execution,
)
from runlane_server.agents.worker.offers import Offers
from runlane_server.agents.worker.quarantine import Fault, Party, Quarantine
from runlane_server.agents.worker.returns import Returns
from runlane_server.agents.worker.slot import Resumption, Slot
from runlane_server.agents.worker.turn import AttemptLost, HandedBack
from runlane_server.core.errors import (
    AgentNotFound,
    Draining,
    PermissionDenied,
    StoreUnavailable,
)
from runlane_server.core.model import RunKey, SessionKey

log = structlog.get_logger()

NO_OFFER = "no worker took it"

MAX_REFUSALS = 5
"""Mistakes of a worker in one attempt; with the last one the attempt is lost."""

_NO_SLOT: tuple[str, Slot | None] = ("", None)

ADOPTION_TIMEOUT = 5.0
"""Seconds from the commit of an adoption to the start of the attempt on this node."""


@dataclass(slots=True)
class _Served:
    """An agent that workers execute.

    `add_slots` changes the number of its slots: those that are offered, and those that execute one
    of its runs. A slot ends with its run, and the worker offers it again. `grant` gives the free
    slots to lanes that wait.
    """

    add_slots: Callable[[int], None]
    grant: Callable[[], None]
    offers: Offers
    hungry: dict[Execution, asyncio.Future[Slot]]


class Held(NamedTuple):
    """The runs that a worker executes, and those that were taken away while their code goes on; the
    oldest of these for `stuck_for` seconds."""

    active: int
    stuck: int
    stuck_for: float


class Workers:
    """The workers that are connected to this node, and the attempts that they execute.

    `lease`: seconds that a worker without a connection keeps its run. `why_lost`: the message of a
    run that it does not keep.
    """

    def __init__(self, lease: float = 30.0, *, why_lost: str = WORKER_LOST) -> None:
        self.lease = lease
        self.why_lost = why_lost
        self._agents: dict[str, _Served] = {}
        self._executions: dict[RunKey, Execution] = {}
        self._reserved: dict[SessionKey, tuple[str, Slot]] = {}
        self._slots: set[Slot] = set()
        self._begun = asyncio.Event()
        self._returns = Returns()
        self.quarantine = Quarantine()
        self._paused: set[str] = set()
        self._is_draining = False

    def serve(
        self,
        agent: str,
        add_slots: Callable[[int], None],
        grant: Callable[[], None],
    ) -> None:
        """Declares an agent that workers execute."""
        self._agents[agent] = _Served(add_slots, grant, Offers(), {})

    def count(self, agent: str) -> int:
        """The number of free slots that workers offer for an agent."""
        return len(self._agents[agent].offers)

    def offers_to(self, agent: str, tenant: str) -> bool:
        """Whether a worker offers a free slot of an agent to a tenant."""
        return self._agents[agent].offers.find(tenant) is not None

    # --- Streams ------------------------------------------------------------------------------

    def connect(self, slot: Slot) -> None:
        """Adds a stream. Raises Draining."""
        if self._is_draining:
            raise Draining("the server is shutting down", retry_after=1.0)
        self._slots.add(slot)

    def disconnect(self, slot: Slot, *, revoked: bool = False) -> None:
        """Removes a stream that has ended. A worker that lost its access loses its run at once."""
        self._slots.discard(slot)
        self.withdraw(slot)
        execution, slot.execution = slot.execution, None
        if execution is None:
            return
        execution.detach(slot)
        if revoked:
            execution.lose("the worker that executed it lost its access")

    def check(self, agents: Sequence[str], allowed: Collection[str] | None = None) -> None:
        """Raises AgentNotFound for an agent that workers do not execute here, and PermissionDenied
        for one that is not `allowed`."""
        for agent in agents:
            if allowed is not None and agent not in allowed:
                raise PermissionDenied(f"offer.agents: the caller may not execute {agent!r}")
            if agent not in self._agents:
                known = ", ".join(map(repr, self._agents))
                raise AgentNotFound(
                    f"offer.agents: {agent!r} is no agent that workers execute here; use one of"
                    f" {known}"
                )

    def offer(self, slot: Slot) -> None:
        """Takes an offer, and gives it a turn as soon as there is one."""
        slot.is_paused = slot.worker_id in self._paused or self._is_barred(slot)
        if slot.is_paused:
            return
        self._place(slot)
        self._agents[slot.agents[0]].grant()

    def _place(self, slot: Slot) -> None:
        """Gives a free slot a turn that waits for one, or adds it to the offers."""
        for agent in slot.agents:
            hungry = self._agents[agent].hungry
            for execution, chosen in hungry.items():
                if not chosen.done() and slot.serves(execution.turn.key.tenant):
                    chosen.set_result(slot)
                    slot.is_offering = False
                    execution.assign(slot)
                    self._agents[agent].add_slots(1)
                    return
        slot.is_offering = True
        for agent in slot.agents:
            self._agents[agent].offers.add(slot)
            self._agents[agent].add_slots(1)

    # --- Reservations ------------------------------------------------------------------------

    def reserve(self, agent: str, lane: SessionKey) -> None:
        """Reserves a slot for a lane that is about to start a run of an agent: no other agent can
        use it."""
        slot = self._agents[agent].offers.find(lane.tenant)
        if slot is not None and lane not in self._reserved:
            self._take_offer(slot, agent)
            self._reserved[lane] = (agent, slot)
            slot.reserved_for = lane

    def give_back(self, lane: SessionKey) -> None:
        """Offers a slot again that was reserved for a lane and was not used."""
        agent, slot = self._reserved.pop(lane, _NO_SLOT)
        if slot is not None:
            slot.reserved_for = None
            self._agents[agent].add_slots(-1)
            self._place(slot)

    def _take_offer(self, slot: Slot, agent: str) -> None:
        """Makes an offer one for an agent only."""
        for each in slot.agents:
            self._agents[each].offers.remove(slot)
            if each != agent:
                self._agents[each].add_slots(-1)

    def withdraw(self, slot: Slot) -> None:
        """Takes an offer back, if there is one."""
        slot.is_paused = False
        if not slot.is_offering:
            return
        slot.is_offering = False
        lane, slot.reserved_for = slot.reserved_for, None
        if lane is not None:
            agent, _ = self._reserved.pop(lane)
            self._agents[agent].add_slots(-1)
        else:
            for agent in slot.agents:
                self._agents[agent].offers.remove(slot)
                self._agents[agent].add_slots(-1)

    def pause(self, worker_id: str) -> None:
        """Gives a worker no further runs, because it does not respond."""
        self._paused.add(worker_id)
        for slot in self._of_worker(worker_id):
            if slot.is_offering:
                self.withdraw(slot)
                slot.is_paused = True

    def unpause(self, worker_id: str) -> None:
        """Gives it runs again."""
        self._paused.discard(worker_id)
        for slot in self._of_worker(worker_id):
            if slot.is_paused:
                self.offer(slot)

    # --- Faults of workers -------------------------------------------------------------------

    def refuse(self, slot: Slot) -> None:
        """A message of a worker was a mistake. It may continue its turn, but not for ever."""
        execution = slot.execution
        if execution is None:
            return
        execution.refusals += 1
        if execution.refusals >= MAX_REFUSALS:
            execution.lose(REFUSED)
        else:
            self._blame(slot, Fault.REFUSED)

    def _is_barred(self, slot: Slot) -> bool:
        return slot.tenant is not None and self.quarantine.is_barred(
            slot.tenant, slot.caller, slot.worker_id
        )

    def _praise(self, slot: Slot | None) -> None:
        if slot is not None and slot.tenant is not None:
            self.quarantine.clear(slot.tenant, slot.caller, slot.worker_id)

    def _blame(self, slot: Slot | None, fault: Fault) -> None:
        """Counts a fault of a worker. Processes of this server are watched otherwise."""
        if slot is None or slot.tenant is None:
            return
        for party, seconds in self.quarantine.add(slot.tenant, slot.caller, slot.worker_id):
            log.warning(
                "worker gets no turns",
                worker_id="all of the caller" if party.worker_id is None else party.worker_id,
                caller=party.caller,
                tenant=party.tenant,
                seconds=seconds,
                last_fault=fault.value,
            )
            asyncio.get_running_loop().call_later(seconds, self._release, party)
            for each in list(self._slots):
                if each.is_offering and self._is_barred(each):
                    self.withdraw(each)
                    each.is_paused = True

    def _release(self, party: Party) -> None:
        self.quarantine.release(party)
        for slot in list(self._slots):
            if slot.is_paused and not self._is_draining:
                self.offer(slot)

    def held_by(self, worker_id: str) -> Held:
        """The uses of the slots of a worker."""
        slots = self._of_worker(worker_id)
        now = time.monotonic()
        stuck = [now - slot.stuck_since for slot in slots if slot.stuck_since is not None]
        active = sum(slot.execution is not None for slot in slots)
        return Held(active, len(stuck), max(stuck, default=0.0))

    def _of_worker(self, worker_id: str) -> list[Slot]:
        return [slot for slot in self._slots if slot.worker_id == worker_id]

    def close(self) -> None:
        """Ends all streams and takes no other. Workers reconnect elsewhere and resume."""
        self._is_draining = True
        for slot in list(self._slots):
            if slot.execution is None:
                self.withdraw(slot)
                slot.close(Draining("the server is shutting down", retry_after=0.1))

    # --- Attempts -----------------------------------------------------------------------------

    def begin(self, execution: Execution) -> None:
        """An attempt begins on this node. One that another process began has its slot already."""
        turn = execution.turn
        execution.on_released = partial(self._agents[execution.agent].add_slots, -1)
        if turn.is_resumed:
            execution.has_slot = True
            self._agents[execution.agent].add_slots(1)
        self._executions[RunKey(turn.key.tenant, turn.run_id)] = execution
        self._begun.set()
        self._begun = asyncio.Event()

    def judge(self, execution: Execution, error: AgentError | None) -> AgentError | None:
        """The outcome of an attempt: one that workers gave back again and again is lost."""
        key = RunKey(execution.turn.key.tenant, execution.turn.run_id)
        if isinstance(error, HandedBack) and not execution.received:
            if self._returns.add(key, execution.handed_back_by):
                error = AttemptLost(GIVEN_BACK)
        else:
            self._returns.forget(key)
        if error is None:
            self._praise(execution.worker)
        elif _is_at_fault(error):
            returned = isinstance(error, HandedBack)
            self._blame(execution.worker, Fault.RETURNED if returned else Fault.LOST)
        return error

    def end(self, execution: Execution) -> None:
        """An attempt has ended, or leaves this node."""
        turn = execution.turn
        key = RunKey(turn.key.tenant, turn.run_id)
        if self._executions.get(key) is execution:
            del self._executions[key]
        execution.end()

    async def assign(self, execution: Execution) -> None:
        """Gives a new attempt to a worker. Raises HandedBack if none takes it within the lease."""
        served, lane = self._agents[execution.agent], execution.turn.key
        if self._reserved.get(lane, _NO_SLOT)[0] != execution.agent:
            # Its start was found in the store.
            self.give_back(lane)
            self.reserve(execution.agent, lane)
            served.grant()
        _, slot = self._reserved.pop(lane, _NO_SLOT)
        if slot is not None:
            slot.is_offering, slot.reserved_for = False, None
            execution.assign(slot)
            return
        # The worker has left since the run became active.
        chosen: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        served.hungry[execution] = chosen
        try:
            async with asyncio.timeout(self.lease):
                await chosen
        except TimeoutError:
            raise HandedBack(NO_OFFER) from None
        finally:
            del served.hungry[execution]

    def resume(self, slot: Slot, wanted: Resumption) -> bool:
        """Connects a worker with the attempt that it executes; False if it is not on this node.

        The lane must say that this node has it (`Coordinator.adopt`): another node may have
        continued it since.
        """
        if not slot.serves(wanted.key.tenant):
            return False
        execution = self._executions.get(wanted.key)
        if execution is None or execution.turn.attempt != wanted.attempt:
            return False
        if execution.turn.end.is_leaving:
            return False  # it has continued on another node since
        if not compare_digest(execution.turn.fence, wanted.fence):
            return False
        execution.resume(slot, wanted.folded)
        return True

    async def resume_adopted(self, slot: Slot, wanted: Resumption) -> None:
        """The same, for an attempt that may be about to begin on this node. Raises StoreUnavailable
        if it does not: the worker connects again."""
        try:
            async with asyncio.timeout(ADOPTION_TIMEOUT):
                while not self.resume(slot, wanted):
                    await self._begun.wait()
        except TimeoutError:
            raise StoreUnavailable(
                "the attempt could not be continued on this node; reconnect and resume"
            ) from None


def _is_at_fault(error: AgentError) -> bool:
    """Whether the worker is to blame for the end of its attempt.

    Any other error is the agent's answer to a prompt. A caller who may only send prompts must
    not be able to stop the workers. A worker that hands a run back because it stops is not at
    fault either.
    """
    return isinstance(error, AttemptLost) and error.message != HANDED_BACK
