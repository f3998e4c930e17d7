"""Streams as server-sent events, resumed by the header `Last-Event-ID`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from runlane.errors import CursorCompacted, RunlaneError, Unavailable
from runlane_web.errors import Refused, from_error, invalid, to_json, to_response
from runlane_web.grants import expired
from runlane_web.routes import Route
from runlane_web.upstream import Upstream

ResultT = TypeVar("ResultT")

PATIENCE = 1.0
"""Seconds that a new stream may stay silent before its answer begins. An error that comes until
then has its own HTTP code; a later one is an event."""

PING = 15
"""Seconds between two comments on a silent stream, which keep proxies from closing it."""

SEND_TIMEOUT = 60.0
"""Seconds after which a reader that takes nothing is disconnected; it may resume later."""


def event_id(route: Route, message: Message) -> str | None:
    """The id of an event: what a request resumes after; None if it is no position."""
    value: Any = message
    for name in route.event_id.split("."):
        value = getattr(value, name)
    # A mark of an idle stream has neither an index nor, if it is of sessions, a cursor.
    return str(value) if value else None


def event_name(message: Message) -> str:
    """The name of an event: the field of `oneof event` that is set, such as `run_complete`."""
    name = message.WhichOneof("event") if "event" in message.DESCRIPTOR.oneofs_by_name else None
    if name is None and "progress" in message.DESCRIPTOR.fields_by_name:
        name = "progress" if message.HasField("progress") else None
    if name is None and hasattr(message, "event"):
        return event_name(message.event)
    return name or "message"


def resume_after(route: Route, request: Message, last_event_id: str) -> None:
    """Sets the position from which a stream resumes. Raises Refused."""
    field = route.rpc.input_type.fields_by_name[route.resume]
    if field.is_repeated:
        del getattr(request, route.resume)[:]
        getattr(request, route.resume).append(last_event_id)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        setattr(request, route.resume, last_event_id)
    elif last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) <= 18:
        setattr(request, route.resume, int(last_event_id))
    else:
        raise invalid("Last-Event-ID", "must be the id of an event of this stream")


LINE_END = "\n"
"""Terminals show a stream with it as it is; readers take any."""


class EventStream:
    """One stream of events for one HTTP request.

    Args:
        upstream: The server.
        route: The route.
        request: The request; changed in place as events pass.
        resumed: True if the caller resumes an earlier stream. It then waits for a server that is
            away, since a browser gives up after an answer that is an error.
        seconds: For how long the caller may read, from now; None: the server decides.
    """

    def __init__(
        self,
        upstream: Upstream,
        route: Route,
        request: Message,
        *,
        resumed: bool,
        seconds: float | None = None,
    ) -> None:
        self._route = route
        self._request = request
        self._patient = resumed
        self._until = None if seconds is None else _now() + seconds
        self._stream = upstream.follow(route, request, self._lost)
        self._first = asyncio.create_task(self._stream.read())

    async def response(self) -> Response:
        """Waits for the first message or error, and returns the answer that fits.

        Raises Refused if the caller may read no longer.
        """
        left = PATIENCE if self._until is None else max(0.0, self._until - _now())
        try:
            done, _ = await asyncio.wait({self._first}, timeout=min(PATIENCE, left))
        except asyncio.CancelledError:
            self.close()
            raise
        if done and (error := self._first.exception()) is not None:
            if not isinstance(error, RunlaneError):
                raise error
            if not isinstance(error, CursorCompacted):
                return to_response(from_error(error))
        elif done and self._first.result() is None and not self._route.endless:
            # A browser reconnects after the end of a stream, except after this code.
            return Response(status_code=204)
        self._check_time()
        self._patient = True
        return EventSourceResponse(
            self._events(),
            ping=PING,
            send_timeout=SEND_TIMEOUT,
            sep=LINE_END,
            headers={"Cache-Control": "no-store"},
        )

    def close(self) -> None:
        """Ends the stream."""
        self._first.cancel()
        self._stream.cancel_call()

    async def _events(self) -> AsyncIterator[ServerSentEvent]:
        try:
            async for message in self._messages():
                data = json_format.MessageToJson(message, indent=None, ensure_ascii=False)
                yield _event(event_name(message), data, event_id(self._route, message))
        except CursorCompacted as error:
            # Its id is the oldest position, so a reader that reconnects continues from there.
            oldest = error.oldest_cursor
            yield _event("cursor_compacted", to_json(from_error(error)), oldest)
        except RunlaneError as error:
            yield _event("error", to_json(from_error(error)))
        except Refused as error:
            # A browser reconnects once, and gives up after the answer, which is an error then.
            yield _event("error", to_json(error.status))
        finally:
            self.close()

    async def _messages(self) -> AsyncIterator[Message]:
        message = await self._in_time(lambda: self._first)
        while True:
            if message is not None:
                position = event_id(self._route, message)
                if position is not None:
                    resume_after(self._route, self._request, position)
                yield message
            elif self._route.endless:
                await self._in_time(self._reconnect)
            else:
                return
            message = await self._in_time(self._stream.read)

    async def _reconnect(self) -> None:
        await self._stream.pause_or_raise(Unavailable("the server ended the stream"))

    async def _in_time(self, wait: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Waits while the caller may read. Raises Refused after that."""
        # A read that has its message already does not notice that its time is over.
        self._check_time()
        time = asyncio.timeout_at(self._until)
        try:
            async with time:
                return await wait()
        except TimeoutError:
            if not time.expired():
                raise
            raise expired() from None

    def _check_time(self) -> None:
        if self._until is not None and _now() >= self._until:
            raise expired()

    def _lost(self, error: RunlaneError) -> None:
        if not self._patient:
            raise error


def _now() -> float:
    return asyncio.get_running_loop().time()


def _event(name: str, data: str, event_id: str | None = None) -> ServerSentEvent:
    return ServerSentEvent(event=name, id=event_id, data=data, sep=LINE_END)
