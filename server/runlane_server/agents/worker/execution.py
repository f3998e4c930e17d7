"""One attempt of a run that a worker executes, over all the connections that this takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from runlane_server.agents.base import AgentError, FoldedPrompt, Report, Result
from runlane_server.agents.questions import Asked
from runlane_server.agents.worker.messages import (
    Acked,
    Answered,
    Assigned,
    FoundStep,
    Joined,
    Parked,
    Stopped,
    Transcript,
)
from runlane_server.agents.worker.returns import MAX_RETURNS
from runlane_server.agents.worker.turn import (
    AttemptLost,
    DurableTurn,
    Emitted,
    HandedBack,
    KeptStep,
)
from runlane_server.core.errors import Draining, InvalidArgument, RunlaneError

if TYPE_CHECKING:
    from runlane_server.agents.worker.slot import Slot

log = structlog.get_logger()

WORKER_LOST = "the worker that executed it was lost"
HANDED_BACK = "the worker that executed it was shut down"
NEVER_BEGUN = "the worker that was to execute it was lost"
NOT_BEGUN = "the worker that was to execute it did not begin"
REFUSED = "the server refused what the worker sent again and again"
GIVEN_BACK = f"workers gave it back {MAX_RETURNS} times in a row"
"""Messages of runs that end INTERRUPTED."""


class Ended(NamedTuple):
    """The end of a turn: its report, and why it failed or was lost."""

    report: Report | None = None
    result: Result | None = None
    error: AgentError | None = None


def _ignore() -> None:
    """Does nothing."""


class Execution:
    """The messages of the worker for the attempt, and the stream that connects it, if any.

    Without a connection for `lease` seconds the attempt is lost (R35). A turn that the worker does
    not begin within that time starts elsewhere, and no attempt is lost.
    """

    def __init__(
        self, turn: DurableTurn, agent: str, lease: float, *, why_lost: str = WORKER_LOST
    ) -> None:
        self.turn = turn
        self.agent = agent
        self.received = turn.stored
        self.is_finished = False
        """Whether the worker has sent the end of the turn."""
        self._stored = turn.stored
        self._lease = lease
        self._why_lost = why_lost
        self._slot: Slot | None = None
        self._folded: list[FoldedPrompt] = list(turn.folded)
        self._lease_timer: asyncio.TimerHandle | None = None
        # One after another, also if a worker has reconnected while its last message is at work.
        self._lock = asyncio.Lock()
        self._working: set[asyncio.Task[Any]] = set()
        self._outcome: asyncio.Future[AgentError | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._report: Report | None = None
        self._result: Result | None = None
        self._is_stopped = False
        self.has_slot = False
        """Whether a slot of a worker was used for the attempt."""
        self.worker: Slot | None = None
        """The last stream that it was connected by."""
        self.takes_checkpoints = False
        """Whether all its workers can continue a turn from a checkpoint."""
        self.refusals = 0
        """How often a message of the worker was a mistake."""
        self.handed_back_by: str | None = None
        """The worker that gave the run back."""
        self.on_released: Callable[[], None] = _ignore
        """Called when the slot is not used any more."""
        # Whether the worker is known to have the turn.
        self._has_begun = turn.is_resumed
        self._why_ended = "the run has ended"
        turn.follow_stored(self._on_stored)

    # --- For the agent ------------------------------------------------------------------------

    async def wait(self) -> Ended:
        """Waits for the end of the turn."""
        # A cancel of the caller must not cancel the outcome.
        await asyncio.wait({self._outcome})
        return Ended(self._report, self._result, self._outcome.result())

    async def stop(self) -> None:
        """Sends the worker a cancel, and waits until it has stopped or the run has ended without it
        (R9, R37)."""
        end = self.turn.end
        if end.is_leaving or not self.has_slot:
            return
        self._is_stopped = True
        self._send(Stopped())
        ends: set[asyncio.Future[Any]] = {self._outcome, end.committed}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)

    def end(self) -> None:
        """Ends the connection of the worker with this attempt."""
        self._settle(None)
        self._cancel_timer()
        if self._slot is None:
            return
        if self.turn.end.is_leaving:
            self._slot.close(Draining("this node gives up the run; reconnect and resume"))
        else:
            self.turn.end.committed.add_done_callback(self._on_committed)

    def _on_committed(self, _: object) -> None:
        slot, self._slot = self._slot, None
        if slot is None:
            return
        if self.turn.end.is_leaving:
            slot.close(Draining("this node gives up the run; reconnect and resume"))
        elif self.is_finished:
            slot.end_turn(Acked(self.received, ended=True))
        elif self.turn.end.is_parked:
            slot.end_turn(Parked())
        else:
            slot.fence(self._why_ended)

    # --- The connection -----------------------------------------------------------------------

    def assign(self, slot: Slot) -> None:
        """Gives the turn to a worker, which has the time of a worker lease to begin it: one that
        offers and never reads must not hold the run."""
        self.has_slot = True
        self._attach(slot)
        slot.put(Assigned(self.turn, self.agent))
        if not self._has_begun:
            self._start_timer(HandedBack(NOT_BEGUN))

    def resume(self, slot: Slot, received: Collection[str]) -> None:
        """Connects the worker again, which has the prompts of the folded runs in `received`."""
        if self._is_lost:
            # Its loss is being committed, and the run starts elsewhere in that commit.
            slot.fence("the attempt was lost before the worker returned")
            return
        self.begin()
        self._attach(slot)
        slot.put(Acked(self._stored))
        missing = [one for one in self._folded if one.run_id not in received]
        if missing:
            slot.put(Joined(0, missing))
        if self._is_stopped:
            slot.put(Stopped())

    @property
    def _is_lost(self) -> bool:
        """Whether the attempt ends without the worker, which has not ended it."""
        is_settled = self._outcome.done() and not self.is_finished
        return is_settled and isinstance(self._outcome.result(), AttemptLost)

    def _attach(self, slot: Slot) -> None:
        before, self._slot = self._slot, slot
        self.worker = slot
        slot.execution = self
        self._cancel_timer()
        if before is not None and before is not slot:
            before.fence("the worker continues on another connection")

    def detach(self, slot: Slot) -> None:
        """The connection is lost; the worker may come back within its lease.

        A turn that was lost on its way to the worker starts elsewhere at once.
        """
        if self._slot is slot:
            self._slot = None
            if self._has_begun:
                self.wait_for_worker()
            else:
                self._settle(HandedBack(NEVER_BEGUN))

    def wait_for_worker(self) -> None:
        """Starts the worker lease."""
        if not self._outcome.done():
            self._start_timer(AttemptLost(self._why_lost))

    def _start_timer(self, error: AttemptLost) -> None:
        self._cancel_timer()
        loop = asyncio.get_running_loop()
        self._lease_timer = loop.call_later(self._lease, self._settle, error)

    def lose(self, why: str) -> None:
        """Gives the worker up."""
        self._settle(AttemptLost(why))

    def _cancel_timer(self) -> None:
        if self._lease_timer is not None:
            self._lease_timer.cancel()
            self._lease_timer = None

    def _send(self, message: Any) -> None:
        if self._slot is not None:
            self._slot.put(message)

    def _on_stored(self, number: int) -> None:
        self._stored = number
        self._send(Acked(number))

    def _fail(self, error: AgentError) -> None:
        self._why_ended = f"the run failed: {error.message}"
        self._settle(error)

    def _settle(self, error: AgentError | None) -> None:
        if not self._outcome.done():
            self._outcome.set_result(error)
            if self.has_slot:
                # Before the end is committed: the next run of the session needs another offer.
                self.on_released()

    # --- What the worker sends ----------------------------------------------------------------

    def begin(self) -> None:
        """The worker has the turn."""
        if not self._has_begun:
            self._has_begun = True
            self._cancel_timer()

    def refuse(self, error: AgentError) -> None:
        """Fails the run because of what its agent sent."""
        self._fail(error)

    async def emit(self, number: int, events: Sequence[Emitted]) -> None:
        """Takes events, the first with a number. Raises InvalidArgument at a gap."""
        await self._in_order(lambda: self._emit(number, events))

    async def _emit(self, number: int, events: Sequence[Emitted]) -> None:
        if number + len(events) - 1 > self.received:
            # A worker that reconnects repeats what was not acknowledged, also before its end.
            self._check_open("emit")
        if self._outcome.done():
            # The worker has not learned yet that its turn is over; its numbers go on.
            return
        if number > self.received + 1:
            raise InvalidArgument.of(
                "emit.number", f"is {number}; the next number is {self.received + 1}"
            )
        for event in events[self.received + 1 - number :]:
            try:
                if isinstance(event, KeptStep):
                    await self.turn.keep(event)
                else:
                    await self.turn.emit(event)
            except Exception as error:  # noqa: BLE001 - the supervisor has recorded it
                self._fail(error if isinstance(error, AgentError) else AgentError(str(error)))
                return
            self.received += 1

    async def take_folded(self, number: int) -> None:
        """Sends the prompts that join the turn now."""
        asker = self._slot
        await self._in_order(lambda: self._take_folded(number, asker))

    async def _take_folded(self, number: int, asker: Slot | None) -> None:
        self._check_open("take_folded")
        if self._outcome.done():
            return
        prompts = await self.turn.take_folded()
        self._folded += prompts
        if self._slot is asker:
            self._send(Joined(number, prompts))
        elif prompts:
            # The worker has reconnected, and asks again.
            self._send(Joined(0, prompts))

    async def send_history(self) -> None:
        """Sends the transcript before the turn."""
        asker = self._slot
        await self._in_order(lambda: self._send_history(asker))

    async def _send_history(self, asker: Slot | None) -> None:
        if self._outcome.done():
            return
        messages = await self.turn.history()
        if self._slot is asker:
            self._send(Transcript(messages))

    async def ask(self, questions: Sequence[Asked], checkpoint: str = "") -> None:
        """Asks people: sends the answers if there are all, else the run waits for them, and the
        turn is over for the worker (R40, R44)."""
        asker = self._slot
        await self._in_order(lambda: self._ask(asker, questions, checkpoint))

    async def _ask(self, asker: Slot | None, questions: Sequence[Asked], checkpoint: str) -> None:
        self._check_open("ask")
        if self._outcome.done():
            return
        if await self.turn.park(questions, checkpoint):
            self._settle(None)
            return
        answers = [await self.turn.answered(one.key) for one in questions]
        if self._slot is asker:
            self._send(Answered(answers))

    async def find_step(self, key: str) -> None:
        """Sends the stored result of a step (R39)."""
        asker = self._slot
        await self._in_order(lambda: self._find_step(asker, key))

    async def _find_step(self, asker: Slot | None, key: str) -> None:
        self._check_open("find_step")
        if self._outcome.done():
            return
        found = await self.turn.find_durable_step(key)
        if self._slot is asker:
            self._send(FoundStep(key, found))

    async def finish(
        self, number: int, report: Report, error: AgentError | None, result: Result | None
    ) -> None:
        """Takes the end of the turn, whose last event has a number. Raises InvalidArgument."""
        await self._in_order(lambda: self._finish(number, report, error, result))

    async def _finish(
        self, number: int, report: Report, error: AgentError | None, result: Result | None
    ) -> None:
        if self.is_finished or self._outcome.done():
            return  # repeated after a lost connection, or too late
        if number != self.received:
            raise InvalidArgument.of(
                "finish.number", f"is {number}; the last number is {self.received}"
            )
        self.is_finished = True
        self._report, self._result = report, result
        self._settle(error)

    async def hand_back(self, worker_id: str) -> None:
        """The worker gives the run back (R37)."""
        await self._in_order(lambda: self._hand_back(worker_id))

    async def _hand_back(self, worker_id: str) -> None:
        self.is_finished = True
        self.handed_back_by = worker_id
        # With output the attempt counts, also if the output makes no message (R37).
        kind = AttemptLost if self.received else HandedBack
        self._settle(kind(HANDED_BACK))

    def _check_open(self, field: str) -> None:
        if self.is_finished:
            raise InvalidArgument.of(field, "came after the end of the turn")

    async def _in_order(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does the work of a message to its end, even if the connection is lost meanwhile: half of
        it must not be repeated."""

        async def locked() -> RunlaneError | None:
            async with self._lock:
                try:
                    await work()
                except RunlaneError as error:
                    return error
                except AgentError as error:
                    self._fail(error)
                return None

        task = asyncio.create_task(locked())
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        error = await asyncio.shield(task)
        if error is not None:
            raise error
