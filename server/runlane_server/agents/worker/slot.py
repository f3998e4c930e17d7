"""One stream of a worker: it offers, executes a turn, and offers again."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from runlane_server.agents.base import AgentError, Report, Result
from runlane_server.agents.questions import Asked
from runlane_server.agents.worker.execution import Execution
from runlane_server.agents.worker.messages import Acked, Down, Downstream, Fenced, Parked
from runlane_server.agents.worker.turn import Emitted
from runlane_server.core.errors import InvalidArgument, RunlaneError
from runlane_server.core.model import RunKey, SessionKey

_TOO_EARLY = "came before the answer to the last one; read the answer, then ask again"


@dataclass(frozen=True, slots=True)
class Resumption:
    """The attempt that a worker wants to continue."""

    key: RunKey
    attempt: int
    fence: str
    folded: Collection[str] = ()


class Slot:
    """The state of one stream of a worker of `caller`. It executes runs of `tenant`; None: of all,
    as the processes of this server do."""

    def __init__(self, tenant: str | None, down: Downstream, caller: str = "") -> None:
        self.tenant = tenant
        self.caller = caller
        self.agents: tuple[str, ...] = ()
        self.worker_id = ""
        self.execution: Execution | None = None
        self.is_offering = False
        self.reserved_for: SessionKey | None = None
        """The lane that its offer is reserved for."""
        self.is_paused = False
        """Whether its offer waits until its worker may have turns again."""
        self.stuck_since: float | None = None
        """When a turn was taken away whose code the worker has not reported to have returned."""
        self._down = down
        # What the worker sent before it learns that its turn is over is no mistake.
        self._discards = False

    def serves(self, tenant: str) -> bool:
        """Whether it executes runs of a tenant."""
        return self.tenant is None or tenant == self.tenant

    def begin_offer(self, agents: Sequence[str], worker_id: str) -> None:
        """Takes an offer. Raises InvalidArgument during a turn or another offer."""
        if self.execution is not None or self.is_offering or self.is_paused:
            raise InvalidArgument.of("offer", "came before the end of the turn or the offer before")
        self.agents, self.worker_id = tuple(agents), worker_id
        self._discards = False
        self.stuck_since = None

    def put(self, message: Down) -> None:
        """Sends a message."""
        self._down.put(message)

    def close(self, error: RunlaneError | None) -> None:
        """Ends the stream."""
        self.execution = None
        self._discards = True
        self._down.close(error)

    def end_turn(self, last: Acked | Fenced | Parked) -> None:
        """Ends the turn; the worker offers again after this message."""
        self.execution = None
        self._discards = True
        self._down.put(last)

    def fence(self, why: str) -> None:
        """Takes the turn away."""
        self.stuck_since = time.monotonic()
        self.end_turn(Fenced(why))

    def begin(self) -> None:
        """The worker has the turn."""
        self._current("begun")

    async def emit(self, number: int, events: Sequence[Emitted]) -> None:
        """Takes events of the turn."""
        if (execution := self._current("emit")) is not None:
            await execution.emit(number, events)

    async def take_folded(self, number: int) -> None:
        """Sends the prompts that join the turn. Raises InvalidArgument before the answer to the
        last request."""
        if number < 1:
            raise InvalidArgument.of("take_folded.number", f"is {number}; the minimum is 1")
        if (execution := self._current("take_folded")) is not None:
            if self._down.has_folded():
                raise InvalidArgument.of("take_folded", _TOO_EARLY)
            await execution.take_folded(number)

    async def send_history(self) -> None:
        """Sends the transcript before the turn. Raises InvalidArgument before the answer to the
        last request."""
        if (execution := self._current("get_history")) is not None:
            if self._down.has_history():
                raise InvalidArgument.of("get_history", _TOO_EARLY)
            await execution.send_history()

    async def ask(self, questions: Sequence[Asked], checkpoint: str = "") -> None:
        """Asks people. Raises InvalidArgument for a checkpoint that no other worker could use."""
        if (execution := self._current("ask")) is not None:
            if checkpoint and not execution.takes_checkpoints:
                raise InvalidArgument.of("ask.checkpoint", "is only for processes of the server")
            await execution.ask(questions, checkpoint)

    async def find_step(self, key: str) -> None:
        """Sends the stored result of a step."""
        if (execution := self._current("find_step")) is not None:
            await execution.find_step(key)

    def refuse(self, field: str, error: AgentError) -> None:
        """Fails the run because of a message of its agent."""
        if (execution := self._current(field)) is not None:
            execution.refuse(error)

    async def finish(
        self,
        number: int,
        report: Report,
        error: AgentError | None = None,
        result: Result | None = None,
    ) -> None:
        """Takes the end of the turn."""
        if (execution := self._current("finish" if error is None else "fail")) is not None:
            await execution.finish(number, report, error, result)

    async def hand_back(self) -> None:
        """Gives the turn back."""
        if (execution := self._current("hand_back")) is not None:
            await execution.hand_back(self.worker_id)

    def _current(self, field: str) -> Execution | None:
        """The turn that a message is about; None if it was taken away. Raises InvalidArgument."""
        if self.execution is None and not self._discards:
            raise InvalidArgument.of(field, "came without a turn")
        if self.execution is not None:
            self.execution.begin()
        return self.execution
