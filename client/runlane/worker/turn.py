"""The turn of a run, as an agent in a worker sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime

from runlane.types import Message
from runlane.worker.events import AgentEvent, FoldedPrompt, Prompt, prompt_from
from runlane.worker.v1 import worker_service_pb2 as pb


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
    """

    def __init__(
        self,
        given: pb.WorkResponse.Turn,
        *,
        emit: Callable[[AgentEvent | str], Awaitable[None]],
        take_folded: Callable[[], Awaitable[Sequence[FoldedPrompt]]],
        history: Callable[[], Awaitable[Sequence[Message]]],
    ) -> None:
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
        self._emit = emit
        self._take_folded = take_folded
        self._history = history

    async def history(self) -> Sequence[Message]:
        """The transcript before this turn, the oldest message first.

        Of a transcript larger than the server's `--max-history` it has the latest turns.
        """
        return await self._history()

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts that wait to join the turn. Call it between two steps.

        A prompt that was taken belongs to the turn: the agent must answer it too (R26).
        """
        return await self._take_folded()

    async def emit(self, event: AgentEvent | str) -> None:
        """Adds an event to the output, as if the agent had yielded it; a string is text.

        It waits while too much of the output is not durable. After a cancel the event is dropped.
        Raises AgentError for another object.
        """
        await self._emit(event)
