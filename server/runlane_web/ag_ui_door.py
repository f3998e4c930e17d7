"""The door for AG-UI: a POST starts a run, or answers the questions of one, and streams it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.types import Send

from runlane.client import Client, over
from runlane.errors import RunlaneError
from runlane.inputs import (
    Answer,
    Approval,
    InputKind,
    InputRequest,
    InputRequested,
    InputState,
)
from runlane.types import RunComplete
from runlane_web.ag_ui import Event, Rendering, failed
from runlane_web.decode import parse_object
from runlane_web.entry import Entry
from runlane_web.errors import invalid
from runlane_web.routes import not_allowed
from runlane_web.sse import LINE_END, PING, SEND_TIMEOUT

PATH = "/ag-ui"

MAX_BODY = 4 << 20


@dataclass(frozen=True, slots=True)
class _Begun:
    """A run to follow, after the events that the caller has from an earlier stream."""

    run_id: str
    after_index: int = 0


class AgUiDoor:
    """Serves AG-UI at one path."""

    def serves(self, path: str) -> bool:
        """Returns True if the path is that of AG-UI."""
        return path == PATH

    async def serve(self, request: Request, path: str, send: Send, entry: Entry) -> None:
        """Answers a request. Raises Refused, RunlaneError before it has begun to answer."""
        if request.method != "POST":
            raise not_allowed(request.method, "POST")
        token = entry.token(request.headers.get("authorization"))
        fields = parse_object(await entry.body(request, token, MAX_BODY))
        async with entry.place(token):
            calls, streams = map(over, await entry.wires(token))
            rendering = Rendering(_text(fields, "threadId"), _text(fields, "runId"))
            begun = await _begin(fields, rendering, calls)
            events = _events(begun, rendering, calls, streams)
            answer = EventSourceResponse(
                events,
                ping=PING,
                send_timeout=SEND_TIMEOUT,
                sep=LINE_END,
                headers={"Cache-Control": "no-store"},
            )
            await answer(request.scope, request.receive, send)

    async def start(self, entry: Entry) -> None:
        """Does nothing."""

    async def stop(self) -> None:
        """Does nothing."""


async def _begin(fields: Mapping[str, Any], rendering: Rendering, client: Client) -> _Begun:
    resume = fields.get("resume")
    if resume:
        return await _resume(resume, rendering, client)
    handle = await client.run_accepted(
        rendering.thread_id,
        _prompt(fields.get("messages")),
        run_id=rendering.run_id,
        allow_missing=True,
    )
    return _Begun(handle.run_id)


def _prompt(messages: Any) -> str:
    """The last message, which is the user's: the server has those before."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "user":
        raise invalid("messages", "must end with a message of the user")
    content = last.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        if any(part.get("type") != "text" for part in parts) or len(parts) != len(content):
            raise invalid("messages", "the last one must have text only")
        content = "\n\n".join(str(part.get("text", "")) for part in parts)
    if not isinstance(content, str):
        raise invalid("messages", "the last one must have text")
    return content


async def _resume(entries: Any, rendering: Rendering, client: Client) -> _Begun:
    pager = client.list_input_requests(session_id=rendering.thread_id, states=[InputState.OPEN])
    found = {request.input_request_id: request async for request in pager}
    if not isinstance(entries, list):
        raise invalid("resume", "must be a list")
    requests: list[tuple[InputRequest, Answer | None]] = []
    for n, entry in enumerate(entries):
        field = f"resume[{n}]"
        key = entry.get("interruptId") if isinstance(entry, dict) else None
        if not isinstance(key, str) or key not in found:
            raise invalid(f"{field}.interruptId", "is no open question of this thread")
        is_given_up = entry.get("status") == "cancelled"
        request = found[key]
        requests.append((request, None if is_given_up else _answer(request, entry, field)))
    if len({request.run_id for request, _ in requests}) != 1:
        raise invalid("resume", "must be about one run")
    run_id = requests[0][0].run_id
    begun = _Begun(run_id, (await client.get_run(run_id)).last_event_index)
    for request, answer in requests:
        if answer is None:
            await client.cancel(run_id=run_id, reason="AG-UI: the question was cancelled")
            break
        key = f"ag-ui:{rendering.run_id}:{request.input_request_id}"
        await client.answer_input(request, answer, answer_id=key)
    return begun


def _answer(request: InputRequest, entry: Mapping[str, Any], field: str) -> Answer:
    payload = entry.get("payload")
    if request.kind is InputKind.APPROVAL:
        approved = payload.get("approved") if isinstance(payload, dict) else payload
        if isinstance(approved, bool):
            reason = payload.get("reason", "") if isinstance(payload, dict) else ""
            return Approval(approved, reason=str(reason))
        raise invalid(f"{field}.payload", "must have approved, which is true or false")
    if request.kind is InputKind.FORM and isinstance(payload, dict):
        return payload
    if request.kind is not InputKind.FORM and isinstance(payload, str):
        return payload
    raise invalid(f"{field}.payload", "does not answer the question")


async def _events(
    begun: _Begun, rendering: Rendering, calls: Client, streams: Client
) -> AsyncIterator[ServerSentEvent]:
    yield _sse(rendering.begin())
    try:
        stream = streams.subscribe_run(begun.run_id, after_index=begun.after_index)
        async with stream as events:
            async for event in events:
                match event.body:
                    case InputRequested(request):
                        asked = await _open(calls, begun.run_id)
                        if request.input_request_id in {one.input_request_id for one in asked}:
                            for each in rendering.ask(asked):
                                yield _sse(each)
                            return
                    case RunComplete() as complete:
                        for each in rendering.end(complete):
                            yield _sse(each)
                    case _:
                        for each in rendering.render(event):
                            yield _sse(each)
    except RunlaneError as error:
        yield _sse(failed(error.message, error.reason))


async def _open(client: Client, run_id: str) -> list[InputRequest]:
    """The open questions: those of one commit come one after another as events."""
    pager = client.list_input_requests(run_id=run_id, states=[InputState.OPEN])
    return [request async for request in pager]


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise invalid(name, "must be a text")
    return value


def _sse(event: Event) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(event, ensure_ascii=False), sep=LINE_END)
