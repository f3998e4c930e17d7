"""Validation of requests, before anything is done.

One function per request returns its domain values or raises InvalidArgument with every violation.
`read` decodes a cursor or page token, so that its error is reported together with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from runlane.v1 import run_pb2, run_service_pb2, session_service_pb2
from runlane_server.core.errors import SessionMissing
from runlane_server.core.limits import Limits, prompt_errors
from runlane_server.core.model import NO_LABELS, CancelScope, RunRequest, WhenBusy
from runlane_server.core.retry import DEFAULT_INITIAL_BACKOFF, DEFAULT_MAX_BACKOFF, RetryPolicy
from runlane_server.rpc import convert
from runlane_server.rpc.checks import (
    MAX_ATTEMPTS,
    MAX_CANCELLED,
    MAX_LABELS,
    MAX_NAME_BYTES,
    MAX_REASON_BYTES,
    MAX_RETRY_REASON_BYTES,
    MAX_RETRY_REASONS,
    MAX_TITLE_BYTES,
    Checks,
)
from runlane_server.store.base import EventFilter

ReadT = TypeVar("ReadT")


def run_accepted(request: run_service_pb2.RunAcceptedRequest, limits: Limits) -> RunRequest:
    """Returns the requested run; its run_id is empty if the server is to mint one."""
    checks = Checks()
    checks.session_id(request.session_id)
    checks.identifier("run_id", request.run_id)
    checks.identifier("expected_active_run_id", request.expected_active_run_id)
    # Each access to a field of a message takes time, and most accepts have neither.
    attachments, labels = request.attachments, request.metadata
    checks.count("attachments", attachments)
    checks.count("metadata", labels, MAX_LABELS)
    prompt = convert.prompt_from(request.prompt, attachments)
    for error in prompt_errors(prompt, limits):
        checks.include(error)
    if attachments:
        check_attachments(checks, attachments)
    when_busy = checks.enum(
        "when_busy", request.when_busy, convert.WHEN_BUSY_FROM.get, WhenBusy.QUEUE
    )
    timeout = None
    if request.HasField("timeout"):
        timeout = checks.duration("timeout", request.timeout, zero=False)
    checks.between("max_attempts", request.max_attempts, 0, MAX_ATTEMPTS)
    metadata = NO_LABELS
    if labels:
        metadata = dict(labels)
        checks.labels("metadata", metadata)
    checks.agent("agent", request.agent)
    retry = None
    if request.HasField("retry_policy"):
        retry = _retry_policy(checks, request.retry_policy)
    checks.finish()
    return RunRequest(
        run_id=request.run_id,
        prompt=prompt,
        when_busy=when_busy,
        timeout=timeout,
        max_attempts=request.max_attempts or 1,
        metadata=metadata,
        agent=request.agent,
        retry=retry,
        expected_active=request.expected_active_run_id,
    )


def _retry_policy(checks: Checks, sent: run_pb2.RetryPolicy) -> RetryPolicy:
    field = "retry_policy"
    checks.count(f"{field}.reasons", sent.reasons, MAX_RETRY_REASONS)
    for n, reason in enumerate(sent.reasons):
        checks.size(f"{field}.reasons[{n}]", reason, MAX_RETRY_REASON_BYTES)
        if not reason:
            checks.reject(f"{field}.reasons[{n}]", "is empty")
    checks.between(f"{field}.max_attempts", sent.max_attempts, 2, MAX_ATTEMPTS)
    initial, longest = DEFAULT_INITIAL_BACKOFF, DEFAULT_MAX_BACKOFF
    if sent.HasField("initial_backoff"):
        initial = checks.duration(f"{field}.initial_backoff", sent.initial_backoff, zero=True)
        longest = max(longest, initial)
    if sent.HasField("max_backoff"):
        longest = checks.duration(f"{field}.max_backoff", sent.max_backoff, zero=True)
        if longest < initial:
            checks.reject(f"{field}.max_backoff", "is less than initial_backoff")
    return RetryPolicy(
        tuple(sorted(set(sent.reasons))), sent.max_attempts, initial, longest, sent.after_output
    )


def check_attachments(checks: Checks, attachments: Sequence[run_pb2.Attachment]) -> None:
    """Names, media types and presence of attachments; their size is checked with the prompt."""
    for n, sent in enumerate(attachments):
        checks.size(f"attachments[{n}].name", sent.name, MAX_NAME_BYTES)
        checks.mime_type(f"attachments[{n}].mime_type", sent.mime_type)
        if sent.WhichOneof("content") is None:
            checks.reject(f"attachments[{n}]", "has neither text nor data")


def cancel(request: run_service_pb2.CancelRequest) -> CancelScope:
    """Returns the scope of a cancel; RUN if the request has a run_id."""
    checks = Checks()
    if not (request.session_id or request.run_id):
        checks.reject("session_id", "is required unless run_id is given", SessionMissing)
    checks.identifier("session_id", request.session_id)
    checks.identifier("run_id", request.run_id)
    scope = checks.enum("scope", request.scope, convert.CANCEL_SCOPES_FROM.get, CancelScope.SESSION)
    if request.run_id and scope is not CancelScope.SESSION:
        checks.reject("scope", "must be unset or SESSION if a run_id is given")
    checks.size("reason", request.reason, MAX_REASON_BYTES)
    checks.finish()
    return CancelScope.RUN if request.run_id else scope


def cancel_all(request: run_service_pb2.CancelAllRequest) -> None:
    checks = Checks()
    checks.size("reason", request.reason, MAX_REASON_BYTES)
    checks.finish()


def cancel_page(
    request: run_service_pb2.CancelAllRequest, read: Callable[[], ReadT]
) -> tuple[int, ReadT]:
    """Returns the number of runs to cancel, and the place that `read` decodes."""
    checks = Checks()
    checks.size("reason", request.reason, MAX_REASON_BYTES)
    if request.page_token and not request.page_size:
        checks.reject("page_size", "is missing; page_token requires it")
    checks.between("page_size", request.page_size, 0)
    return min(request.page_size, MAX_CANCELLED), checks.finish_with(read)


def subscribe_run_complete(
    request: run_service_pb2.SubscribeRunCompleteRequest, read: Callable[[], ReadT]
) -> tuple[EventFilter, ReadT]:
    """Returns the filter and the start of a subscription, whose cursor `read` decodes."""
    checks = Checks()
    checks.identifiers("session_ids", request.session_ids)
    checks.identifiers("run_ids", request.run_ids)
    start = checks.finish_with(read)
    return EventFilter(frozenset(request.session_ids), frozenset(request.run_ids)), start


def subscribe_run(request: run_service_pb2.SubscribeRunRequest) -> None:
    checks = Checks()
    checks.run_id(request.run_id)
    checks.between("after_index", request.after_index, 0)
    checks.finish()


def wait_run(request: run_service_pb2.WaitRunRequest) -> float | None:
    """Returns the timeout in seconds; None: wait until the run ends."""
    checks = Checks()
    checks.run_id(request.run_id)
    timeout = None
    if request.HasField("timeout"):
        timeout = checks.duration("timeout", request.timeout, zero=True) / 1_000_000
    checks.finish()
    return timeout


def get_run(request: run_service_pb2.GetRunRequest) -> None:
    checks = Checks()
    checks.run_id(request.run_id)
    checks.finish()


def create_session(request: session_service_pb2.CreateSessionRequest) -> None:
    checks = Checks()
    checks.identifier("session_id", request.session_id)
    checks.size("title", request.title, MAX_TITLE_BYTES)
    checks.labels("metadata", request.metadata)
    checks.agent("agent", request.agent)
    checks.finish()


def fork_session(request: session_service_pb2.ForkSessionRequest) -> None:
    checks = Checks()
    checks.session_id(request.session_id)
    checks.identifier("new_session_id", request.new_session_id)
    if request.new_session_id and request.new_session_id == request.session_id:
        checks.reject("new_session_id", "is session_id; use another id, or leave it empty")
    checks.between("at_turn", request.at_turn, 0)
    checks.finish()


def session_id(
    request: session_service_pb2.GetSessionRequest | session_service_pb2.DeleteSessionRequest,
) -> None:
    """Validates a request with nothing but a session_id."""
    checks = Checks()
    checks.session_id(request.session_id)
    checks.finish()


def subscribe_session(
    request: session_service_pb2.SubscribeSessionRequest,
    read: Callable[[Sequence[str]], ReadT],
) -> ReadT:
    """Returns the positions of the sessions, which `read` decodes."""
    checks = Checks()
    if not request.session_ids:
        checks.reject("session_ids", "is empty; name at least one session", SessionMissing)
    checks.identifiers("session_ids", request.session_ids)
    checks.count("cursors", request.cursors)
    return checks.finish_with(lambda: read(request.session_ids))


def list_messages(
    request: session_service_pb2.ListMessagesRequest, read: Callable[[], ReadT]
) -> tuple[int, ReadT]:
    """Returns the size and the place of a page, whose token `read` decodes."""
    checks = Checks()
    checks.session_id(request.session_id)
    checks.identifier("run_id", request.run_id)
    checks.between("latest_turns", request.latest_turns, 0)
    page_size = checks.page_size(request.page_size)
    return page_size, checks.finish_with(read)
