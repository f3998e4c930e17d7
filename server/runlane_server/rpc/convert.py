"""Between the records of the domain and the messages on the wire: tables and plain functions.

What a caller sends is checked by `rpc.validate` before it is converted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from runlane.v1 import run_pb2, run_service_pb2, session_pb2
from runlane_server.core import model
from runlane_server.core.model import (
    CancelScope,
    FinishReason,
    Micros,
    Role,
    RunState,
    WhenBusy,
)
from runlane_server.core.transition import Receipt

_SECOND = 1_000_000

# --- Enums --------------------------------------------------------------------------------------

RUN_STATES: Mapping[RunState, run_pb2.RunState.ValueType] = MappingProxyType(
    {
        RunState.ACCEPTED: run_pb2.RUN_STATE_ACCEPTED,
        RunState.QUEUED: run_pb2.RUN_STATE_QUEUED,
        RunState.ACTIVE: run_pb2.RUN_STATE_ACTIVE,
        RunState.FOLDED: run_pb2.RUN_STATE_FOLDED,
        RunState.CANCELLING: run_pb2.RUN_STATE_CANCELLING,
        RunState.COMPLETED: run_pb2.RUN_STATE_COMPLETED,
        RunState.CANCELLED: run_pb2.RUN_STATE_CANCELLED,
        RunState.FAILED: run_pb2.RUN_STATE_FAILED,
    }
)

WHEN_BUSY: Mapping[WhenBusy, run_pb2.WhenBusy.ValueType] = MappingProxyType(
    {
        WhenBusy.QUEUE: run_pb2.WHEN_BUSY_QUEUE,
        WhenBusy.FOLD: run_pb2.WHEN_BUSY_FOLD,
        WhenBusy.REJECT: run_pb2.WHEN_BUSY_REJECT,
        WhenBusy.INTERRUPT: run_pb2.WHEN_BUSY_INTERRUPT,
    }
)

CANCEL_SCOPES: Mapping[CancelScope, run_service_pb2.CancelScope.ValueType] = MappingProxyType(
    {
        CancelScope.SESSION: run_service_pb2.CANCEL_SCOPE_SESSION,
        CancelScope.ACTIVE: run_service_pb2.CANCEL_SCOPE_ACTIVE,
        CancelScope.WAITING: run_service_pb2.CANCEL_SCOPE_WAITING,
    }
)
"""CancelScope.RUN has no value of its own on the wire: there it is said by giving a run_id."""

FINISH_REASONS: Mapping[FinishReason, run_pb2.FinishReason.ValueType] = MappingProxyType(
    {
        FinishReason.STOP: run_pb2.FINISH_REASON_STOP,
        FinishReason.LENGTH: run_pb2.FINISH_REASON_LENGTH,
        FinishReason.CONTENT_FILTER: run_pb2.FINISH_REASON_CONTENT_FILTER,
        FinishReason.TOOL_CALLS: run_pb2.FINISH_REASON_TOOL_CALLS,
        FinishReason.CANCELED: run_pb2.FINISH_REASON_CANCELED,
        FinishReason.ERROR: run_pb2.FINISH_REASON_ERROR,
        FinishReason.TIMEOUT: run_pb2.FINISH_REASON_TIMEOUT,
        FinishReason.INTERRUPTED: run_pb2.FINISH_REASON_INTERRUPTED,
    }
)

ROLES: Mapping[Role, session_pb2.Role.ValueType] = MappingProxyType(
    {
        Role.USER: session_pb2.ROLE_USER,
        Role.ASSISTANT: session_pb2.ROLE_ASSISTANT,
        Role.TOOL: session_pb2.ROLE_TOOL,
    }
)

# The other way round. Keyed by int: proto3 lets any number through, known or not.

RUN_STATES_FROM: Mapping[int, RunState] = {value: state for state, value in RUN_STATES.items()}

WHEN_BUSY_FROM: Mapping[int, WhenBusy] = {
    run_pb2.WHEN_BUSY_UNSPECIFIED: WhenBusy.QUEUE,
    **{value: when_busy for when_busy, value in WHEN_BUSY.items()},
}

CANCEL_SCOPES_FROM: Mapping[int, CancelScope] = {
    run_service_pb2.CANCEL_SCOPE_UNSPECIFIED: CancelScope.SESSION,
    **{value: scope for scope, value in CANCEL_SCOPES.items()},
}

# --- Times --------------------------------------------------------------------------------------


def timestamp(at: Micros) -> Timestamp:
    """A point in time, exactly: no float on the way."""
    seconds, micros = divmod(at, _SECOND)
    return Timestamp(seconds=seconds, nanos=micros * 1000)


def _timestamp(at: Micros | None) -> Timestamp | None:
    return None if at is None else timestamp(at)


def duration(length: Micros) -> Duration:
    """A length of time; not negative."""
    seconds, micros = divmod(length, _SECOND)
    return Duration(seconds=seconds, nanos=micros * 1000)


def micros(length: Duration) -> Micros:
    """A length of time, rounded up to a whole microsecond: what is more than nothing stays so."""
    return length.seconds * _SECOND - (-length.nanos // 1000)


# --- What callers send --------------------------------------------------------------------------


def attachment_from(sent: run_pb2.Attachment) -> model.Attachment:
    """An attachment; a media type that was left out is that of its kind of content."""
    if sent.WhichOneof("content") == "data":
        mime_type = sent.mime_type or "application/octet-stream"
        return model.Attachment(sent.name, mime_type, sent.data)
    return model.Attachment(sent.name, sent.mime_type or "text/plain", sent.text)


def prompt_from(text: str, attachments: Iterable[run_pb2.Attachment]) -> model.Prompt:
    """A prompt."""
    return model.Prompt(text, tuple(attachment_from(sent) for sent in attachments))


# --- What callers get ---------------------------------------------------------------------------


def attachment(held: model.Attachment) -> run_pb2.Attachment:
    """An attachment."""
    if isinstance(held.content, bytes):
        return run_pb2.Attachment(name=held.name, mime_type=held.mime_type, data=held.content)
    return run_pb2.Attachment(name=held.name, mime_type=held.mime_type, text=held.content)


def usage(held: model.Usage) -> run_pb2.Usage:
    """What a turn, or a session, cost."""
    return run_pb2.Usage(
        input_tokens=held.input_tokens,
        output_tokens=held.output_tokens,
        cache_read_tokens=held.cache_read_tokens,
        cache_write_tokens=held.cache_write_tokens,
        requests=held.requests,
    )


def run_error(held: model.RunError) -> run_pb2.RunError:
    """Why a run failed."""
    return run_pb2.RunError(reason=held.reason, message=held.message)


def run_complete(held: model.RunComplete) -> run_pb2.RunComplete:
    """A terminal event."""
    return run_pb2.RunComplete(
        session_id=held.session_id,
        run_id=held.run_id,
        accept_seq=held.accept_seq,
        state=RUN_STATES[held.state],
        cancelled=held.cancelled,
        finish_reason=FINISH_REASONS[held.finish_reason],
        error=None if held.error is None else run_error(held.error),
        message_id=held.message_id,
        text=held.text,
        text_truncated=held.text_truncated,
        folded_into=held.folded_into,
        usage=None if held.folded_into else usage(held.usage),
        attempt=held.attempt,
        cancel_reason=held.cancel_reason,
        accepted_at=timestamp(held.accepted_at),
        started_at=_timestamp(held.started_at),
        ended_at=timestamp(held.ended_at),
    )


def run(held: model.Run) -> run_pb2.Run:
    """A run."""
    return run_pb2.Run(
        session_id=held.session_id,
        run_id=held.run_id,
        accept_seq=held.accept_seq,
        state=RUN_STATES[held.state],
        when_busy=WHEN_BUSY[held.when_busy],
        prompt_excerpt=held.prompt_excerpt,
        metadata=held.metadata or None,
        timeout=None if held.timeout is None else duration(held.timeout),
        max_attempts=held.max_attempts,
        attempt=held.attempt,
        accepted_at=timestamp(held.accepted_at),
        started_at=_timestamp(held.started_at),
        ended_at=_timestamp(held.ended_at),
        folded_into=held.folded_into,
        run_complete=None if held.complete is None else run_complete(held.complete),
    )


def session(held: model.Session) -> session_pb2.Session:
    """A session."""
    return session_pb2.Session(
        session_id=held.session_id,
        title=held.title,
        metadata=held.metadata,
        busy=held.busy,
        active_run_id=held.active_run_id,
        waiting_runs=held.waiting_runs,
        usage=usage(held.usage),
        created_at=timestamp(held.created_at),
        updated_at=timestamp(held.updated_at),
    )


def cancelled_runs(receipt: Receipt) -> list[run_pb2.CancelledRun]:
    """The runs that a cancel covered in one session."""
    return [
        run_pb2.CancelledRun(
            session_id=receipt.session_id,
            run_id=covered.run_id,
            accept_seq=covered.accept_seq,
            state_when_cancelled=RUN_STATES[covered.state],
        )
        for covered in receipt.cancelled
    ]


def tool_call(held: model.ToolCall) -> run_pb2.ToolCall:
    """A call of a tool."""
    return run_pb2.ToolCall(
        tool_call_id=held.tool_call_id, name=held.name, arguments_json=held.arguments_json
    )


def tool_result(held: model.ToolResult) -> run_pb2.ToolResult:
    """What a tool answered."""
    return run_pb2.ToolResult(
        tool_call_id=held.tool_call_id,
        name=held.name,
        content=held.content,
        is_error=held.is_error,
    )


def part(held: model.Part) -> session_pb2.Part:
    """A part of a message."""
    match held:
        case model.Text(text):
            return session_pb2.Part(text=text)
        case model.Reasoning(text):
            return session_pb2.Part(reasoning=text)
        case model.ToolCall():
            return session_pb2.Part(tool_call=tool_call(held))
        case model.ToolResult():
            return session_pb2.Part(tool_result=tool_result(held))
        case model.Attachment():
            return session_pb2.Part(attachment=attachment(held))


def message_head(held: model.Message) -> session_pb2.Message:
    """A message of a transcript without its parts, which may not all fit into one response."""
    return session_pb2.Message(
        message_id=held.message_id,
        run_id=held.run_id,
        role=ROLES[held.role],
        finish_reason=(
            FINISH_REASONS[held.finish_reason]
            if held.finish_reason
            else run_pb2.FINISH_REASON_UNSPECIFIED
        ),
        model=held.model,
        created_at=timestamp(held.created_at),
        turn=held.turn,
    )


def run_event(held: model.RunEvent) -> run_pb2.RunEvent:
    """One thing that happened in a run."""
    event = run_pb2.RunEvent(index=held.index, time=timestamp(held.at))
    match held.body:
        case model.Accepted(accept_seq):
            event.accepted.accept_seq = accept_seq
        case model.Started(attempt):
            event.started.attempt = attempt
        case model.TextDelta(text):
            event.text_delta.text = text
        case model.ReasoningDelta(text):
            event.reasoning_delta.text = text
        case model.ToolCall() as call:
            event.tool_call.CopyFrom(tool_call(call))
        case model.ToolResult() as result:
            event.tool_result.CopyFrom(tool_result(result))
        case model.Folded(run_id, into_run_id):
            event.folded.CopyFrom(run_pb2.RunEvent.Folded(run_id=run_id, into_run_id=into_run_id))
        case model.RunComplete() as complete:
            event.run_complete.CopyFrom(run_complete(complete))
    return event
