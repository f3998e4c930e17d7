"""Every exchange with a model: a request within the grammar, and a response that can be trusted.

`Exchange` is a capability of pydantic-ai, so that it applies to every model that an agent may use,
after all that the agent's own code does to a request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import structlog
from pydantic_ai import RunContext
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.exceptions import AgentRunError, UnexpectedModelBehavior, UserError
from pydantic_ai.messages import (
    AgentStreamEvent,
    BinaryContent,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ModelResponseStreamEvent,
    UserPromptPart,
)
from pydantic_ai.models import (
    Model,
    ModelRequestContext,
    ModelRequestParameters,
    StreamedResponse,
)
from pydantic_ai.models.openai import OpenAIChatModelSettings, OpenAIStreamedResponse
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.result import AgentStream
from pydantic_ai.settings import ModelSettings

from runlane_server.agents.base import AgentError
from runlane_server.agents.chat.grammar import valid, valid_response

log = structlog.get_logger()

ENDED_EARLY = (
    "the provider ended its answer without a finish reason; if it never sends one, start the "
    "server with --chat-lenient-end"
)


class Exchange(AbstractCapability[Any]):
    """Makes requests and responses valid.

    With `lenient_end`, an answer may end without a finish reason.
    """

    def __init__(self, *, lenient_end: bool) -> None:
        self._lenient_end = lenient_end
        self._last: _ValidatingModel | None = None

    def get_wrapper_model(self, model: Model) -> Model:
        """Wraps the model that serves a request. It has no state, so requests share it."""
        if self._last is None or self._last.wrapped is not model:
            self._last = _ValidatingModel(model, lenient_end=self._lenient_end)
        return self._last

    async def after_model_request(
        self,
        ctx: RunContext[Any],
        *,
        request_context: ModelRequestContext,
        response: ModelResponse,
    ) -> ModelResponse:
        """Corrects the tool calls before they are executed and reported."""
        return valid_response(response, ctx.messages)


class _ValidatingModel(WrapperModel):
    def __init__(self, wrapped: Model, *, lenient_end: bool) -> None:
        super().__init__(wrapped)
        self._lenient_end = lenient_end

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,
    ) -> AsyncGenerator[StreamedResponse]:
        """Sends a valid request. Raises AgentError if the model cannot express it."""
        conforming = valid(messages, model_request_parameters.tool_defs)
        async with AsyncExitStack() as stack:
            try:
                stream = await stack.enter_async_context(
                    self.wrapped.request_stream(
                        conforming, model_settings, model_request_parameters, run_context
                    )
                )
            except UnexpectedModelBehavior as exc:
                message = f"the provider of {self.model_name} sent no answer"
                raise AgentError(message, reason="PROVIDER_UNAVAILABLE") from exc
            except (AgentRunError, ExceptionGroup):
                raise
            except Exception as exc:
                kinds = sorted({file.media_type for file in _files(conforming)})
                if kinds and isinstance(exc, _CONVERSION_ERRORS):
                    raise _unsupported(self.model_name, kinds) from exc
                raise _unreadable(self.model_name, exc) from exc
            _guard(stream)
            if isinstance(stream, OpenAIStreamedResponse):
                _count_tokens_once(stream)
            yield stream
            if not self._lenient_end:
                _check_end(stream)


def _count_tokens_once(stream: OpenAIStreamedResponse) -> None:
    """Makes each usage replace the one before: some gateways send the tokens so far with every
    chunk. The setting for it would also ask the provider for it, which not every one allows."""
    settings = {**(stream._model_settings or {}), "openai_continuous_usage_stats": True}  # noqa: SLF001
    stream._model_settings = cast("OpenAIChatModelSettings", settings)  # noqa: SLF001


def _check_end(stream: StreamedResponse) -> None:
    """Raises AgentError if the answer of a provider was cut off. Models within the process, which
    have no URL, need not give a finish reason."""
    response = stream.get()
    if response.state != "complete" or stream.provider_url is None:
        return
    if "finish_reason" in (response.provider_details or {}):
        return  # in the provider's own words
    # pydantic-ai assumes `stop` if an endpoint of this kind gives none.
    assumed = "stop" if isinstance(stream, OpenAIStreamedResponse) else None
    if response.finish_reason in {assumed, None}:
        raise AgentError(ENDED_EARLY, reason="PROVIDER_UNAVAILABLE")


_CONVERSION_ERRORS = (RuntimeError, AssertionError, UnicodeError)
"""The exceptions of pydantic-ai for a file that it cannot convert for a provider."""


def _unsupported(model: str, kinds: Sequence[str]) -> AgentError:
    message = f"{model} does not take one of these kinds of attachments: {', '.join(kinds)}"
    return AgentError(message, reason="PROVIDER_REJECTED")


def _unreadable(model: str, exc: Exception) -> AgentError:
    """The error for an answer whose values have other types than pydantic-ai expects."""
    log.warning("answer of a model not readable", model=model, exc_info=exc)
    return AgentError(f"the answer of {model} cannot be read", reason="PROVIDER_ERROR")


def _guard(stream: StreamedResponse) -> None:
    """Turns each error while a stream is read into an error of the provider."""
    read = stream._get_event_iterator  # noqa: SLF001

    async def guarded() -> AsyncGenerator[ModelResponseStreamEvent, None]:
        try:
            async for event in read():
                yield event
        except AgentRunError:
            raise
        except stream.get_stream_cancel_errors() as exc:
            if stream.cancelled:
                raise  # expected by pydantic-ai, which has closed the connection
            message = f"the connection to the provider of {stream.model_name} broke"
            raise AgentError(message, reason="PROVIDER_UNAVAILABLE") from exc
        except Exception as exc:
            raise _unreadable(str(stream.model_name), exc) from exc

    stream._get_event_iterator = guarded  # type: ignore[method-assign]  # noqa: SLF001


async def readable(stream: AgentStream[Any, Any]) -> AsyncGenerator[AgentStreamEvent, None]:
    """The events of an answer, as pydantic-ai makes them of what `_guard` lets through. Raises
    AgentError if it cannot, as with parts whose order is none."""
    try:
        async for event in stream:
            yield event
    except (AgentError, AgentRunError, UserError, ExceptionGroup):
        raise
    except Exception as exc:
        raise _unreadable(str(stream.response.model_name), exc) from exc


def _files(messages: Iterable[ModelMessage]) -> Iterable[BinaryContent]:
    for message in messages:
        for part in message.parts if isinstance(message, ModelRequest) else ():
            if isinstance(part, UserPromptPart) and not isinstance(part.content, str):
                yield from (item for item in part.content if isinstance(item, BinaryContent))
