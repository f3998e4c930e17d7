"""Language models, by pydantic-ai. To be imported by the loader only, as it is an optional extra.

A step is a request to the model. Prompts that wait to join the turn are taken before each request,
and go into it behind what is there already, in accept order. After the last one they are looked for
once more, and begin another round of the same turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias, cast

from pydantic_ai import Agent as ModelAgent
from pydantic_ai import AgentRun, CallToolsNode, ModelRequestNode, RunContext
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.capabilities import ReinjectSystemPrompt
from pydantic_ai.exceptions import (
    AgentRunError,
    ContentFilterError,
    OutputTokenLimitExceeded,
    UserError,
)
from pydantic_ai.messages import (
    AgentStreamEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelMessage,
    ModelResponse,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
    UserPromptPart,
)
from pydantic_ai.models import Model, infer_model
from pydantic_ai.settings import ModelSettings
from pydantic_ai.usage import RunUsage
from pydantic_core import to_json
from pydantic_graph import End

from runlane_server.agents.base import AgentError, AgentEvent, Report, Turn
from runlane_server.agents.chat.errors import to_agent_error
from runlane_server.agents.chat.history import CallIds, model_messages, user_content
from runlane_server.core.errors import StartError
from runlane_server.core.model import (
    FinishReason,
    Prompt,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)
from runlane_server.core.trace import HEADER

_Run: TypeAlias = AgentRun[Any, Any]

# A model that wants a tool goes on with another request; where that is its last, it is done.
_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "tool_call": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.CONTENT_FILTER,
}


class ChatAgent:
    """Serves an agent of pydantic-ai, with the tools and instructions it has."""

    def __init__(self, agent: AbstractAgent[Any, Any]) -> None:
        self._agent = agent
        self._holder: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    @classmethod
    def of_model(cls, name: str, *, instructions: str | None, max_retries: int) -> ChatAgent:
        """The agent that only talks to one model, named `provider:model`. Raises StartError.

        `max_retries` is how often a request is repeated that failed before it was answered.
        """
        settings = ModelSettings(max_retries=max_retries)
        return cls(ModelAgent(_model(name), instructions=instructions, model_settings=settings))

    async def start(self) -> None:
        """Opens what the agent holds open: connections, tool servers."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing.clear()
        self._holder = asyncio.create_task(self._hold(ready))
        try:
            await asyncio.wait({ready, self._holder}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._holder.cancel()
            raise
        if self._holder.done():
            self._holder.result()

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Has the model answer the turn; raises AgentError where the provider fails."""
        history = model_messages(await turn.history())
        prompts: Sequence[Prompt] = [turn.prompt]
        ids = CallIds()  # a model may use an id again, and in a turn it must be unique
        try:
            while prompts:
                round_ = _Round(turn, ids)
                async with aclosing(round_.events(self._agent, prompts, history)) as events:
                    async for event in events:
                        yield event
                history = round_.messages
                prompts = [folded.prompt for folded in await turn.take_folded()]
        except ContentFilterError:
            yield Report(finish_reason=FinishReason.CONTENT_FILTER)
        except OutputTokenLimitExceeded:
            yield Report(finish_reason=FinishReason.LENGTH)
        except (AgentRunError, UserError) as exc:
            raise to_agent_error(exc) from exc

    async def close(self) -> None:
        """Closes what `start` opened."""
        self._closing.set()
        if self._holder is not None:
            await asyncio.wait({self._holder})
            self._holder.result()

    async def _hold(self, ready: asyncio.Future[None]) -> None:
        # In one task from open to close: that is what tool servers ask for, and the server may call
        # `start` and `close` in two.
        async with self._agent:
            ready.set_result(None)
            await self._closing.wait()


class _Round:
    """Prompts and all requests to the model until it has answered them."""

    def __init__(self, turn: Turn, ids: CallIds) -> None:
        self._turn = turn
        self._ids = ids
        self._usage = RunUsage()
        self.messages: list[ModelMessage] = []

    async def events(
        self,
        agent: AbstractAgent[Any, Any],
        prompts: Sequence[Prompt],
        history: Sequence[ModelMessage],
    ) -> AsyncGenerator[AgentEvent, None]:
        async with agent.iter(
            user_content(prompts[0]),
            message_history=history or None,
            # Is added to the settings that the agent has.
            model_settings=_sent_along(self._turn),
            # The transcript has no system prompts; those of the agent stand at its head.
            capabilities=[ReinjectSystemPrompt()],
        ) as run:
            _enqueue(run, prompts[1:])
            async for node in run:
                if isinstance(node, ModelRequestNode):
                    _enqueue(run, [one.prompt for one in await self._turn.take_folded()])
                    async with node.stream(run.ctx) as stream:
                        async for event in stream:
                            if (said := _said(event)) is not None:
                                yield said
                    yield self._report(run, stream.response)
                elif isinstance(node, CallToolsNode):
                    async with node.stream(run.ctx) as happenings:
                        async for event in happenings:
                            if (called := self._called(event)) is not None:
                                yield called
                elif isinstance(node, End) and not isinstance(node.data.output, str):
                    yield TextDelta(to_json(node.data.output, fallback=str).decode())
            yield Report(usage=self._spent(run))
            self.messages = run.all_messages()

    def _called(self, event: AgentStreamEvent) -> AgentEvent | None:
        match event:
            case FunctionToolCallEvent(part=call):
                call_id = self._ids.opened(call.tool_call_id)
                return ToolCall(call_id, call.tool_name, call.args_as_json_str())
            case FunctionToolResultEvent(part=result):
                call_id_or_none = self._ids.closed(result.tool_call_id)
                if call_id_or_none is None:
                    return None
                return ToolResult(
                    call_id_or_none,
                    result.tool_name,
                    result.model_response_str(wrap_if_error=False),
                    is_error=result.outcome != "success",
                )
            case _:
                return None

    def _report(self, run: _Run, response: ModelResponse) -> Report:
        if response.finish_reason == "error":
            raise AgentError("the provider broke off its answer", reason="PROVIDER_ERROR")
        return Report(
            usage=self._spent(run),
            model=response.model_name,
            finish_reason=_FINISH_REASONS.get(response.finish_reason or ""),
        )

    def _spent(self, run: _Run) -> Usage:
        """What was used since the last time; with the models that tools called on their own."""
        before, now = self._usage, run.usage
        self._usage = RunUsage() + now
        return Usage(
            input_tokens=now.input_tokens - before.input_tokens,
            output_tokens=now.output_tokens - before.output_tokens,
            cache_read_tokens=now.cache_read_tokens - before.cache_read_tokens,
            cache_write_tokens=now.cache_write_tokens - before.cache_write_tokens,
            requests=now.requests - before.requests,
        )


def _sent_along(turn: Turn) -> Callable[[RunContext[Any]], ModelSettings] | None:
    """The header of requests to the model that says where in a trace they are, beside those that
    the agent has."""
    if not turn.traceparent:
        return None

    def settings(context: RunContext[Any]) -> ModelSettings:
        own = cast("Mapping[str, str]", (context.model_settings or {}).get("extra_headers") or {})
        return ModelSettings(extra_headers={**own, HEADER: turn.traceparent})

    return settings


def _enqueue(run: _Run, prompts: Sequence[Prompt]) -> None:
    """Adds to the next request, in order: "asap" is drained right before a request is sent."""
    for prompt in prompts:
        run.enqueue(UserPromptPart(content=user_content(prompt)), priority="asap")


def _said(event: AgentStreamEvent) -> AgentEvent | None:
    match event:
        case PartStartEvent(part=TextPart(content=text)) if text:
            return TextDelta(text)
        case PartDeltaEvent(delta=TextPartDelta(content_delta=text)) if text:
            return TextDelta(text)
        case PartStartEvent(part=ThinkingPart(content=text)) if text:
            return ReasoningDelta(text)
        case PartDeltaEvent(delta=ThinkingPartDelta(content_delta=text)) if text:
            return ReasoningDelta(text)
        case _:
            return None


def _model(name: str) -> Model:
    provider, _, model = name.partition(":")
    if not (provider and model):
        raise StartError(f"agent chat: {name!r} is not provider:model; write chat:openai:gpt-4o")
    # What other services are compatible with is the chat completions API of OpenAI.
    provider = "openai-chat" if provider == "openai" else provider
    try:
        return infer_model(f"{provider}:{model}")
    except Exception as exc:
        # Each provider has errors of its own for a key that is missing.
        raise StartError(f"agent chat: {str(exc).partition(chr(10))[0]}") from exc
