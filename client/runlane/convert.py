"""Converts between the messages of `runlane.v1` and the records of `runlane.types`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from enum import StrEnum
from typing import Protocol, TypeAlias, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from runlane import inputs as i
from runlane import types as t
from runlane.arguments import build
from runlane.errors import Unsupported
from runlane.v1 import agent_service_pb2, run_pb2, run_service_pb2, session_pb2

Seconds: TypeAlias = float | timedelta
"""A duration given by a caller: seconds or a timedelta."""

EnumT = TypeVar("EnumT", bound=StrEnum)
ItemT = TypeVar("ItemT")


class _ProtoEnum(Protocol):
    def items(self) -> Sequence[tuple[str, int]]: ...


def _numbers(wrapper: _ProtoEnum, prefix: str, ours: type[EnumT]) -> dict[int, EnumT]:
    """Maps the numbers of a proto enum to the members of the same name."""
    members = {member.value: member for member in ours}
    names = {number: name.removeprefix(prefix).lower() for name, number in wrapper.items()}
    return {number: members[name] for number, name in names.items() if name in members}


_RUN_STATES = _numbers(run_pb2.RunState, "RUN_STATE_", t.RunState)
_WHEN_BUSY = _numbers(run_pb2.WhenBusy, "WHEN_BUSY_", t.WhenBusy)
_FINISH_REASONS = _numbers(run_pb2.FinishReason, "FINISH_REASON_", t.FinishReason)
_ROLES = _numbers(session_pb2.Role, "ROLE_", t.Role)
_ABILITIES = _numbers(agent_service_pb2.AgentAbility, "AGENT_ABILITY_", t.AgentAbility)


# --- To the wire ---------------------------------------------------------------------------------


def seconds(span: Seconds) -> float:
    """Returns a duration in seconds. Raises TypeError."""
    _check_span(span)
    return span.total_seconds() if isinstance(span, timedelta) else float(span)


def to_duration(span: Seconds | None) -> Duration | None:
    """Returns a duration as a proto message, in microsecond resolution. Raises TypeError."""
    if span is None:
        return None
    _check_span(span)
    duration = Duration()
    duration.FromTimedelta(span if isinstance(span, timedelta) else timedelta(seconds=span))
    return duration


def _check_span(span: object) -> None:
    if not isinstance(span, int | float | timedelta):
        name = type(span).__name__
        raise TypeError(f"timeout: expected seconds or a timedelta, not {name}")


def to_tuple(name: str, value: Iterable[ItemT]) -> tuple[ItemT, ...]:
    """Returns the items of an argument. Raises TypeError for a str, whose items are letters."""
    if isinstance(value, str):
        raise TypeError(f"{name}: expected a list, not a str; pass [{str(value)!r}]")
    return tuple(value)


def to_member(name: str, enum: type[EnumT], value: str) -> EnumT:
    """Returns an argument as a member of an enum; accepts its text. Raises ValueError."""
    choices = {each.value: each for each in enum if each.name != "UNKNOWN"}
    if value not in choices:
        meant = get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {meant[0]!r}?" if meant else ""
        raise ValueError(f"{name}: {str(value)!r} is not one of {', '.join(choices)}{hint}")
    return choices[value]


def to_run_state(state: t.RunState) -> run_pb2.RunState.ValueType:
    """Converts a state. Raises ValueError."""
    return run_pb2.RunState.Value(f"RUN_STATE_{to_member('states', t.RunState, state).name}")


def to_when_busy(when_busy: t.WhenBusy) -> run_pb2.WhenBusy.ValueType:
    """Converts a WhenBusy. Raises ValueError."""
    name = to_member("when_busy", t.WhenBusy, when_busy).name
    return run_pb2.WhenBusy.Value(f"WHEN_BUSY_{name}")


def to_scope(scope: t.CancelScope) -> run_service_pb2.CancelScope.ValueType:
    """Converts a scope. Raises ValueError."""
    name = to_member("scope", t.CancelScope, scope).name
    return run_service_pb2.CancelScope.Value(f"CANCEL_SCOPE_{name}")


def to_attachment(attachment: t.Attachment) -> run_pb2.Attachment:
    """Converts an attachment. Raises TypeError."""
    given: object = attachment
    if not isinstance(given, t.Attachment):
        raise TypeError(f"attachments: expected an Attachment, not {type(given).__name__}")
    name, mime_type = attachment.name, attachment.mime_type
    content: object = attachment.content
    if isinstance(content, bytes):
        return build(run_pb2.Attachment, name=name, mime_type=mime_type, data=content)
    if not isinstance(content, str):
        kind = type(content).__name__
        raise TypeError(f"content of an attachment: expected str or bytes, not {kind}")
    return build(run_pb2.Attachment, name=name, mime_type=mime_type, text=content)


def to_retry_policy(policy: t.RunRetryPolicy | None) -> run_pb2.RetryPolicy | None:
    """Converts a retry policy. Raises TypeError."""
    if policy is None:
        return None
    given: object = policy
    if not isinstance(given, t.RunRetryPolicy):
        raise TypeError(f"retry_policy: expected a RunRetryPolicy, not {type(given).__name__}")
    return build(
        run_pb2.RetryPolicy,
        reasons=to_tuple("reasons", policy.reasons),
        max_attempts=policy.max_attempts,
        initial_backoff=to_duration(policy.initial_backoff),
        max_backoff=to_duration(policy.max_backoff),
        after_output=policy.after_output,
    )


# --- From the wire -------------------------------------------------------------------------------


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(UTC)


def _labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    # A dict, because a mapping proxy can be neither pickled nor copied.
    return dict(labels)


def _finish_reason(number: int) -> t.FinishReason | None:
    if number == run_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    return _FINISH_REASONS.get(number, t.FinishReason.UNKNOWN)


def _run_state(number: int) -> t.RunState:
    return _RUN_STATES.get(number, t.RunState.UNKNOWN)


def usage(message: run_pb2.Usage) -> t.Usage:
    """Converts a usage."""
    return t.Usage(
        input_tokens=message.input_tokens,
        output_tokens=message.output_tokens,
        cache_read_tokens=message.cache_read_tokens,
        cache_write_tokens=message.cache_write_tokens,
        requests=message.requests,
    )


def run_complete(message: run_pb2.RunComplete) -> t.RunComplete:
    """Converts a terminal event."""
    error = t.RunError(message.error.reason, message.error.message)
    return t.RunComplete(
        session_id=message.session_id,
        run_id=message.run_id,
        accept_seq=message.accept_seq,
        state=_run_state(message.state),
        cancelled=message.cancelled,
        finish_reason=_finish_reason(message.finish_reason),
        error=error if message.HasField("error") else None,
        message_id=message.message_id or None,
        text=message.text,
        text_truncated=message.text_truncated,
        folded_into=message.folded_into or None,
        usage=usage(message.usage) if message.HasField("usage") else None,
        attempt=message.attempt,
        cancel_reason=message.cancel_reason,
        accepted_at=_time(message.accepted_at),
        started_at=_time(message.started_at) if message.HasField("started_at") else None,
        ended_at=_time(message.ended_at),
        result=message.result or None,
    )


def _retry_policy(message: run_pb2.RetryPolicy) -> t.RunRetryPolicy:
    return t.RunRetryPolicy(
        message.max_attempts,
        tuple(message.reasons),
        message.initial_backoff.ToTimedelta(),
        message.max_backoff.ToTimedelta(),
        message.after_output,
    )


def run(message: run_pb2.Run) -> t.Run:
    """Converts a run."""
    complete = run_complete(message.run_complete) if message.HasField("run_complete") else None
    return t.Run(
        session_id=message.session_id,
        run_id=message.run_id,
        accept_seq=message.accept_seq,
        state=_run_state(message.state),
        when_busy=_WHEN_BUSY.get(message.when_busy, t.WhenBusy.QUEUE),
        prompt_excerpt=message.prompt_excerpt,
        metadata=_labels(message.metadata),
        timeout=message.timeout.ToTimedelta() if message.HasField("timeout") else None,
        max_attempts=message.max_attempts,
        attempt=message.attempt,
        accepted_at=_time(message.accepted_at),
        started_at=_time(message.started_at) if message.HasField("started_at") else None,
        ended_at=_time(message.ended_at) if message.HasField("ended_at") else None,
        folded_into=message.folded_into or None,
        run_complete=complete,
        retry_policy=(
            _retry_policy(message.retry_policy) if message.HasField("retry_policy") else None
        ),
        agent=message.agent,
        last_event_index=message.last_event_index,
        revision=message.revision,
    )


def cancelled_run(message: run_pb2.CancelledRun) -> t.CancelledRun:
    """Converts a run covered by a cancel."""
    return t.CancelledRun(
        session_id=message.session_id,
        run_id=message.run_id,
        accept_seq=message.accept_seq,
        state_when_cancelled=_run_state(message.state_when_cancelled),
    )


def receipt(
    message: run_service_pb2.CancelResponse | run_service_pb2.SessionCancellation, session_id: str
) -> t.CancelReceipt:
    """Converts the receipt of a cancel for one session."""
    covered = tuple(cancelled_run(each) for each in message.cancelled)
    return t.CancelReceipt(
        session_id=session_id or (covered[0].session_id if covered else ""),
        cancelled=covered,
        fence_accept_seq=message.fence_accept_seq,
        unreadable=isinstance(message, run_service_pb2.SessionCancellation) and message.unreadable,
    )


def session(message: session_pb2.Session) -> t.Session:
    """Converts a session."""
    return t.Session(
        session_id=message.session_id,
        title=message.title,
        metadata=_labels(message.metadata),
        busy=message.busy,
        active_run_id=message.active_run_id or None,
        waiting_runs=message.waiting_runs,
        usage=usage(message.usage),
        created_at=_time(message.created_at),
        updated_at=_time(message.updated_at),
        agent=message.agent,
        etag=message.etag,
        origin=origin(message.origin) if message.HasField("origin") else None,
    )


def origin(message: session_pb2.SessionOrigin) -> t.SessionOrigin:
    """Converts the origin of a fork."""
    return t.SessionOrigin(message.session_id, message.turn)


def agent(message: agent_service_pb2.Agent) -> t.AgentInfo:
    """Converts an agent."""
    return t.AgentInfo(
        name=message.name,
        kind=message.kind,
        ready=message.ready,
        is_default=message.is_default,
        slots_in_use=message.slots_in_use,
        slots_limit=message.slots_limit if message.HasField("slots_limit") else None,
        can=tuple(_ABILITIES.get(ability, t.AgentAbility.UNKNOWN) for ability in message.can),
    )


def _tool_call(message: run_pb2.ToolCall) -> t.ToolCall:
    return t.ToolCall(message.tool_call_id, message.name, message.arguments_json)


def _tool_result(message: run_pb2.ToolResult) -> t.ToolResult:
    return t.ToolResult(message.tool_call_id, message.name, message.content, message.is_error)


def attachment(message: run_pb2.Attachment) -> t.Attachment:
    """Converts an attachment from a message."""
    content = message.data if message.WhichOneof("content") == "data" else message.text
    return t.Attachment(message.name, content, message.mime_type)


def run_prompt(response: run_service_pb2.GetRunResponse) -> t.RunPrompt:
    """Converts the prompt of a run. Raises Unsupported without one: the server is too old."""
    if not response.HasField("prompt"):
        raise Unsupported("with_prompt: the server does not return prompts; upgrade it")
    attachments = tuple(map(attachment, response.prompt.attachments))
    return t.RunPrompt(run(response.run), response.prompt.text, attachments)


def _artifact(message: run_pb2.Artifact) -> t.Artifact | None:
    """Converts an artifact; None for a kind of content unknown to this client."""
    kind = message.WhichOneof("content")
    if kind is None:
        return None
    return t.Artifact(
        message.artifact_id,
        message.name,
        message.mime_type,
        t.ArtifactKind(kind),
        getattr(message, kind),
        message.append,
        message.last,
    )


def part(message: session_pb2.Part) -> t.Part | None:  # noqa: PLR0911 - one per kind
    """Converts a part of a message; None for a kind unknown to this client."""
    match message.WhichOneof("part"):
        case "text":
            return t.Text(message.text)
        case "reasoning":
            return t.Reasoning(message.reasoning)
        case "tool_call":
            return _tool_call(message.tool_call)
        case "tool_result":
            return _tool_result(message.tool_result)
        case "attachment":
            return attachment(message.attachment)
        case "artifact":
            return _artifact(message.artifact)
        case "result":
            return t.Result(message.result)
        case _:
            return None


def message(message: session_pb2.Message) -> t.Message:
    """Converts a message of a transcript."""
    parts = (part(each) for each in message.parts)
    return t.Message(
        message_id=message.message_id,
        run_id=message.run_id,
        turn=message.turn,
        role=_ROLES.get(message.role, t.Role.UNKNOWN),
        parts=tuple(each for each in parts if each is not None),
        finish_reason=_finish_reason(message.finish_reason),
        model=message.model,
        created_at=_time(message.created_at),
        continues=message.continues,
    )


def _event_body(message: run_pb2.RunEvent) -> t.EventBody | None:  # noqa: C901, PLR0911, PLR0912 - one per kind
    match message.WhichOneof("event"):
        case "accepted":
            return t.Accepted(message.accepted.accept_seq)
        case "started":
            return t.Started(message.started.attempt)
        case "text_delta":
            return t.TextDelta(message.text_delta.text)
        case "reasoning_delta":
            return t.ReasoningDelta(message.reasoning_delta.text)
        case "tool_call":
            return _tool_call(message.tool_call)
        case "tool_result":
            return _tool_result(message.tool_result)
        case "artifact":
            return _artifact(message.artifact)
        case "custom":
            return t.Custom(message.custom.type, message.custom.json)
        case "step":
            return t.Step(message.step.key, message.step.result)
        case "updated":
            updated = message.updated
            when_busy = _WHEN_BUSY.get(updated.when_busy, t.WhenBusy.QUEUE)
            return t.Updated(updated.revision, updated.prompt_excerpt, when_busy)
        case "folded":
            return t.Folded(message.folded.run_id, message.folded.into_run_id)
        case "run_complete":
            return run_complete(message.run_complete)
        case _:
            return i.event_body(message)


def run_event(message: run_pb2.RunEvent) -> t.RunEvent | None:
    """Converts an event of a run; None for a kind unknown to this client."""
    body = _event_body(message)
    return None if body is None else t.RunEvent(message.index, _time(message.time), body)


def progress(message: run_service_pb2.SubscribeRunCompleteResponse) -> t.Progress:
    """Converts a progress mark."""
    return t.Progress(message.cursor, _time(message.progress.time))
