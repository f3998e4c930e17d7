"""Asks an endpoint with the API of OpenAI without its SDK, as far as the answer is plain text.

The SDK and pydantic-ai take a quarter of a millisecond for a chunk and four for a request, most of
it for content that a chat without tools does not have. Other content goes to them: the whole
request, or the answer from its beginning.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, suppress
from typing import Any, Protocol

import aiohttp
import httpx2
import structlog
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.messages import ModelMessage, ModelRequest, UserPromptPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.profiles import DEFAULT_THINKING_TAGS
from pydantic_ai.providers.openai import OpenAIProvider

from runlane_server.agents.base import AgentEvent, Report
from runlane_server.agents.chat.grammar import valid
from runlane_server.agents.chat.history import user_content
from runlane_server.agents.chat.plain import EventStream, Odd, PlainAnswer, data_of
from runlane_server.agents.chat.replay import Arrived, ReplayingClient, give
from runlane_server.core.model import Prompt, ReasoningDelta, TextDelta, clean_text
from runlane_server.core.trace import HEADER

log = structlog.get_logger()

CONNECT_SECONDS = 5.0
READ_SECONDS = 600.0
"""The timeouts of the SDK: for a connection, and for the next bytes of an answer."""

DRAIN_SECONDS = 0.1
"""Longest wait for the end of a body after the last event, so that its connection is kept."""

_BROKEN = (aiohttp.ClientError, OSError, TimeoutError)


class Endpoint:
    """The endpoint of a model. `model` is the same one by way of the SDK."""

    def __init__(self, name: str, instructions: str | None, *, lenient_end: bool) -> None:
        """With `lenient_end`, an answer may end without a finish reason."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
        timeout = httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        self._client = ReplayingClient(limits=limits, timeout=timeout, follow_redirects=True)
        self.model = OpenAIChatModel(name, provider=OpenAIProvider(http_client=self._client))
        self.lenient_end = lenient_end
        self._instructions = instructions
        self._session: aiohttp.ClientSession | None = None

    def start(self) -> None:
        """Opens the pool of connections."""
        sdk = self.model.client
        headers = {
            name: value
            for name, value in {**sdk.default_headers, **sdk.auth_headers}.items()
            if isinstance(value, str) and not name.startswith("X-Stainless-")
        }
        self._session = aiohttp.ClientSession(
            # The base of a URL is cut at its last slash, which the SDK has added.
            str(sdk.base_url),
            connector=aiohttp.TCPConnector(limit=0, ssl=httpx2.create_ssl_context()),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={**headers, "User-Agent": "runlane", "Accept": "text/event-stream"},
            timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS),
            trust_env=True,
        )

    async def close(self) -> None:
        """Closes all connections."""
        if self._session is not None:
            await self._session.close()
        await self._client.aclose()

    def request(self, prompts: Sequence[Prompt]) -> ModelRequest:
        """A request with some prompts."""
        parts = [UserPromptPart(content=user_content(prompt)) for prompt in prompts]
        return ModelRequest(parts=parts, instructions=self._instructions)

    async def body(self, messages: list[ModelMessage]) -> bytes | None:
        """The body of a request; None if pydantic-ai cannot convert the messages."""
        try:
            sent = await self.model._map_messages(messages, ModelRequestParameters())  # noqa: SLF001
        except Exception:  # noqa: BLE001 - of any kind, for a file that the model does not take
            return None
        body = {
            "model": self.model.model_name,
            "messages": sent,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body).encode()

    def ask(
        self, body: bytes, headers: Mapping[str, str]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Sends a request. Leaving the context before the end of the answer closes the
        connection."""
        assert self._session is not None, "start was not called"  # noqa: S101
        return self._session.post("chat/completions", data=body, headers=headers)

    def round(self, traceparent: str, round_: Round) -> DirectRound:
        """The same round, without pydantic-ai as far as that goes."""
        return DirectRound(self, traceparent, round_)


class Round(Protocol):
    """A round by way of pydantic-ai."""

    prompts: list[Prompt]
    is_sent: bool
    """Whether its first request was sent, with all prompts."""

    def add(self, messages: Sequence[ModelMessage]) -> None:
        """Adds messages to what was said in the turn."""

    async def take_folded(self) -> list[Prompt]:
        """Adds the prompts that wait to join the turn."""

    def events(
        self, agent: AbstractAgent[Any, Any], history: Sequence[ModelMessage], deps: Any
    ) -> AsyncGenerator[AgentEvent, None]:
        """The events of the round."""


class DirectRound:
    """A request without pydantic-ai, or a round with it where that is not enough."""

    def __init__(self, endpoint: Endpoint, traceparent: str, round_: Round) -> None:
        self._endpoint = endpoint
        self._headers = {HEADER: traceparent} if traceparent else {}
        self._round = round_

    async def events(
        self, agent: AbstractAgent[Any, Any], history: Sequence[ModelMessage], deps: Any
    ) -> AsyncGenerator[AgentEvent, None]:
        """The events of the round. Raises what a round with pydantic-ai does."""
        await self._round.take_folded()
        request = self._endpoint.request(self._round.prompts)
        body = await self._endpoint.body(valid([*history, request]))
        seen = 0
        async with AsyncExitStack() as stack:
            if body is not None:
                try:
                    asking = self._endpoint.ask(body, self._headers)
                    response = await stack.enter_async_context(asking)
                except _BROKEN as error:
                    give(Arrived(failure=_kind(error)))
                else:
                    reading = _Reading(response, self._endpoint)
                    async for delta in reading.deltas():
                        yield delta
                    if reading.is_complete:
                        yield self._report(reading.answer)
                        answer = reading.answer.response(self._endpoint.model.system)
                        self._round.add([request, answer])
                        return
                    seen = reading.answer.deltas
                    give(await reading.arrived())
                self._round.is_sent = True
            async with aclosing(self._round.events(agent, history, deps)) as events:
                async for event in events:
                    if seen and isinstance(event, TextDelta | ReasoningDelta):
                        seen -= 1
                    else:
                        yield event

    def _report(self, answer: PlainAnswer) -> Report:
        model = clean_text(answer.model or self._endpoint.model.model_name)
        return Report(usage=answer.usage, model=model, finish_reason=answer.finish_reason)


class _Reading:
    """Reads a response as far as it is plain."""

    def __init__(self, response: aiohttp.ClientResponse, endpoint: Endpoint) -> None:
        tags = endpoint.model.profile.get("thinking_tags", DEFAULT_THINKING_TAGS)
        self.answer = PlainAnswer(tags)
        self._response = response
        self._stream = EventStream()
        self._lenient_end = endpoint.lenient_end
        self._is_at_end = False
        self._failure: type[httpx2.TransportError] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing that pydantic-ai would do about the answer."""
        has_reason = self._lenient_end or self.answer.finish_reason is not None
        return self._is_at_end and has_reason and self.answer.has_text

    async def deltas(self) -> AsyncGenerator[TextDelta | ReasoningDelta, None]:
        """The deltas up to the end of the answer, or up to what is not plain."""
        content = self._response.content
        if self._response.status != 200:
            return
        try:
            while data := await content.readany():
                events = self._stream.events(data)
                for number, event in enumerate(events):
                    try:
                        text = data_of(event)
                        if text.startswith("[DONE]"):
                            self._is_at_end = True
                            await self._drain()
                            return
                        deltas = self.answer.take(text) if text else ()
                    except Odd:
                        self._stream.give_back(events[number:])
                        return
                    for delta in deltas:
                        yield delta
            self._is_at_end = not self._stream.rest.strip()
        except Odd:
            return
        except _BROKEN as error:
            self._failure = _kind(error)

    async def _drain(self) -> None:
        """Reads the end of the body, after which another request may use the connection."""
        if self._response.connection is not None:
            with suppress(*_BROKEN):
                async with asyncio.timeout(DRAIN_SECONDS):
                    while await self._response.content.readany():
                        pass

    async def arrived(self) -> Arrived:
        """All of the response, for the SDK."""
        if self._response.status == 200:
            body = self.answer.replayed() + self._stream.rest
            return Arrived(body=body, more=self._more())
        headers = {
            name: value
            for name, value in self._response.headers.items()
            if name.lower() not in {"content-encoding", "content-length", "transfer-encoding"}
        }
        try:
            body = await self._response.read()
        except _BROKEN as error:
            return Arrived(failure=_kind(error))
        return Arrived(status=self._response.status, headers=headers, body=body)

    async def _more(self) -> AsyncIterator[bytes]:
        try:
            while not (self._failure or self._is_at_end) and (
                data := await self._response.content.readany()
            ):
                yield data
        except _BROKEN as error:
            self._failure = _kind(error)
        if self._failure is not None:
            raise self._failure("the connection broke")


def _kind(error: Exception) -> type[httpx2.TransportError]:
    """The error that the SDK's client has for the same."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            return httpx2.ConnectTimeout
        case TimeoutError():
            return httpx2.ReadTimeout
        case aiohttp.ClientConnectorError():
            return httpx2.ConnectError
        case aiohttp.ClientResponseError():
            return httpx2.RemoteProtocolError
        case _:
            return httpx2.ReadError
