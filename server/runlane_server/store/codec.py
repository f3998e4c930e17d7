"""JSON for message parts, event bodies, completes, usage and metadata in a database.

A tag is one short word for each class and never changes its meaning: databases outlive the code.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from json.encoder import encode_basestring
from types import MappingProxyType
from typing import Any, NamedTuple

from runlane_server.core.artifact import ArtifactKind, ArtifactPiece
from runlane_server.core.model import (
    NO_LABELS,
    NO_USAGE,
    Accepted,
    Attachment,
    Corrupt,
    CustomEvent,
    EventBody,
    FinishReason,
    Folded,
    InputAnswered,
    InputExpired,
    InputRequested,
    InputWithdrawn,
    KeptPart,
    Part,
    Reasoning,
    ReasoningDelta,
    ResultPart,
    Resumed,
    RunComplete,
    RunError,
    RunState,
    Started,
    StepResult,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
    Updated,
    Usage,
)
from runlane_server.core.retry import RetryPolicy
from runlane_server.core.transition import LaneRun

RUN_COMPLETE = "run_complete"
"""The kind of the last event of a run. Its body stands in the log of terminal events."""

ARTIFACT = "artifact"
"""The kind of an event with a piece of an artifact, and the tag of a part with a whole one."""

LARGE_CHARS = 1 << 20
"""The size from which a message is decoded in steps: the library's decoder takes some 10 ms for
each 2 MiB and holds the interpreter for all of them."""

_decode_at = json.JSONDecoder().raw_decode

_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _array(values: Iterable[str | int]) -> str:
    """A flat array. A JSONEncoder call for each of these small arrays would dominate the cost."""
    return f"[{','.join([_scalar(value) for value in values])}]"


def _scalar(value: str | int) -> str:
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def encode_metadata(metadata: Mapping[str, str]) -> str | None:
    """Encodes labels; None if there are none."""
    return _dumps(dict(metadata)) if metadata else None


def decode_metadata(text: str | None) -> Mapping[str, str]:
    """Decodes the result of `encode_metadata`."""
    return NO_LABELS if text is None else MappingProxyType(json.loads(text))


def encode_usage(usage: Usage) -> str | None:
    """Encodes usage; None if there are none."""
    return None if usage is NO_USAGE or usage == NO_USAGE else _array(_usage_fields(usage))


def decode_usage(text: str | None) -> Usage:
    """Decodes the result of `encode_usage`."""
    return NO_USAGE if text is None else Usage(*json.loads(text))


class RetryState(NamedTuple):
    """The stored form of the retries of a run: see `LaneRun`."""

    retry: RetryPolicy
    failures: int
    not_before: int


def encode_retry(run: LaneRun) -> str | None:
    """Encodes the retry policy of a run, and where it stands; None without a policy."""
    policy = run.retry
    if policy is None:
        return None
    fields = [getattr(policy, name) for name in policy.__match_args__]
    return _dumps([*fields, run.failures, run.not_before])


def decode_retry(text: str | None) -> RetryState | None:
    """Decodes the result of `encode_retry`."""
    if text is None:
        return None
    reasons, *fields, failures, not_before = json.loads(text)
    return RetryState(RetryPolicy(tuple(reasons), *fields), failures, not_before)


def encode_parts(parts: tuple[Part, ...]) -> str | None:
    """Encodes the parts of a message; None if there are none."""
    return f"[{','.join([encode_part(part) for part in parts])}]" if parts else None


def decode_parts(text: str | None) -> tuple[Part, ...]:
    """Decodes the result of `encode_parts`."""
    if text is None:
        return ()
    if len(text) > LARGE_CHARS:
        return tuple(_parts_one_by_one(text))
    return tuple(_part(*fields) for fields in json.loads(text))


def _parts_one_by_one(text: str) -> Iterator[Part]:
    """Decodes a large message in steps, between which the event loop of this process can run."""
    at, end = 0, len(text) - 1
    while at < end:
        if text[at] != ("," if at else "["):
            break
        fields, at = _decode_at(text, at + 1)
        yield _part(*fields)
    if text[at:] != "]":
        raise ValueError("the parts of a message are not a JSON array")


def encode_body(body: EventBody) -> tuple[str, str | None]:
    """Encodes an event of a run: its kind and its body."""
    if isinstance(body, RunComplete):
        return RUN_COMPLETE, None
    if type(body) is TextDelta:  # most of them
        return "text_delta", f"[{encode_basestring(body.text)}]"
    if isinstance(body, ArtifactPiece):
        return ARTIFACT, _array(_artifact_fields(body))
    fields = [getattr(body, name) for name in body.__match_args__]
    return _KINDS[type(body)], _array(fields)


def decode_body(kind: str, text: str) -> EventBody:
    """Decodes the result of `encode_body`, except for a RunComplete."""
    if kind == ARTIFACT:
        return _artifact(*json.loads(text))
    body: EventBody = _BODIES[kind](*json.loads(text))
    return body


def encode_complete(complete: RunComplete) -> str:
    """Encodes a terminal event."""
    # Written out: the library's encoder takes three times as long.
    quote = encode_basestring
    error = complete.error
    return (
        f'{{"session_id":{quote(complete.session_id)}'
        f',"run_id":{quote(complete.run_id)}'
        f',"accept_seq":{complete.accept_seq}'
        f',"state":{quote(complete.state)}'
        f',"finish_reason":{quote(complete.finish_reason)}'
        f',"message_id":{quote(complete.message_id)}'
        f',"text":{quote(complete.text)}'
        f',"text_truncated":{"true" if complete.text_truncated else "false"}'
        f',"error":{"null" if error is None else _array([error.reason, error.message])}'
        f',"folded_into":{quote(complete.folded_into)}'
        f',"usage":{encode_usage(complete.usage) or _NONE_USED}'
        f',"attempt":{complete.attempt}'
        f',"cancel_reason":{quote(complete.cancel_reason)}'
        f',"accepted_at":{complete.accepted_at}'
        f',"started_at":{"null" if complete.started_at is None else complete.started_at}'
        f',"ended_at":{complete.ended_at}'
        f"{_encode_result(complete.result)}}}"
    )


def _encode_result(result: str) -> str:
    """Most events have none, and neither have those of earlier versions."""
    return f',"result":{encode_basestring(result)}' if result else ""


def decode_complete(text: str) -> RunComplete:
    """Decodes the result of `encode_complete`."""
    fields = json.loads(text)
    error = fields["error"]
    fields["state"] = RunState(fields["state"])
    fields["finish_reason"] = FinishReason(fields["finish_reason"])
    fields["error"] = None if error is None else RunError(*error)
    fields["usage"] = Usage(*fields["usage"])
    return RunComplete(**fields)


_BODIES: Mapping[str, type[Any]] = MappingProxyType(
    {
        "accepted": Accepted,
        "started": Started,
        "text_delta": TextDelta,
        "reasoning_delta": ReasoningDelta,
        "tool_call": ToolCall,
        "tool_result": ToolResult,
        "custom": CustomEvent,
        "step": StepResult,
        "folded": Folded,
        "input_requested": InputRequested,
        "input_answered": InputAnswered,
        "input_withdrawn": InputWithdrawn,
        "input_expired": InputExpired,
        "resumed": Resumed,
        "updated": Updated,
        "corrupt": Corrupt,
    }
)

_KINDS: Mapping[type[Any], str] = MappingProxyType({body: kind for kind, body in _BODIES.items()})


def _usage_fields(usage: Usage) -> list[int]:
    return [
        usage.input_tokens,
        usage.output_tokens,
        usage.cache_read_tokens,
        usage.cache_write_tokens,
        usage.requests,
    ]


_NONE_USED = _array(_usage_fields(NO_USAGE))


def encode_part(part: Part) -> str:
    """Encodes one part."""
    if type(part) is Text:  # most of them
        return f'["text",{encode_basestring(part.text)}]'
    return _array(_part_fields(part))


def decode_part(text: str) -> Part:
    """Decodes the result of `encode_part`."""
    return _part(*json.loads(text))


def _part_fields(part: Part) -> list[Any]:  # noqa: PLR0911 - one per kind
    match part:
        case Text(text):
            return ["text", text]
        case Reasoning(text):
            return ["reasoning", text]
        case ToolCall():
            return ["tool_call", part.tool_call_id, part.name, part.arguments_json]
        case ToolResult():
            return ["tool_result", part.tool_call_id, part.name, part.content, part.is_error]
        case Attachment(name, mime_type, bytes(data)):
            return ["attachment", name, mime_type, "base64", b64encode(data).decode()]
        case Attachment(name, mime_type, content):
            return ["attachment", name, mime_type, "text", content]
        case ArtifactPiece():
            return [ARTIFACT, *_artifact_fields(part)]
        case ResultPart(text):
            return ["result", text]
        case KeptPart():
            return ["kept", part.attempt, part.number, part.size]


def _artifact_fields(piece: ArtifactPiece) -> list[str | int]:
    content = piece.content
    return [
        piece.artifact_id,
        piece.name,
        piece.mime_type,
        piece.kind._value_,
        b64encode(content).decode() if isinstance(content, bytes) else content,
        piece.append,
        piece.last,
    ]


def _artifact(  # noqa: PLR0917 - the fields of a row
    artifact_id: str,
    name: str,
    mime_type: str,
    kind: str,
    content: str,
    append: bool,
    last: bool,
) -> ArtifactPiece:
    known = ArtifactKind(kind)
    value = b64decode(content) if known is ArtifactKind.DATA else content
    return ArtifactPiece(artifact_id, name, mime_type, known, value, append, last)


def _part(tag: str, *fields: Any) -> Part:  # noqa: PLR0911 - one per kind
    match tag:
        case "text":
            return Text(*fields)
        case "reasoning":
            return Reasoning(*fields)
        case "tool_call":
            return ToolCall(*fields)
        case "tool_result":
            return ToolResult(*fields)
        case "attachment":
            name, mime_type, form, content = fields
            return Attachment(name, mime_type, content if form == "text" else b64decode(content))
        case "kept":
            return KeptPart(*fields)
        case "artifact":  # ARTIFACT
            return _artifact(*fields)
        case "result":
            return ResultPart(*fields)
        case _:
            raise ValueError(f"unknown message part {tag!r}")
