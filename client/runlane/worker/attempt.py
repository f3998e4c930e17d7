"""One attempt of a run in this process, over all the connections that this takes.

It knows what it has emitted and what the server has not acknowledged, and so which message to send
next on a connection, old or new.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing

from runlane import convert
from runlane.types import Message
from runlane.worker.events import (
    EVENT_BYTES,
    AgentError,
    AgentEvent,
    FoldedPrompt,
    Totals,
    check_step_key,
    encode,
    explained,
    is_report,
    is_result,
    merged,
    prompt_from,
    step_event,
    to_json,
)
from runlane.worker.functions import run_function
from runlane.worker.questions import value_of
from runlane.worker.requests import Requests
from runlane.worker.threads import AgentFunction
from runlane.worker.turn import Turn
from runlane.worker.v1 import worker_service_pb2 as pb

EMIT_EVENTS = 1000
"""Maximum number of events in one message."""

EMIT_BYTES = 1 << 20
"""Size of the events in one message, unless a single one is larger."""

BUFFER_BYTES = 1 << 20
"""The agent waits while more of its output than this is not durable."""

MESSAGE_CHARS = 2048
"""The message of an error is cut here."""


class Attempt:
    """An attempt that a server gave to this worker. `wake` is called when there is more to send."""

    def __init__(
        self, given: pb.WorkResponse.Turn, function: AgentFunction, wake: Callable[[], None]
    ) -> None:
        self.given = given
        self.acknowledged = given.stored
        self.is_over = False
        """Whether the server has confirmed the end, or has taken the attempt away."""
        self._wake = wake
        self._window = max(1, given.window)
        self._waiting: deque[pb.Event] = deque()
        self._bytes = 0
        self._sent = self._ever_sent = given.stored
        self._is_connected = False
        self._is_announced = False
        self._room = asyncio.Event()
        self._totals = Totals()
        self._end: pb.WorkRequest | None = None
        self._is_end_sent = False
        self._is_stopped = False
        self._folded: list[FoldedPrompt] = []
        self._folded_ids: list[str] = []
        self._fold_number = 0
        self._folding = asyncio.Lock()
        self._history: list[Message] = []
        self._has_history = False
        self._requests = Requests(wake)
        self._is_urgent = 0
        self._result = ""
        turn = Turn(given, self)
        self._task = asyncio.create_task(self._execute(function, turn))

    # --- The agent ----------------------------------------------------------------------------

    async def _execute(self, function: AgentFunction, turn: Turn) -> None:
        failure: BaseException | None = None
        try:
            async with aclosing(run_function(function, turn)) as events:
                async for event in events:
                    await self.emit(event)
        except asyncio.CancelledError:
            if not self._is_stopped:
                failure = AgentError("the agent cancelled its own task")
        except BaseException as raised:  # noqa: BLE001 - it fails the run, not the worker
            failure = raised
        if self._end is None:
            self._end = self._outcome(failure)
        self._wake()

    def _outcome(self, failure: BaseException | None) -> pb.WorkRequest:
        number = self.acknowledged + len(self._waiting)
        try:
            if failure is None:
                return pb.WorkRequest(finish=self._finish(number))
            return pb.WorkRequest(fail=self._fail(number, explained(failure)))
        except Exception as error:  # noqa: BLE001 - without an end the run would stay for ever
            message = f"the agent reported what cannot be sent ({type(error).__name__})"
            return pb.WorkRequest(fail=pb.WorkRequest.Fail(number=number, message=message))

    def _finish(self, number: int) -> pb.WorkRequest.Finish:
        totals = self._totals
        return pb.WorkRequest.Finish(
            number=number,
            usage=totals.usage,
            model=totals.model,
            finish_reason=totals.finish_reason,
            result_json=self._result,
        )

    def _fail(self, number: int, error: AgentError) -> pb.WorkRequest.Fail:
        return pb.WorkRequest.Fail(
            number=number,
            reason=error.reason,
            message=error.message[:MESSAGE_CHARS],
            usage=self._totals.usage,
            model=self._totals.model,
        )

    def stop(self) -> None:
        """Stops the agent: the run was cancelled, or the attempt was taken away."""
        self._is_stopped = True
        self._room.set()
        self._requests.close()
        self._task.cancel()

    async def returned(self) -> None:
        """Waits until the agent's code has returned."""
        await asyncio.wait({self._task})

    async def hand_back(self) -> None:
        """Stops the agent, and gives the attempt back to the server."""
        if self._end is None:
            self._end = pb.WorkRequest(hand_back=pb.WorkRequest.HandBack())
            self.stop()
            while self._unsent > 0:
                self._bytes -= self._waiting.pop().ByteSize()
        await self.returned()
        self._wake()

    # --- The turn -----------------------------------------------------------------------------

    async def emit(self, event: AgentEvent | str) -> None:
        """Adds an event. Raises AgentError."""
        if is_report(event):
            self._totals.add(event)
        elif is_result(event):
            self._result = to_json("Result.json", getattr(event, "json", None))
        else:
            for one in encode(event):
                await self._add(one)

    async def _add(self, event: pb.Event) -> None:
        if event.ByteSize() > EVENT_BYTES:
            raise AgentError(
                f"an event has {event.ByteSize()} bytes; {EVENT_BYTES} is the limit",
                reason="BAD_EVENT",
            )
        while self._is_full and not self._is_stopped:
            self._room.clear()
            await self._room.wait()
        if not self._is_stopped:
            self._put(event)

    @property
    def _is_full(self) -> bool:
        return len(self._waiting) >= self._window or self._bytes > BUFFER_BYTES

    def _put(self, event: pb.Event) -> None:
        """Adds an event, or merges it with the last one.

        An event that was ever sent must stay as it is, because the server may have it.
        """
        is_new = self.acknowledged + len(self._waiting) > self._ever_sent
        joined = merged(self._waiting[-1], event) if self._waiting and is_new else None
        if joined is not None:
            self._bytes -= self._waiting.pop().ByteSize()
            event = joined
        self._waiting.append(event)
        self._bytes += event.ByteSize()
        self._wake()

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts that wait to join the turn; those of a call are of no other."""
        if self._is_stopped:
            return ()
        async with self._folding:
            self._fold_number += 1
            message = pb.WorkRequest.TakeFolded(number=self._fold_number)
            await self._requests.ask("folded", pb.WorkRequest(take_folded=message))
            taken, self._folded = self._folded, []
            return taken

    async def history(self) -> Sequence[Message]:
        """Reads the transcript before the turn."""
        if not self._has_history:
            message = pb.WorkRequest(get_history=pb.WorkRequest.GetHistory())
            await self._requests.ask("history", message)
        return tuple(self._history)

    async def find_step(self, key: str) -> str | None:
        """The stored result of a step as JSON. Raises AgentError."""
        find = pb.WorkRequest.FindStep(key=check_step_key(key))
        found: str | None = await self._requests.ask(
            f"step {find.key}", pb.WorkRequest(find_step=find)
        )
        return found

    async def keep_step(self, key: str, result: object) -> str:
        """Makes the result of a step durable; returns it as JSON. Raises AgentError."""
        event = step_event(check_step_key(key), result)
        await self._add(event)
        await self._until_durable(self.acknowledged + len(self._waiting))
        return event.step.result

    async def _until_durable(self, number: int) -> None:
        self._is_urgent += 1
        self._wake()
        try:
            while self.acknowledged < number and not self._is_stopped:
                self._room.clear()
                await self._room.wait()
        finally:
            self._is_urgent -= 1
        if self.acknowledged < number:
            raise asyncio.CancelledError

    async def ask(self, question: pb.Question) -> object:
        """Asks people. The attempt ends here unless there is an answer already."""
        ask = pb.WorkRequest.Ask(questions=[question])
        answer = await self._requests.ask(f"ask {question.key}", pb.WorkRequest(ask=ask))
        return value_of(question, answer)

    async def leave(self, questions: Sequence[pb.Question], checkpoint: str) -> None:
        """Asks people, and ends here unless all is answered; the attempt continues from the
        `checkpoint`, which only processes of the server can do."""
        ask = pb.WorkRequest.Ask(questions=questions, checkpoint=checkpoint)
        await self._requests.ask(f"ask {questions[0].key}", pb.WorkRequest(ask=ask))

    # --- The connection -----------------------------------------------------------------------

    def disconnect(self) -> None:
        """The connection is lost: what was not acknowledged is sent again on the next one."""
        self._is_connected = False

    @property
    def resume(self) -> pb.WorkRequest.Resume:
        """How to continue on a new connection."""
        return pb.WorkRequest.Resume(
            run_id=self.given.run_id,
            tenant=self.given.tenant,
            attempt=self.given.attempt,
            fence=self.given.fence,
            acknowledged=self.acknowledged,
            folded_run_ids=self._folded_ids,
        )

    def connect(self) -> None:
        """The connection on which the turn came."""
        self._is_connected = True

    def take(self, response: pb.WorkResponse) -> None:
        """Takes a message of the server."""
        match response.WhichOneof("message"):
            case "acked":
                self._on_acked(response.acked.number, ended=response.acked.ended)
            case "folded":
                self._on_folded(response.folded)
            case "history":
                self._on_history(response.history)
            case "answers":
                for one in response.answers.answers:
                    self._requests.answer(f"ask {one.key}", one.answer)
            case "step":
                step = response.step
                found = step.result if step.HasField("result") else None
                self._requests.answer(f"step {step.key}", found)
            case "cancel":
                self.stop()
            case "fenced" | "parked":
                self.on_fenced()

    def _on_acked(self, number: int, *, ended: bool) -> None:
        """Events are durable; on a new connection, continue after them."""
        for _ in range(number - self.acknowledged):
            if self._waiting:
                self._bytes -= self._waiting.popleft().ByteSize()
        self.acknowledged = max(number, self.acknowledged)
        if not self._is_connected:
            self._is_connected = self._is_announced = True
            self._sent = self.acknowledged
            self._is_end_sent = False
            self._requests.send_again()
            if not self._has_history:
                self._history.clear()
        self.is_over = self.is_over or ended
        self._room.set()
        self._wake()

    def _on_folded(self, folded: pb.WorkResponse.Folded) -> None:
        """Prompts joined the turn."""
        for sent in folded.prompts:
            if sent.run_id not in self._folded_ids:
                self._folded_ids.append(sent.run_id)
                prompt = prompt_from(sent.prompt, sent.attachments)
                self._folded.append(FoldedPrompt(sent.run_id, prompt))
        if folded.number > 0:
            self._requests.answer("folded")

    def _on_history(self, part: pb.WorkResponse.History) -> None:
        """A part of the transcript; a message may continue in the next part."""
        for sent in part.messages:
            message = convert.message(sent)
            if self._history and self._history[-1].message_id == message.message_id:
                last = self._history.pop()
                message = _joined(last, message)
            self._history.append(message)
        if part.last:
            self._has_history = True
            self._requests.answer("history")

    def on_fenced(self) -> None:
        """The attempt was taken away, or its run waits for people."""
        self.is_over = True
        self.stop()
        self._wake()

    def next_message(self) -> pb.WorkRequest | None:
        """The next message to send, if there is one."""
        if not self._is_connected:
            return None
        if not self._is_announced:
            self._is_announced = True
            return pb.WorkRequest(begun=pb.WorkRequest.Begun())
        # One emit at a time: what comes meanwhile is merged, so a token costs the server little.
        is_urgent = self._end is not None or self._is_urgent or self._requests.has_unsent
        if self._unsent and (is_urgent or self._sent == self.acknowledged):
            return self._next_emit()
        if (request := self._requests.next_message()) is not None:
            return request
        if self._end is not None and self._task.done() and not self._is_end_sent:
            self._is_end_sent = True
            return self._end
        return None

    @property
    def _unsent(self) -> int:
        return self.acknowledged + len(self._waiting) - self._sent

    def _next_emit(self) -> pb.WorkRequest:
        events: list[pb.Event] = []
        size = 0
        first = self._sent - self.acknowledged
        for n in range(first, len(self._waiting)):
            event = self._waiting[n]
            size += event.ByteSize()
            if events and (size > EMIT_BYTES or len(events) >= EMIT_EVENTS):
                break
            events.append(event)
        number = self._sent + 1
        self._sent += len(events)
        self._ever_sent = max(self._ever_sent, self._sent)
        return pb.WorkRequest(emit=pb.WorkRequest.Emit(number=number, events=events))


def _joined(first: Message, rest: Message) -> Message:
    return Message(
        first.message_id,
        first.run_id,
        first.turn,
        first.role,
        first.parts + rest.parts,
        rest.finish_reason,
        rest.model,
        first.created_at,
        rest.continues,
    )
