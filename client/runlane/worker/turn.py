"""The turn of a run, as an agent in a worker sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from runlane.convert import origin
from runlane.types import Message
from runlane.worker.events import AgentEvent, FoldedPrompt, Prompt, prompt_from
from runlane.worker.questions import Questions
from runlane.worker.steps import take_step
from runlane.worker.v1 import worker_service_pb2 as pb


class Calls(Protocol):
    """The calls that a turn makes to its attempt."""

    async def emit(self, event: AgentEvent | str) -> None:
        """Adds an event."""

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts that wait to join the turn."""
        ...

    async def history(self) -> Sequence[Message]:
        """Reads the transcript before the turn."""
        ...

    async def find_step(self, key: str) -> str | None:
        """The stored result of a step as JSON."""

    async def keep_step(self, key: str, result: object) -> str:
        """Makes the result of a step durable."""
        ...

    async def ask(self, question: pb.Question) -> object:
        """Asks people."""

    async def leave(self, questions: Sequence[pb.Question], checkpoint: str) -> None:
        """Asks people, and ends the attempt here, which continues from the checkpoint."""


class Turn:
    """The input of an agent: one turn of a session's transcript.

    Attributes:
        session_id: The session.
        run_id: The run that this turn executes.
        tenant: The tenant of the session.
        agent: The name of the agent.
        attempt: The number of this attempt at the run, from 1.
        prompt: The prompt to answer.
        metadata: The caller's labels.
        traceparent: The span of this attempt (W3C Trace Context); empty if the run is in no trace.
        deadline: When the run times out; None if it has no timeout.
        origin: The transcript that the session is a fork of; None if it is none. A worker with a
            memory of its own that does not know the session yet can begin from what it knows of
            the origin.
    """

    def __init__(self, given: pb.WorkResponse.Turn, calls: Calls) -> None:
        self.session_id = given.session_id
        self.run_id = given.run_id
        self.tenant = given.tenant
        self.agent = given.agent
        self.attempt = given.attempt
        self.prompt: Prompt = prompt_from(given.prompt, given.attachments)
        self.metadata: Mapping[str, str] = dict(given.metadata)
        self.traceparent = given.traceparent
        self.deadline: datetime | None = (
            given.deadline.ToDatetime(UTC) if given.HasField("deadline") else None
        )
        # For agents of the server in processes of their own.
        self.checkpoint = given.checkpoint
        self.calls = self._calls = calls
        self.origin = origin(given.origin) if given.HasField("origin") else None
        self._working: set[str] = set()
        self._questions = Questions()

    async def history(self) -> Sequence[Message]:
        """The transcript before this turn, the oldest message first.

        Of a transcript larger than the server's `--max-history` it has the latest turns.
        """
        return await self._calls.history()

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts that wait to join the turn. Call it between two steps.

        A prompt that was taken belongs to the turn: the agent must answer it too (R26).
        """
        return await self._calls.take_folded()

    async def step(self, key: str, work: Callable[[], Any]) -> Any:
        """Does a piece of work once per run, even if an attempt is repeated (R39).

        Calls `work`, a function or a coroutine function without arguments, makes its result durable
        and returns it; if an earlier attempt of this run stored a result for the key, returns that
        one without calling `work`. The result is any value that JSON has, at most 1 MiB of it, and
        is returned as JSON reads it: a tuple comes back as a list. A key has 1 to 128 bytes.

        An attempt that is lost while `work` is at work, or before its result is stored, does it
        again: make it safe to repeat. Raises what `work` raises; nothing is stored then.
        """
        return await take_step(self._calls, key, work, self._working)

    async def find_step(self, key: str) -> str | None:
        """The stored result of a step as JSON, None if there is none. `step` is made of this and
        of `keep_step`."""
        return await self._calls.find_step(key)

    async def keep_step(self, key: str, result: object) -> str:
        """Makes the result of a step durable; returns it as JSON."""
        return await self._calls.keep_step(key, result)

    async def ask(
        self,
        text: str,
        *,
        key: str = "",
        tool_name: str = "",
        arguments: Mapping[str, Any] | None = None,
        choices: Sequence[str] = (),
        schema: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        default: Any = None,
    ) -> Any:
        """Asks people. Without an answer, the attempt ends here with CancelledError; when there is
        one, the run starts again, on any worker, and this call then returns it (R40, R44).

        What the function does before happens again, so put what must not be repeated into steps.
        With `tool_name` it asks for an approval and returns an `Approval`; with `choices` it
        returns one of them, with `schema` (JSON Schema) an object that matches it, otherwise a
        text. The same key gets the same answer; without a `key` the question itself is the key.
        After `timeout` seconds the `default` is the answer; without one the run fails with
        INPUT_EXPIRED (R43). Raises AgentError for a question that nobody can answer.
        """
        question = self._questions.question(
            text,
            key=key,
            tool_name=tool_name,
            arguments=arguments,
            choices=choices,
            schema=schema,
            timeout=timeout,
            default=default,
        )
        return await self._calls.ask(question)

    async def emit(self, event: AgentEvent | str) -> None:
        """Adds an event to the output, as if the agent had yielded it; a string is text.

        It waits while too much of the output is not durable. After a cancel the event is dropped.
        Raises AgentError for another object.
        """
        await self._calls.emit(event)
