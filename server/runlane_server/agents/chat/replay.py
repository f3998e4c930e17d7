"""Lets the SDK of a provider read an answer that already began to arrive.

The request was sent without the SDK. If the answer is more than plain text, the SDK makes the same
request again, and gets what arrived for it instead of sending it: a failure, a status, or the text
so far followed by the rest of the stream. Every later request, such as a retry, is sent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import httpx2


@dataclass(slots=True)
class Arrived:
    """The outcome of a request: a failure before the answer, or an answer. Taken once.

    `more` raises an error of httpx2 if the connection breaks.
    """

    failure: type[httpx2.TransportError] | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    more: AsyncIterator[bytes] | None = None
    _is_taken: bool = False

    def take(self, request: httpx2.Request) -> httpx2.Response | None:
        """The response to the request; None if it was taken before. Raises the failure."""
        if self._is_taken:
            return None
        self._is_taken = True
        if self.failure is not None:
            raise self.failure("the connection failed", request=request)
        stream = _Stream(self.body, self.more)
        return httpx2.Response(self.status, headers=self.headers, stream=stream, request=request)


_ARRIVED: ContextVar[Arrived | None] = ContextVar("_ARRIVED", default=None)


def give(arrived: Arrived) -> None:
    """Lets the next request of this task, or of a task that it starts, get what arrived."""
    _ARRIVED.set(arrived)


class ReplayingClient(httpx2.AsyncClient):
    """A client that answers a request with what was given for it, and sends all others."""

    async def send(self, request: httpx2.Request, **kwargs: Any) -> httpx2.Response:
        """Sends the request, unless its answer has arrived."""
        arrived = _ARRIVED.get()
        response = None if arrived is None else arrived.take(request)
        return await super().send(request, **kwargs) if response is None else response


class _Stream(httpx2.AsyncByteStream):
    def __init__(self, begin: bytes, more: AsyncIterator[bytes] | None) -> None:
        self._begin = begin
        self._more = more

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._begin:
            yield self._begin
        if self._more is not None:
            async for data in self._more:
                yield data
