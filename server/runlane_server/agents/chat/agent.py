"""The agent that runs a language model, or a whole pydantic-ai agent.

A step is a request to the model. Before each request the agent takes the prompts that wait to join
the turn, and appends them to the request in accept order. After the last request it checks once
more: prompts that wait then begin another round of the same turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

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
    ModelRequest,
    ModelResponse,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import Model, infer_model
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import DeferredToolRequests
from pydantic_ai.usage import RunUsage
from pydantic_core import to_json
from pydantic_graph import End

from runlane_server.agents.abilities import OF_MODEL, Ability
from runlane_server.agents.base import AgentError, AgentEvent, Report, Turn
from runlane_server.agents.chat.deferred import Waiting, output_type
from runlane_server.agents.chat.deps import deps_of
from runlane_server.agents.chat.errors import REJECTIONS, to_agent_error
from runlane_server.agents.chat.exchange import Exchange, readable
from runlane_server.agents.chat.grammar import is_silent, valid_arguments
from runlane_server.agents.chat.history import model_messages, texts_only, user_content
from runlane_server.agents.questions import Asked
from runlane_server.core.errors import SettingsError
from runlane_server.core.model import (
    FinishReason,
    Message,
    Prompt,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
    clean_text,
)
from runlane_server.core.trace import HEADER

if TYPE_CHECKING:
    from runlane_server.agents.chat.direct import DirectRound, Endpoint

_Run: TypeAlias = AgentRun[Any, Any]

# After a tool call the model gets another request; if there is none, the turn has ended normally.
_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "tool_call": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.CONTENT_FILTER,
}


class ChatAgent:
    """Runs an agent of pydantic-ai, with its tools and instructions."""

    def __init__(
        self,
        agent: AbstractAgent[Any, Any],
        *,
        lenient_end: bool = False,
        endpoint: Endpoint | None = None,
    ) -> None:
        """With `lenient_end`, an answer may end without a finish reason. The `endpoint` of its
        model, if the agent has no tools, is asked directly."""
        self._agent = agent
        self._endpoint = endpoint
        self._exchange = Exchange(lenient_end=lenient_end)
        self._context_task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self.abilities = OF_MODEL | {Ability.ASK, Ability.RESUME}

    @classmethod
    def of_model(
        cls, name: str, *, instructions: str | None, max_retries: int, lenient_end: bool = False
    ) -> ChatAgent:
        """An agent without tools for one model, named `provider:model`. Raises StartError.

        `max_retries` is the number of retries of a request that failed before its answer began.
        """
        settings = ModelSettings(max_retries=max_retries)
        model = _find_model(name)
        endpoint = _endpoint_of(model, instructions, lenient_end=lenient_end)
        if endpoint is not None:
            model = endpoint.model
        agent = cls(
            ModelAgent(model, instructions=instructions, model_settings=settings),
            lenient_end=lenient_end,
            endpoint=endpoint,
        )
        agent.abilities = OF_MODEL  # it has no tools
        return agent

    async def start(self) -> None:
        """Opens the connections and tool servers of the agent."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing.clear()
        self._context_task = asyncio.create_task(self._hold_open(ready))
        try:
            await asyncio.wait({ready, self._context_task}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._context_task.cancel()
            raise
        if self._context_task.done():
            self._context_task.result()

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Lets the model answer the turn. Raises AgentError if the provider fails.

        If the provider rejects the request because of an earlier turn, another one follows that has
        the texts of those turns only.
        """
        transcript = await turn.history()
        answering = _Answering(self._agent, self._exchange, turn, self._endpoint)
        try:
            async with aclosing(answering.events(transcript)) as events:
                async for event in events:
                    yield event
        except AgentError as error:
            if answering.has_begun or error.reason not in REJECTIONS:
                raise
            texts = texts_only(transcript)
            if texts is None:
                raise
            async with aclosing(answering.events(texts)) as events:
                async for event in events:
                    yield event

    async def close(self) -> None:
        """Closes what `start` opened."""
        self._closing.set()
        if self._context_task is not None:
            await asyncio.wait({self._context_task})
            self._context_task.result()

    async def _hold_open(self, ready: asyncio.Future[None]) -> None:
        # Tool servers must be opened and closed in the same task, while the server may call `start`
        # and `close` in different ones.
        async with self._agent:
            if self._endpoint is not None:
                self._endpoint.start()
            try:
                ready.set_result(None)
                await self._closing.wait()
            finally:
                if self._endpoint is not None:
                    await self._endpoint.close()


class _Answering:
    """The answer to a turn, in rounds."""

    def __init__(
        self,
        agent: AbstractAgent[Any, Any],
        exchange: Exchange,
        turn: Turn,
        endpoint: Endpoint | None,
    ) -> None:
        self._agent = agent
        self._exchange = exchange
        self._turn = turn
        self._endpoint = endpoint
        self._prompts = [turn.prompt]
        self._waiting = Waiting.of_checkpoint(turn.checkpoint)
        self.has_begun = False
        """Whether any event was yielded: then the turn cannot begin again."""

    async def events(self, transcript: Sequence[Message]) -> AsyncGenerator[AgentEvent, None]:
        """Answers all prompts of the turn. Raises AgentError."""
        history = model_messages(transcript)
        waiting = self._waiting
        prompts = [] if waiting.calls else self._prompts
        deps = await deps_of(self._agent, self._turn)
        try:
            while prompts or waiting.calls:
                round_ = _Round(self._turn, self._exchange, prompts, waiting)
                said = [*history, *waiting.messages]
                async with aclosing(self._path(round_).events(self._agent, said, deps)) as events:
                    async for event in events:
                        self.has_begun = True
                        yield event
                if round_.questions:
                    if await self._turn.ask_and_leave(round_.questions, waiting.checkpoint()):
                        return
                    prompts = []
                    continue
                prompts = [folded.prompt for folded in await self._turn.take_folded()]
        except ContentFilterError:
            yield Report(finish_reason=FinishReason.CONTENT_FILTER)
        except OutputTokenLimitExceeded:
            yield Report(finish_reason=FinishReason.LENGTH)
        except (AgentRunError, UserError, ExceptionGroup) as exc:
            raise to_agent_error(exc) from exc

    def _path(self, round_: _Round) -> _Round | DirectRound:
        if self._endpoint is None or self._waiting.calls:
            return round_
        return self._endpoint.round(self._turn.traceparent, round_)


class _Round:
    """The requests to the model until it has answered some prompts.

    `prompts` grows by those that are folded in. `is_sent` says whether the first request was sent
    already, with all prompts: none can join it any more.
    """

    def __init__(
        self, turn: Turn, exchange: Exchange, prompts: list[Prompt], waiting: Waiting
    ) -> None:
        self._turn = turn
        self._exchange = exchange
        self.prompts = prompts
        self.is_sent = False
        self._waiting = waiting
        self._open_calls = waiting.is_open
        self._reported = RunUsage()
        self.questions: list[Asked] = []
        """The questions to people that the model's calls wait for."""

    async def events(  # noqa: C901 - one case per node
        self,
        agent: AbstractAgent[Any, Any],
        history: Sequence[ModelMessage],
        deps: Any,
    ) -> AsyncGenerator[AgentEvent, None]:
        """Yields the events of the round, and adds its messages to what was said in the turn."""
        answers = await self._waiting.results(self._turn) if self._waiting.calls else None
        self._waiting.calls.clear()
        async with agent.iter(
            None if answers is not None else user_content(self.prompts[0]),
            output_type=output_type(agent),
            deferred_tool_results=answers,
            message_history=history or None,
            deps=deps,
            # Merged with the agent's own settings.
            model_settings=_trace_settings(self._turn),
            # The transcript has no system prompts; the first puts the agent's own before it.
            capabilities=[ReinjectSystemPrompt(), self._exchange],
        ) as run:
            _enqueue(run, self.prompts[1:])
            async for node in run:
                if isinstance(node, ModelRequestNode):
                    _enqueue(run, await self.take_folded())
                    async with node.stream(run.ctx) as stream:
                        async for event in readable(stream):
                            if (delta := _to_delta(event)) is not None:
                                yield delta
                    yield self._report(run, stream.response)
                    if _has_nothing_to_add(run, stream.response):
                        break
                elif isinstance(node, CallToolsNode):
                    async with node.stream(run.ctx) as tool_events:
                        async for event in tool_events:
                            if (call_or_result := self._to_tool_event(event)) is not None:
                                yield call_or_result
                elif isinstance(node, End) and isinstance(node.data.output, DeferredToolRequests):
                    self.questions = self._waiting.add(node.data.output)
                elif isinstance(node, End) and not isinstance(node.data.output, str):
                    yield TextDelta(to_json(node.data.output, fallback=str).decode())
            yield Report(usage=self._unreported_usage(run))
            self.add(run.new_messages())

    def add(self, messages: Sequence[ModelMessage]) -> None:
        """Adds messages to what was said in the turn."""
        self._waiting.messages += messages

    async def take_folded(self) -> list[Prompt]:
        """Takes the prompts that wait to join the turn, and adds them to `prompts`."""
        if self.is_sent:
            self.is_sent = False
            return []
        prompts = [folded.prompt for folded in await self._turn.take_folded()]
        self.prompts += prompts
        return prompts

    def _to_tool_event(self, event: AgentStreamEvent) -> AgentEvent | None:
        match event:
            case FunctionToolCallEvent(part=call) if call.tool_call_id in self._open_calls:
                return None  # it was reported before it waited
            case FunctionToolCallEvent(part=call):
                self._open_calls.add(call.tool_call_id)
                arguments = replace(call, args=valid_arguments(call.args)).args_as_json_str()
                return ToolCall(call.tool_call_id, call.tool_name, arguments)
            case FunctionToolResultEvent(part=result) if result.tool_call_id in self._open_calls:
                self._open_calls.remove(result.tool_call_id)
                return ToolResult(
                    result.tool_call_id,
                    result.tool_name,
                    result.model_response_str(wrap_if_error=False),
                    is_error=result.outcome != "success",
                )
            case _:
                return None

    def _report(self, run: _Run, response: ModelResponse) -> Report:
        if response.finish_reason == "error":
            raise AgentError("the provider aborted its answer", reason="PROVIDER_ERROR")
        return Report(
            usage=self._unreported_usage(run),
            model=clean_text(str(response.model_name or "")) or None,
            finish_reason=_FINISH_REASONS.get(response.finish_reason or ""),
        )

    def _unreported_usage(self, run: _Run) -> Usage:
        """The usage since the last report, including that of models which tools called."""
        before, now = self._reported, run.usage
        self._reported = RunUsage() + now
        return Usage(
            input_tokens=now.input_tokens - before.input_tokens,
            output_tokens=now.output_tokens - before.output_tokens,
            cache_read_tokens=now.cache_read_tokens - before.cache_read_tokens,
            cache_write_tokens=now.cache_write_tokens - before.cache_write_tokens,
            requests=now.requests - before.requests,
        )


def _has_nothing_to_add(run: _Run, response: ModelResponse) -> bool:
    """Whether the model has ended its work with tools without a last word; pydantic-ai would ask it
    again for one."""
    if response.finish_reason != "stop" or not is_silent(response):
        return False
    last_request = next(m for m in reversed(run.all_messages()) if isinstance(m, ModelRequest))
    expected = run.ctx.state.last_model_request_parameters
    return (
        any(isinstance(part, ToolReturnPart) for part in last_request.parts)
        and expected is not None
        and expected.allow_text_output
        and expected.output_object is None  # text that is JSON of a given type
    )


def _trace_settings(turn: Turn) -> Callable[[RunContext[Any]], ModelSettings] | None:
    """Settings that add the `traceparent` header to requests to the model; None without a trace."""
    if not turn.traceparent:
        return None

    def settings(context: RunContext[Any]) -> ModelSettings:
        own = cast("Mapping[str, str]", (context.model_settings or {}).get("extra_headers") or {})
        return ModelSettings(extra_headers={**own, HEADER: turn.traceparent})

    return settings


def _enqueue(run: _Run, prompts: Sequence[Prompt]) -> None:
    """Adds prompts to the next request, in order: "asap" is drained just before it is sent."""
    for prompt in prompts:
        run.enqueue(UserPromptPart(content=user_content(prompt)), priority="asap")


def _to_delta(event: AgentStreamEvent) -> AgentEvent | None:
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


def _find_model(name: str) -> Model:
    provider, _, model = name.partition(":")
    if not (provider and model):
        raise SettingsError(f"agent chat: {name!r} is not provider:model; write chat:openai:gpt-4o")
    # OPENAI_BASE_URL often names another service; those implement the chat completions API.
    provider = "openai-chat" if provider == "openai" else provider
    try:
        return infer_model(f"{provider}:{model}")
    except Exception as exc:
        # Each provider raises its own kind of error for a missing key.
        raise SettingsError(f"agent chat: {str(exc).partition(chr(10))[0]}") from exc


def _endpoint_of(model: Model, instructions: str | None, *, lenient_end: bool) -> Endpoint | None:
    """The endpoint of a model that can be asked directly."""
    if (
        type(model) is OpenAIChatModel
        and type(model.provider) is OpenAIProvider
        and model.client.base_url.host  # the SDK says what is wrong with another URL
    ):
        # An agent of your own needs pydantic-ai only.
        from runlane_server.agents.chat.direct import Endpoint  # noqa: PLC0415

        return Endpoint(model.model_name, instructions, lenient_end=lenient_end)
    return None
