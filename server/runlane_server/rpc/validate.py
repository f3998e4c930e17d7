"""What requests have to be like: everything is checked before anything is done.

A function for each request: it returns what the call needs of it, in the terms of the domain, or
raises InvalidArgument with every violation. Where a request has a cursor or a page token, `read` is
what makes something of it; what it refuses is told along with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from runlane.v1 import run_pb2, run_service_pb2, session_service_pb2
from runlane_server.core.errors import SessionMissing
from runlane_server.core.limits import Limits, prompt_errors
from runlane_server.core.model import NO_LABELS, CancelScope, RunRequest, RunState, WhenBusy
from runlane_server.rpc import convert
from runlane_server.rpc.checks import (
    MAX_ATTEMPTS,
    MAX_NAME_BYTES,
    MAX_REASON_BYTES,
    MAX_TITLE_BYTES,
    Checks,
)
from runlane_server.store.base import EventFilter

Read = TypeVar("Read")


def run_accepted(request: run_service_pb2.RunAcceptedRequest, limits: Limits) -> RunRequest:
    """The run that is asked for; its run_id is empty where the server is to mint one."""
    checks = Checks()
    checks.session_id(request.session_id)
    checks.identifier("run_id", request.run_id)
    prompt = convert.prompt_from(request.prompt, request.attachments)
    for error in prompt_errors(prompt, limits):
        checks.include(error)
    _attachments(checks, request.attachments)
    when_busy = checks.known(
        "when_busy", request.when_busy, convert.WHEN_BUSY_FROM.get, WhenBusy.QUEUE
    )
    timeout = None
    if request.HasField("timeout"):
        timeout = checks.duration("timeout", request.timeout, zero=False)
    checks.between("max_attempts", request.max_attempts, 0, MAX_ATTEMPTS)
    metadata = dict(request.metadata) if request.metadata else NO_LABELS
    checks.labels("metadata", metadata)
    checks.done()
    return RunRequest(
        run_id=request.run_id,
        prompt=prompt,
        when_busy=when_busy,
        timeout=timeout,
        max_attempts=request.max_attempts or 1,
        metadata=metadata,
    )


def _attachments(checks: Checks, attachments: Sequence[run_pb2.Attachment]) -> None:
    checks.count("attachments", attachments)
    for n, sent in enumerate(attachments):
        checks.size(f"attachments[{n}].name", sent.name, MAX_NAME_BYTES)
        checks.mime_type(f"attachments[{n}].mime_type", sent.mime_type)
        if sent.WhichOneof("content") is None:
            checks.wrong(f"attachments[{n}]", "has neither text nor data")


def cancel(request: run_service_pb2.CancelRequest) -> CancelScope:
    """What a cancel is to cover: RUN where one run is named."""
    checks = Checks()
    if not (request.session_id or request.run_id):
        checks.wrong("session_id", "is missing, and so is run_id", SessionMissing)
    checks.identifier("session_id", request.session_id)
    checks.identifier("run_id", request.run_id)
    scope = checks.known(
        "scope", request.scope, convert.CANCEL_SCOPES_FROM.get, CancelScope.SESSION
    )
    if request.run_id and scope is not CancelScope.SESSION:
        checks.wrong("scope", "has to be unset or SESSION where a run_id is given")
    checks.size("reason", request.reason, MAX_REASON_BYTES)
    checks.done()
    return CancelScope.RUN if request.run_id else scope


def cancel_all(request: run_service_pb2.CancelAllRequest) -> None:
    """Checks a CancelAll."""
    checks = Checks()
    checks.size("reason", request.reason, MAX_REASON_BYTES)
    checks.done()


def subscribe_run_complete(
    request: run_service_pb2.SubscribeRunCompleteRequest, read: Callable[[], Read]
) -> tuple[EventFilter, Read]:
    """Which terminal events are wanted, and from where on: the cursor is for `read`."""
    checks = Checks()
    checks.identifiers("session_ids", request.session_ids)
    checks.identifiers("run_ids", request.run_ids)
    start = checks.done_with(read)
    return EventFilter(frozenset(request.session_ids), frozenset(request.run_ids)), start


def subscribe_run(request: run_service_pb2.SubscribeRunRequest) -> None:
    """Checks a SubscribeRun."""
    checks = Checks()
    checks.run_id(request.run_id)
    checks.between("after_index", request.after_index, 0)
    checks.done()


def wait_run(request: run_service_pb2.WaitRunRequest) -> float | None:
    """How long to wait, in seconds; None: until the run ends."""
    checks = Checks()
    checks.run_id(request.run_id)
    timeout = None
    if request.HasField("timeout"):
        timeout = checks.duration("timeout", request.timeout, zero=True) / 1_000_000
    checks.done()
    return timeout


def get_run(request: run_service_pb2.GetRunRequest) -> None:
    """Checks a GetRun."""
    checks = Checks()
    checks.run_id(request.run_id)
    checks.done()


@dataclass(frozen=True, slots=True)
class RunsWanted:
    """Which runs to list; `session_id` is None for those of all sessions."""

    session_id: str | None
    states: frozenset[RunState]
    page_size: int


def list_runs(
    request: run_service_pb2.ListRunsRequest, read: Callable[[RunsWanted], Read]
) -> tuple[RunsWanted, Read]:
    """Which runs to list, and from where on: the page token is for `read`."""
    checks = Checks()
    checks.identifier("session_id", request.session_id)
    checks.count("states", request.states)
    states = frozenset(
        checks.known(f"states[{n}]", state, convert.RUN_STATES_FROM.get, RunState.ACCEPTED)
        for n, state in enumerate(request.states)
    )
    page_size = checks.page_size(request.page_size)
    wanted = RunsWanted(request.session_id or None, states, page_size)
    return wanted, checks.done_with(lambda: read(wanted))


def create_session(request: session_service_pb2.CreateSessionRequest) -> None:
    """Checks a CreateSession."""
    checks = Checks()
    checks.identifier("session_id", request.session_id)
    checks.size("title", request.title, MAX_TITLE_BYTES)
    checks.labels("metadata", request.metadata)
    checks.done()


def session_id(
    request: session_service_pb2.GetSessionRequest | session_service_pb2.DeleteSessionRequest,
) -> None:
    """Checks a request that names a session and nothing else."""
    checks = Checks()
    checks.session_id(request.session_id)
    checks.done()


def list_sessions(
    request: session_service_pb2.ListSessionsRequest, read: Callable[[], Read]
) -> tuple[int, Read]:
    """How many sessions to list, and from where on: the page token is for `read`."""
    checks = Checks()
    page_size = checks.page_size(request.page_size)
    return page_size, checks.done_with(read)


def list_messages(
    request: session_service_pb2.ListMessagesRequest, read: Callable[[], Read]
) -> tuple[int, Read]:
    """How many messages to list, and from where on: the page token is for `read`."""
    checks = Checks()
    checks.session_id(request.session_id)
    page_size = checks.page_size(request.page_size)
    return page_size, checks.done_with(read)
