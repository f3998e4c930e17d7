"""Conversion of what agents in workers emit, ask and report.

The content passes the same checks as that of every other agent, so it is not checked here: only the
form of the messages, and that JSON is JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from runlane.v1 import run_pb2
from runlane.worker.v1 import worker_service_pb2 as pb
from runlane_server.access.grants import unique_names
from runlane_server.agents.base import AgentError, Artifact, Custom, Report, Result
from runlane_server.agents.json_parts import TOO_MANY_PARTS, has_too_many_parts
from runlane_server.agents.questions import INVALID, MAX_QUESTION_BYTES, Asked
from runlane_server.agents.worker.turn import Emitted, JsonText, KeptStep
from runlane_server.core.input import MAX_OPEN_INPUTS
from runlane_server.core.model import (
    FinishReason,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
    clean_text,
)
from runlane_server.engine.agent_output import MAX_JSON_BYTES
from runlane_server.rpc import convert
from runlane_server.rpc.checks import MAX_ID_BYTES, Checks

MAX_EVENTS = 1000
"""Events of an emit."""

MAX_DELTA_CHARS = 1 << 16
"""Characters of a delta: one stored event."""

MAX_BYTES_AT_ONCE = 1 << 16
"""Bytes of events after which the event loop may do other work. One larger event is converted at
once."""

# The reverse of `convert.FINISH_REASONS`, for the reasons that an agent may report.
_FINISH_REASONS: dict[int, FinishReason] = {
    value: reason
    for reason, value in convert.FINISH_REASONS.items()
    if reason in {FinishReason.STOP, FinishReason.LENGTH, FinishReason.CONTENT_FILTER}
}


async def events(emit: pb.WorkRequest.Emit) -> tuple[int, Sequence[Emitted]]:
    """The number of the first event of an emit, and its events. Raises InvalidArgument, and
    AgentError for JSON that is none. It lets the event loop do other work in between."""
    checks = Checks()
    checks.between("emit.number", emit.number, 1)
    checks.count("emit.events", emit.events, MAX_EVENTS)
    if not emit.events:
        checks.reject("emit.events", "is empty")
    found: list[Emitted] = []
    size = 0
    for n, sent in enumerate(emit.events):
        more = sent.ByteSize()
        size += more
        if found and size > MAX_BYTES_AT_ONCE:
            size = more
            await asyncio.sleep(0)
        found.append(_event(checks, f"emit.events[{n}]", sent))
    checks.finish()
    return emit.number, found


def _event(checks: Checks, field: str, sent: pb.Event) -> Emitted:  # noqa: PLR0911 - one per kind
    match sent.WhichOneof("event"):
        case "text_delta":
            return TextDelta(_delta(checks, f"{field}.text_delta", sent.text_delta))
        case "reasoning_delta":
            return ReasoningDelta(_delta(checks, f"{field}.reasoning_delta", sent.reasoning_delta))
        case "tool_call":
            call = sent.tool_call
            return ToolCall(call.tool_call_id, call.name, call.arguments_json)
        case "tool_result":
            result = sent.tool_result
            return ToolResult(result.tool_call_id, result.name, result.content, result.is_error)
        case "artifact":
            return _artifact(sent.artifact)
        case "custom":
            return Custom(sent.custom.type, _json("Custom.json", sent.custom.json))
        case "step":
            return KeptStep(sent.step.key, _json("result of a step", sent.step.result))
        case _:
            checks.reject(field, "has no event, or one of a newer protocol version")
            return TextDelta("")


def _delta(checks: Checks, field: str, text: str) -> str:
    if not text:
        checks.reject(field, "is empty")
    elif len(text) > MAX_DELTA_CHARS:
        checks.reject(field, f"has {len(text)} characters; the limit is {MAX_DELTA_CHARS}")
    return text


def _artifact(sent: run_pb2.Artifact) -> Artifact:
    kind = sent.WhichOneof("content")
    return Artifact(
        artifact_id=sent.artifact_id,
        name=sent.name,
        mime_type=sent.mime_type,
        text=sent.text if kind == "text" else None,
        data=sent.data if kind == "data" else None,
        json=_json("Artifact.json", sent.json) if kind == "json" else None,
        uri=sent.uri if kind == "uri" else None,
        append=sent.append,
        last=sent.last,
    )


def _json(field: str, text: str) -> JsonText:
    """A text as strict JSON. Raises AgentError."""
    with _uncollected():
        value = _value(field, text, MAX_JSON_BYTES)
        try:
            written = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except (ValueError, RecursionError) as error:
            raise AgentError(f"{field} is no JSON value: {error}") from None
        del value
    return JsonText(clean_text(written))


def _value(
    field: str,
    text: str,
    limit: int,
    reason: str = "AGENT_ERROR",
    pairs_hook: Callable[[Sequence[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value of a text in JSON. Raises AgentError.

    What is too large is not parsed: the event loop does nothing else meanwhile.
    """
    if len(text) > limit:
        problem = f"{field} has {len(text)} characters; {limit} is the limit"
        raise AgentError(problem, reason=reason)
    if has_too_many_parts(text):
        raise AgentError(f"{field} has {TOO_MANY_PARTS}", reason=reason)
    try:
        with _uncollected():
            return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as error:
        raise AgentError(f"{field} is no JSON value: {error}", reason=reason) from None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pauses the garbage collector. A text may hold hundreds of thousands of empty lists, which it
    would go through again and again while they are made: most of the time that they take."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def step_key(find: pb.WorkRequest.FindStep) -> str:
    """The key of a step. Raises InvalidArgument."""
    checks = Checks()
    _key(checks, "find_step.key", find.key)
    checks.finish()
    return find.key


def _key(checks: Checks, field: str, key: str) -> None:
    if not key:
        checks.reject(field, "is empty; name it")
    checks.size(field, key, MAX_ID_BYTES)


def questions(ask: pb.WorkRequest.Ask) -> Sequence[Asked]:
    """The questions of an ask. Raises InvalidArgument, and AgentError for JSON that is none."""
    checks = Checks()
    checks.count("ask.questions", ask.questions, MAX_OPEN_INPUTS)
    if not ask.questions:
        checks.reject("ask.questions", "is empty")
    for n, sent in enumerate(ask.questions):
        _key(checks, f"ask.questions[{n}].key", sent.key)
    if len({sent.key for sent in ask.questions}) < len(ask.questions):
        checks.reject("ask.questions", "has a key twice")
    checks.finish()
    return [_question(sent) for sent in ask.questions]


def _question(sent: pb.Question) -> Asked:
    def value(field: str, hook: Callable[[Sequence[tuple[str, Any]]], Any] | None = None) -> Any:
        text = getattr(sent, field)
        return _value(field, text, MAX_QUESTION_BYTES, INVALID, hook) if text else None

    # People approve what they see: the worker may take the other of two values.
    arguments = value("arguments_json", unique_names)
    if not isinstance(arguments, dict | None):
        raise AgentError("arguments_json is no JSON object", reason=INVALID)
    return Asked(
        sent.text,
        key=sent.key,
        tool_name=sent.tool_name,
        arguments=arguments,
        choices=tuple(sent.choices),
        schema=value("schema_json"),
        timeout=convert.micros(sent.timeout) / 1e6 if sent.HasField("timeout") else None,
        default=value("default_json"),
    )


def finished(finish: pb.WorkRequest.Finish) -> tuple[Report, Result | None]:
    """The report of a turn that completed, and its result. Raises InvalidArgument, and AgentError
    for a result that is no JSON."""
    checks = Checks()
    reason = FinishReason.STOP
    if finish.finish_reason != run_pb2.FINISH_REASON_UNSPECIFIED:
        reason = checks.enum(
            "finish.finish_reason", finish.finish_reason, _FINISH_REASONS.get, reason
        )
    checks.finish()
    result = Result(_json("result_json", finish.result_json)) if finish.result_json else None
    return _report(finish, reason), result


def failure(fail: pb.WorkRequest.Fail) -> tuple[Report, AgentError]:
    """The report of a turn that failed, and its error."""
    message = fail.message or "the agent failed"
    return _report(fail, None), AgentError(message, reason=fail.reason or "AGENT_ERROR")


def _report(
    sent: pb.WorkRequest.Finish | pb.WorkRequest.Fail, reason: FinishReason | None
) -> Report:
    usage = sent.usage
    return Report(
        usage=Usage(
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_tokens,
            usage.cache_write_tokens,
            usage.requests,
        )
        if sent.HasField("usage")
        else None,
        model=sent.model or None,
        finish_reason=reason,
    )
