"""The door for AG-UI: a POST starts a run, or answers the questions of one, and streams it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.types import Send

from runlane.client import Client, over
from runlane.errors import RunlaneError
from runlane.inputs import (
    Answer,
    Approval,
    InputAnswered,
    InputKind,
    InputRequest,
    InputRequested,
    InputState,
    InputWithdrawn,
)
from runlane.run_events import RunEvents
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
    """A run to follow, after the events that the caller has from an earlier stream.

    Attributes:
        run_id: The run.
        after_index: The last event that the caller has.
        asked: The questions that the caller has got and did not answer.
        answered: Questions that were answered before by the same call, whose response was lost:
            what comes after the first of these answers is sent again.
    """

    run_id: str
    after_index: int = 0
    asked: frozenset[str] = frozenset()
    answered: frozenset[str] = frozenset()


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
    if not isinstance(entries, list):
        raise invalid("resume", "must be a list")
    keys = [entry.get("interruptId") if isinstance(entry, dict) else None for entry in entries]
    found = await _asked(keys, rendering, client)
    requests: list[tuple[InputRequest, Answer | None]] = []
    digests: dict[str, str] = {}
    for n, (key, entry) in enumerate(zip(keys, entries, strict=True)):
        field = f"resume[{n}]"
        if not isinstance(key, str) or key not in found:
            raise invalid(f"{field}.interruptId", "is no open question of this thread")
        is_given_up = entry.get("status") == "cancelled"
        request = found[key]
        requests.append((request, None if is_given_up else _answer(request, entry, field)))
        digests[key] = _digest(request, entry, field)
    if len({request.run_id for request, _ in requests}) != 1:
        raise invalid("resume", "must be about one run")
    run_id = requests[0][0].run_id
    begun = await _begin_again(run_id, [request for request, _ in requests], client)
    for request, answer in requests:
        if answer is None:
            await client.cancel(run_id=run_id, reason="AG-UI: the question was cancelled")
            break
        await client.answer_input(
            replace(request, question_digest=digests[request.input_request_id]),
            answer,
            answer_id=_answer_id(rendering, request),
        )
    return begun


async def _asked(
    keys: Iterable[Any], rendering: Rendering, client: Client
) -> dict[str, InputRequest]:
    """The questions of a thread that a call may be about: open ones, and those that it has answered
    or given up before, if its response was lost."""
    thread = rendering.thread_id
    pager = client.list_input_requests(session_id=thread, states=[InputState.OPEN])
    found = {request.input_request_id: request async for request in pager}
    if found.keys() >= set(keys):
        return found
    closed = [InputState.ANSWERED, InputState.WITHDRAWN]
    async for request in client.list_input_requests(session_id=thread, states=closed):
        answer = request.answer
        if answer is None or answer.answer_id == _answer_id(rendering, request):
            found[request.input_request_id] = request
    return found


async def _begin_again(run_id: str, requests: Iterable[InputRequest], client: Client) -> _Begun:
    # The index is read first: a question that comes after it is an event of the stream.
    index = (await client.get_run(run_id)).last_event_index
    asked = {request.input_request_id for request in await _open(client, run_id)}
    asked -= {request.input_request_id for request in requests}
    closed = {each.input_request_id for each in requests if each.state is not InputState.OPEN}
    return _Begun(run_id, 0 if closed else index, frozenset(asked), frozenset(closed))


def _answer_id(rendering: Rendering, request: InputRequest) -> str:
    """The idempotency key of an answer: the same call again gives the same answer."""
    return f"ag-ui:{rendering.run_id}:{request.input_request_id}"


def _digest(request: InputRequest, entry: Mapping[str, Any], field: str) -> str:
    """The digest that an answer names. Of an approval it is what the caller sends, if anything,
    because only the caller knows what the person saw."""
    if request.kind is not InputKind.APPROVAL:
        return request.question_digest
    payload = entry.get("payload")
    found = payload.get("questionDigest", "") if isinstance(payload, dict) else ""
    if not isinstance(found, str):
        raise invalid(f"{field}.payload.questionDigest", "must be a string")
    return found


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
            asked: AbstractSet[str] = begun.asked
            if begun.answered:
                asked = await _skip_to_answer(events, begun.answered)
            if found := await _open(calls, begun.run_id, asked):
                for each in rendering.ask(found):
                    yield _sse(each)
                return
            async with aclosing(_render(events, begun.run_id, rendering, calls)) as rendered:
                async for each in rendered:
                    yield _sse(each)
    except RunlaneError as error:
        yield _sse(failed(error.message, error.reason))


async def _render(
    events: RunEvents, run_id: str, rendering: Rendering, calls: Client
) -> AsyncGenerator[Event, None]:
    """Yields what happens until the run ends or asks people."""
    async for event in events:
        match event.body:
            case InputRequested(request):
                if found := await _open(calls, run_id, {request.input_request_id}):
                    for each in rendering.ask(found):
                        yield each
                    return
            case RunComplete() as complete:
                for each in rendering.end(complete):
                    yield each
            case _:
                for each in rendering.render(event):
                    yield each


async def _skip_to_answer(events: RunEvents, answered: AbstractSet[str]) -> set[str]:
    """Skips what the caller got before it answered; returns the questions among it."""
    asked: set[str] = set()
    async for event in events:
        match event.body:
            case InputRequested(request):
                asked.add(request.input_request_id)
            case InputAnswered(key) | InputWithdrawn(key) if key in answered:
                break
            case _:
                pass
    return asked


async def _open(
    client: Client, run_id: str, asked: AbstractSet[str] | None = None
) -> list[InputRequest]:
    """The open questions: those of one commit come one after another as events.

    Empty if none of those in `asked` is open.
    """
    if asked is not None and not asked:
        return []
    pager = client.list_input_requests(run_id=run_id, states=[InputState.OPEN])
    found = [request async for request in pager]
    if asked is not None and not any(each.input_request_id in asked for each in found):
        return []
    return found


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise invalid(name, "must be a text")
    return value


def _sse(event: Event) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(event, ensure_ascii=False), sep=LINE_END)
