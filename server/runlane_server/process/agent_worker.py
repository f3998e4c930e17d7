"""Executes an agent of the server as a worker: its turns come over the wire."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import astuple, dataclass
from datetime import datetime
from typing import Any

from structlog.contextvars import bind_contextvars

from runlane import types as wire
from runlane.wire import Wire
from runlane.worker import Turn, Worker
from runlane.worker import events as sdk
from runlane.worker.questions import Questions
from runlane.worker.v1 import worker_service_pb2 as pb
from runlane_server.agents.base import (
    Agent,
    AgentError,
    AgentEvent,
    Artifact,
    Custom,
    FoldedPrompt,
    Report,
    Result,
)
from runlane_server.agents.processes.protocol import SECRET_KEY
from runlane_server.agents.questions import Asked, check_checkpoint
from runlane_server.core.artifact import ArtifactKind, ArtifactPiece
from runlane_server.core.model import (
    Attachment,
    FinishReason,
    Message,
    Origin,
    Part,
    Prompt,
    Reasoning,
    ResultPart,
    Role,
    RunKey,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
)
from runlane_server.core.turn import InvalidAgentEvent
from runlane_server.engine.agent_code import EXITS, AgentCode
from runlane_server.engine.agent_output import ReportCheck, describe, run_error

_NEVER = (1 << 31) - 1


class AgentWorker(Worker):
    """A worker in a process of the server, which ends it by `stop`, not by signals."""

    def __init__(
        self, agent: Agent, name: str, *, address: str, secret: str, worker_id: str, slots: int
    ) -> None:
        async def execute(turn: Turn) -> None:
            await _Execution(agent, turn).run()

        super().__init__(
            address,
            {name: execute},
            slots=slots,
            worker_id=worker_id,
            drain_timeout=0.0,
            metadata={SECRET_KEY: secret},
        )

    def _handle_signals(self) -> Callable[[], None]:
        return lambda: None

    def _wire(self, target: str) -> Wire:
        # A server that is paused for a while is not lost.
        return Wire(
            target,
            credentials=None,
            metadata=self._metadata,
            options=(("grpc.max_receive_message_length", -1), ("grpc.keepalive_time_ms", _NEVER)),
            timeout=10.0,
            retry=self._retry,
        )


class _Execution:
    """One attempt. Its events are checked as within the server."""

    def __init__(self, agent: Agent, turn: Turn) -> None:
        self._agent = agent
        self._turn = turn
        self._code = AgentCode(RunKey(turn.tenant, turn.run_id), turn.session_id)
        self._check = ReportCheck()
        self._refused: Exception | None = None

    async def run(self) -> None:
        """Executes the attempt. Raises AgentError if it fails."""
        bind_contextvars(session_id=self._turn.session_id, run_id=self._turn.run_id)
        work = self._code.start(self._work())
        try:
            await work
        except asyncio.CancelledError:
            # The slot is in use until all tasks of the agent have returned (R9).
            while left := self._code.working():
                await asyncio.wait(left)
            if _is_stopped():
                raise
            raise sdk.AgentError("the agent cancelled its own task") from None
        except Exception as failure:
            error = run_error(failure)
            raise sdk.AgentError(error.message, reason=error.reason) from failure
        if self._refused is not None:
            # Even if the agent has caught the exception.
            error = run_error(self._refused)
            raise sdk.AgentError(error.message, reason=error.reason)

    async def _work(self) -> None:
        self._code.enter()
        try:
            async with aclosing(self._agent.run(_WorkerTurn(self._turn, self._emit))) as events:
                async for event in events:
                    await self._emit(event)
        except (*EXITS, GeneratorExit) as error:
            raise AgentError(f"the agent raised {describe(error)}") from error

    async def _emit(self, event: AgentEvent) -> None:
        try:
            checked = self._checked(event)
        except (InvalidAgentEvent, AgentError) as refused:
            self._refused = self._refused or refused
            raise
        await self._turn.emit(checked)  # type: ignore[arg-type] # its classes have the same fields

    def _checked(self, event: AgentEvent) -> object:
        match event:
            case Report():
                return self._check.report(event)
            case Result():
                self._check.result(event)
            case Artifact() | Custom():
                self._check.event(event)
            case _:
                return self._check.event(event)
        return event


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """The checkpoint of the agent, and what it has asked: the kind of an answer follows from it."""

    of_agent: str
    questions: Sequence[pb.Question]

    def to_json(self) -> str:
        """All of it as text."""
        asked = [base64.b64encode(one.SerializeToString()).decode() for one in self.questions]
        return json.dumps([self.of_agent, asked], ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> _Checkpoint:
        """Reads what `to_json` wrote; of a turn that begins there is nothing."""
        if not text:
            return cls("", ())
        of_agent, asked = json.loads(text)
        return cls(of_agent, [pb.Question.FromString(base64.b64decode(one)) for one in asked])


def _is_stopped() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _WorkerTurn:
    """Implements `agents.base.Turn` with a turn of the worker."""

    def __init__(self, turn: Turn, emit: Callable[[AgentEvent], object]) -> None:
        self.session_id = turn.session_id
        self.run_id = turn.run_id
        self.attempt = turn.attempt
        self.prompt = _prompt(turn.prompt)
        self.metadata: Mapping[str, str] = turn.metadata
        self.traceparent = turn.traceparent
        self.origin = None if turn.origin is None else Origin(*astuple(turn.origin))
        self.tenant = turn.tenant
        self.deadline: datetime | None = turn.deadline
        self._turn = turn
        self._emit_event = emit
        self._calls, self._questions = turn.calls, Questions()
        kept = _Checkpoint.from_json(turn.checkpoint)
        self.checkpoint = kept.of_agent
        self._left = {one.key: one for one in kept.questions}

    async def history(self) -> Sequence[Message]:
        """The transcript before this turn."""
        ordinals: dict[int, int] = {}
        messages: list[Message] = []
        for message in await self._turn.history():
            ordinal = ordinals.get(message.turn, -1) + 1
            ordinals[message.turn] = ordinal
            messages.append(_message(message, ordinal))
        return messages

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts that wait to join the turn."""
        folded = await self._turn.take_folded()
        return [FoldedPrompt(one.run_id, _prompt(one.prompt)) for one in folded]

    async def ask(self, text: str, **how: Any) -> Any:
        """Asks people. Without an answer the run leaves this process, and starts again in any of
        the agent's once it has one (R44)."""
        return await self._turn.ask(text, **how)

    async def ask_and_leave(self, questions: Sequence[Asked], checkpoint: str) -> bool:
        """Asks people. Without an answer the run leaves this process; another one continues it
        from the checkpoint."""
        check_checkpoint(questions, checkpoint)
        asked = [self._questions.question(**one._asdict()) for one in questions]
        await self._calls.leave(asked, _Checkpoint(checkpoint, asked).to_json())
        self._left = {one.key: one for one in asked}
        return False

    async def answer_to(self, key: str) -> Any:
        """The answer to a question that the agent has left with. Raises AgentError."""
        if key not in self._left:
            raise AgentError(f"nothing was asked with the key {key!r}")
        return await self._calls.ask(self._left[key])

    async def step(self, key: str, work: Callable[[], Any]) -> Any:
        """Does the work of a step unless its result is stored."""
        return await self._turn.step(key, work)

    async def find_step(self, key: str) -> str | None:
        """The stored result of a step."""
        return await self._turn.find_step(key)

    async def keep_step(self, key: str, result: object) -> str:
        """Makes the result of a step durable."""
        return await self._turn.keep_step(key, result)

    async def emit(self, event: AgentEvent | str) -> None:
        """Adds an event to the output."""
        await self._emit_event(  # type: ignore[misc]
            TextDelta(event) if isinstance(event, str) else event
        )


def _prompt(prompt: sdk.Prompt) -> Prompt:
    return Prompt(prompt.text, tuple(map(_attachment, prompt.attachments)))


def _attachment(one: wire.Attachment) -> Attachment:
    return Attachment(one.name, one.mime_type, one.content)


def _message(message: wire.Message, ordinal: int) -> Message:
    reason = message.finish_reason
    return Message(
        message.message_id,
        message.run_id,
        message.turn,
        ordinal,
        Role(message.role),
        tuple(map(_part, message.parts)),
        None if reason is None else FinishReason(reason),
        message.model,
        round(message.created_at.timestamp() * 1e6),
    )


def _part(part: wire.Part) -> Part:  # noqa: PLR0911 - one per kind
    match part:
        case wire.Text(text):
            return Text(text)
        case wire.Reasoning(text):
            return Reasoning(text)
        case wire.ToolCall():
            return ToolCall(part.tool_call_id, part.name, part.arguments_json)
        case wire.ToolResult():
            return ToolResult(part.tool_call_id, part.name, part.content, part.is_error)
        case wire.Attachment():
            return _attachment(part)
        case wire.Artifact():
            kind = ArtifactKind(part.kind)
            names = (part.artifact_id, part.name, part.mime_type)
            return ArtifactPiece(*names, kind, part.content, part.append, part.last)
        case wire.Result(json):
            return ResultPart(json)
