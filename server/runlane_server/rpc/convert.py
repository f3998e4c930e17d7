"""Conversion between domain records and protobuf messages: tables and plain functions.

Requests are validated by `rpc.validate` before they are converted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from runlane.v1 import run_pb2, run_service_pb2, session_pb2
from runlane_server.core import model
from runlane_server.core.artifact import ArtifactKind, ArtifactPiece
from runlane_server.core.model import (
    CancelScope,
    FinishReason,
    Micros,
    Role,
    RunState,
    WhenBusy,
)
from runlane_server.core.retry import RetryPolicy
from runlane_server.core.transition import Receipt
from runlane_server.rpc.page import ITEM_OVERHEAD

_SECOND = 1_000_000

# --- Enums --------------------------------------------------------------------------------------

RUN_STATES: Mapping[RunState, run_pb2.RunState.ValueType] = MappingProxyType(
    {
        RunState.ACCEPTED: run_pb2.RUN_STATE_ACCEPTED,
        RunState.QUEUED: run_pb2.RUN_STATE_QUEUED,
        RunState.ACTIVE: run_pb2.RUN_STATE_ACTIVE,
        RunState.INPUT_REQUIRED: run_pb2.RUN_STATE_INPUT_REQUIRED,
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
"""CancelScope.RUN has no value on the wire, where a run_id expresses it."""

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

# The reverse. Keyed by int, since proto3 passes any number, known or not.

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
    """A point in time, converted exactly, without floats."""
    seconds, micros = divmod(at, _SECOND)
    return Timestamp(seconds=seconds, nanos=micros * 1000)


def optional_timestamp(at: Micros | None) -> Timestamp | None:
    return None if at is None else timestamp(at)


def duration(length: Micros) -> Duration:
    """A non-negative duration."""
    seconds, micros = divmod(length, _SECOND)
    return Duration(seconds=seconds, nanos=micros * 1000)


def micros(length: Duration) -> Micros:
    """A duration, rounded up to a whole microsecond, so that a positive one stays positive."""
    return length.seconds * _SECOND - (-length.nanos // 1000)


# --- Requests -----------------------------------------------------------------------------------


def attachment_from(sent: run_pb2.Attachment) -> model.Attachment:
    """An attachment; the default media type depends on the kind of content."""
    if sent.WhichOneof("content") == "data":
        mime_type = sent.mime_type or "application/octet-stream"
        return model.Attachment(sent.name, mime_type, sent.data)
    return model.Attachment(sent.name, sent.mime_type or "text/plain", sent.text)


def prompt_from(text: str, attachments: Iterable[run_pb2.Attachment]) -> model.Prompt:
    return model.Prompt(text, tuple(map(attachment_from, attachments)))


# --- Responses ----------------------------------------------------------------------------------


def run_prompt(record: model.Prompt) -> run_pb2.RunPrompt:
    return run_pb2.RunPrompt(text=record.text, attachments=map(attachment, record.attachments))


def attachment(record: model.Attachment) -> run_pb2.Attachment:
    if isinstance(record.content, bytes):
        return run_pb2.Attachment(name=record.name, mime_type=record.mime_type, data=record.content)
    return run_pb2.Attachment(name=record.name, mime_type=record.mime_type, text=record.content)


def usage(record: model.Usage) -> run_pb2.Usage:
    return run_pb2.Usage(
        input_tokens=record.input_tokens,
        output_tokens=record.output_tokens,
        cache_read_tokens=record.cache_read_tokens,
        cache_write_tokens=record.cache_write_tokens,
        requests=record.requests,
    )


def run_error(record: model.RunError) -> run_pb2.RunError:
    return run_pb2.RunError(reason=record.reason, message=record.message)


def run_complete(record: model.RunComplete) -> run_pb2.RunComplete:
    return run_pb2.RunComplete(
        session_id=record.session_id,
        run_id=record.run_id,
        accept_seq=record.accept_seq,
        state=RUN_STATES[record.state],
        cancelled=record.cancelled,
        finish_reason=FINISH_REASONS[record.finish_reason],
        error=None if record.error is None else run_error(record.error),
        message_id=record.message_id,
        text=record.text,
        text_truncated=record.text_truncated,
        folded_into=record.folded_into,
        usage=None if record.folded_into else usage(record.usage),
        attempt=record.attempt,
        cancel_reason=record.cancel_reason,
        accepted_at=timestamp(record.accepted_at),
        started_at=optional_timestamp(record.started_at),
        ended_at=timestamp(record.ended_at),
        result=record.result,
    )


def retry_policy(record: RetryPolicy) -> run_pb2.RetryPolicy:
    return run_pb2.RetryPolicy(
        reasons=record.reasons,
        max_attempts=record.max_attempts,
        initial_backoff=duration(record.initial_backoff),
        max_backoff=duration(record.max_backoff),
        after_output=record.after_output,
    )


def run(record: model.Run) -> run_pb2.Run:
    return run_pb2.Run(
        session_id=record.session_id,
        run_id=record.run_id,
        accept_seq=record.accept_seq,
        state=RUN_STATES[record.state],
        when_busy=WHEN_BUSY[record.when_busy],
        prompt_excerpt=record.prompt_excerpt,
        metadata=record.metadata or None,
        timeout=None if record.timeout is None else duration(record.timeout),
        max_attempts=record.max_attempts,
        attempt=record.attempt,
        accepted_at=timestamp(record.accepted_at),
        started_at=optional_timestamp(record.started_at),
        ended_at=optional_timestamp(record.ended_at),
        folded_into=record.folded_into,
        run_complete=None if record.complete is None else run_complete(record.complete),
        agent=record.agent,
        last_event_index=record.last_event_index,
        revision=record.revision,
        retry_policy=None if record.retry is None else retry_policy(record.retry),
    )


def session(record: model.Session) -> session_pb2.Session:
    return session_pb2.Session(
        session_id=record.session_id,
        title=record.title,
        metadata=record.metadata,
        busy=record.busy,
        active_run_id=record.active_run_id,
        waiting_runs=record.waiting_runs,
        usage=usage(record.usage),
        created_at=timestamp(record.created_at),
        updated_at=timestamp(record.updated_at),
        agent=record.agent,
        etag=record.etag,
        origin=None if record.origin is None else origin(record.origin),
    )


def origin(record: model.Origin) -> session_pb2.SessionOrigin:
    return session_pb2.SessionOrigin(session_id=record.session_id, turn=record.turn)


def cancelled_runs(receipt: Receipt) -> list[run_pb2.CancelledRun]:
    return [
        run_pb2.CancelledRun(
            session_id=receipt.session_id,
            run_id=covered.run_id,
            accept_seq=covered.accept_seq,
            state_when_cancelled=RUN_STATES[covered.state],
        )
        for covered in receipt.cancelled
    ]


def session_cancellation(receipt: Receipt) -> run_service_pb2.SessionCancellation:
    return run_service_pb2.SessionCancellation(
        session_id=receipt.session_id,
        cancelled=cancelled_runs(receipt),
        fence_accept_seq=receipt.fence_accept_seq,
        unreadable=receipt.unreadable,
    )


def fitting_cancellations(
    receipts: Iterable[Receipt], max_bytes: int
) -> tuple[list[run_service_pb2.SessionCancellation], int]:
    """The receipts that fit into `max_bytes`, and the number of runs in the others."""
    fitting: list[run_service_pb2.SessionCancellation] = []
    omitted = 0
    for receipt in receipts:
        wire = session_cancellation(receipt)
        max_bytes -= wire.ByteSize() + ITEM_OVERHEAD
        if max_bytes >= 0:
            fitting.append(wire)
        else:
            omitted += len(receipt.cancelled)
    return fitting, omitted


def tool_call(record: model.ToolCall) -> run_pb2.ToolCall:
    return run_pb2.ToolCall(
        tool_call_id=record.tool_call_id, name=record.name, arguments_json=record.arguments_json
    )


def tool_result(record: model.ToolResult) -> run_pb2.ToolResult:
    return run_pb2.ToolResult(
        tool_call_id=record.tool_call_id,
        name=record.name,
        content=record.content,
        is_error=record.is_error,
    )


def artifact(record: ArtifactPiece) -> run_pb2.Artifact:
    wire = run_pb2.Artifact(
        artifact_id=record.artifact_id,
        name=record.name,
        mime_type=record.mime_type,
        append=record.append,
        last=record.last,
    )
    content = record.content
    if isinstance(content, bytes):
        wire.data = content
    elif record.kind is ArtifactKind.JSON:
        wire.json = content
    elif record.kind is ArtifactKind.URI:
        wire.uri = content
    else:
        wire.text = content
    return wire


def part(record: model.Part) -> session_pb2.Part:  # noqa: PLR0911 - one per kind
    match record:
        case model.Text(text):
            return session_pb2.Part(text=text)
        case model.Reasoning(text):
            return session_pb2.Part(reasoning=text)
        case model.ToolCall():
            return session_pb2.Part(tool_call=tool_call(record))
        case model.ToolResult():
            return session_pb2.Part(tool_result=tool_result(record))
        case model.Attachment():
            return session_pb2.Part(attachment=attachment(record))
        case model.KeptPart():
            raise ValueError("reading a message puts its kept parts back")
        case ArtifactPiece():
            return session_pb2.Part(artifact=artifact(record))
        case model.ResultPart(json):
            return session_pb2.Part(result=json)


def message_head(record: model.Message) -> session_pb2.Message:
    """A message without its parts, which may not all fit into one response."""
    return session_pb2.Message(
        message_id=record.message_id,
        run_id=record.run_id,
        role=ROLES[record.role],
        finish_reason=(
            FINISH_REASONS[record.finish_reason]
            if record.finish_reason
            else run_pb2.FINISH_REASON_UNSPECIFIED
        ),
        model=record.model,
        created_at=timestamp(record.created_at),
        turn=record.turn,
    )


def run_event(record: model.RunEvent) -> run_pb2.RunEvent:
    event = run_pb2.RunEvent()
    fill_run_event(event, record)
    return event


def fill_run_event(  # noqa: C901 - one per kind
    event: run_pb2.RunEvent, record: model.RunEvent
) -> None:
    """Fills an empty event. Made from fields, and copied into its response, an event of a word
    would take five times as long."""
    event.index = record.index
    time = event.time
    time.seconds, micros = divmod(record.at, _SECOND)
    time.nanos = micros * 1000
    match record.body:
        case model.TextDelta(text):  # most of them
            event.text_delta.text = text
        case model.Accepted(accept_seq):
            event.accepted.accept_seq = accept_seq
        case model.Started(attempt):
            event.started.attempt = attempt
        case model.ReasoningDelta(text):
            event.reasoning_delta.text = text
        case model.ToolCall() as call:
            event.tool_call.CopyFrom(tool_call(call))
        case model.ToolResult() as result:
            event.tool_result.CopyFrom(tool_result(result))
        case ArtifactPiece() as piece:
            event.artifact.CopyFrom(artifact(piece))
        case model.CustomEvent(kind, json):
            event.custom.CopyFrom(run_pb2.RunEvent.Custom(type=kind, json=json))
        case model.StepResult(key, json):
            event.step.CopyFrom(run_pb2.RunEvent.Step(key=key, result=json))
        case model.Folded(run_id, into_run_id):
            event.folded.CopyFrom(run_pb2.RunEvent.Folded(run_id=run_id, into_run_id=into_run_id))
        case model.Updated(revision, excerpt, when_busy):
            event.updated.revision = revision
            event.updated.prompt_excerpt = excerpt
            event.updated.when_busy = WHEN_BUSY[WhenBusy(when_busy)]
        case model.RunComplete() as complete:
            event.run_complete.CopyFrom(run_complete(complete))
