"""Checks everything that an agent reports, before the lane or a store sees it.

An agent is code of its author: its events, reports and errors may have any type and any value.
A harmless deviation is corrected and logged once per run: a fractional token count is rounded, a
lone surrogate is replaced. Everything else raises `InvalidAgentEvent`, which fails the run with
AGENT_ERROR and names the field. The values that pass can be stored, encoded and sent, so the end of
the run can always be written (R21).
"""

from __future__ import annotations

import json
import math
from dataclasses import fields

import structlog

from runlane_server.agents.base import AgentError, Artifact, Custom, Report, Result
from runlane_server.agents.json_parts import has_too_many_parts
from runlane_server.agents.worker.turn import JsonText
from runlane_server.core.artifact import MAX_ARTIFACT_BYTES, ArtifactKind, ArtifactPiece
from runlane_server.core.errors import RunlaneError
from runlane_server.core.model import (
    MAX_COUNT,
    CustomEvent,
    EventBody,
    FinishReason,
    ReasoningDelta,
    RunError,
    StepResult,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
    clean_text,
    cut_utf8,
    utf8_size,
)
from runlane_server.core.turn import InvalidAgentEvent

log = structlog.get_logger()

MAX_TOOL_BYTES = 1 << 20
"""Size limit of a tool call's arguments, which are refused above it, and of a tool result, which
is cut."""

INVALID_JSON = "INVALID_JSON"
"""The key under which arguments that are no JSON object are stored, as the documentation of
providers recommends."""

MAX_NAME_CHARS = 1024
"""Maximum length of the name of a tool or of a model; longer ones are refused."""

MAX_CALL_ID_CHARS = 1 << 16
"""Maximum length of the id of a tool call. Some gateways put a signature of several KiB into it."""

MAX_JSON_BYTES = 1 << 20
"""Size limit of the JSON of a custom event and of a result, which are refused above it."""

MAX_ID_BYTES = 128
"""Maximum size of the id of an artifact and of the type of a custom event, as of other ids."""

MAX_ARTIFACT_NAME_BYTES = 255
"""Maximum size of the name and of the media type of an artifact, as of those of an attachment."""

MAX_URI_BYTES = 8192
"""Maximum size of the address of an artifact."""

MAX_REASON_CHARS = 128
"""Maximum length of the reason of an error; a longer one is replaced by AGENT_ERROR."""

MAX_ERROR_CHARS = 2048
"""An error's message is cut here: with four bytes per character it stays within 8 KiB."""


class ReportCheck:
    """Checks the events and reports of one attempt."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def event(self, event: object) -> EventBody:  # noqa: PLR0911 - one per kind
        """The event, as it can be stored. Raises InvalidAgentEvent."""
        if type(event) is TextDelta and type(event.text) is str:
            return event  # nearly all events, so they cost nothing more
        match event:
            case TextDelta():
                return TextDelta(_text("TextDelta.text", event.text))
            case ReasoningDelta():
                return ReasoningDelta(_text("ReasoningDelta.text", event.text))
            case ToolCall():
                return _tool_call(event)
            case ToolResult():
                return _tool_result(event)
            case Artifact():
                return _artifact(event)
            case Custom():
                kind = _identifier("Custom.type", event.type)
                return CustomEvent(kind, _json("Custom.json", event.json))
            case _:
                raise InvalidAgentEvent(f"the agent yielded an object of type {_type_of(event)}")

    def report(self, report: Report) -> Report:
        """The report, with values that can be stored. Raises InvalidAgentEvent."""
        usage, model, finish_reason = report.usage, report.model, report.finish_reason
        return Report(
            usage=None if usage is None else self._usage(usage),
            model=None if model is None else _model(model),
            finish_reason=None if finish_reason is None else _finish_reason(finish_reason),
        )

    def result(self, result: Result) -> str:
        """The structured result, as JSON. Raises InvalidAgentEvent."""
        return _json("Result.json", result.json)

    def step(self, key: object, result: object) -> StepResult:
        """The result of a step, as it can be stored. Raises InvalidAgentEvent."""
        return StepResult(_identifier("key of a step", key), _json("result of a step", result))

    def _usage(self, usage: object) -> Usage:
        if not isinstance(usage, Usage):
            raise InvalidAgentEvent(f"Report.usage must be a Usage, not {_type_of(usage)}")
        return Usage(
            *(self._count(f"Usage.{one.name}", getattr(usage, one.name)) for one in fields(Usage))
        )

    def _count(self, field: str, value: object) -> int:
        if type(value) is float and math.isfinite(value):
            self._log(field, "a fractional count was rounded")
            value = round(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidAgentEvent(f"{field} must be a whole number, not {_type_of(value)}")
        if not 0 <= value <= MAX_COUNT:
            raise InvalidAgentEvent(f"{field} must be a number from 0 to 2^63 - 1")
        return int(value)

    def _log(self, field: str, event: str) -> None:
        if field not in self._logged:
            self._logged.add(field)
            log.warning(event, field=field)


def run_error(failure: BaseException) -> RunError:
    """The error of a run whose agent raised an exception. Never raises."""
    match failure:
        case AgentError():
            return RunError(_reason(failure.reason), _message(failure.message))
        case InvalidAgentEvent():
            return RunError("AGENT_ERROR", _message(str(failure)))
        case RunlaneError():
            # A read or a fold failed; the store has logged the cause.
            log.warning("agent stopped by an error", error=failure.message)
            return RunError("AGENT_ERROR", _message(failure.message))
        case _:
            log.error("agent failed", exc_info=failure)
            return RunError("AGENT_ERROR", _message(describe(failure)))


def describe(failure: BaseException) -> str:
    """The type of an exception and its text, which may itself raise."""
    try:
        text = str(failure)
    except BaseException:  # noqa: BLE001 - the exception is the agent's, and so is its __str__
        return f"{_type_of(failure)} (its text could not be read)"
    return f"{_type_of(failure)}: {text}"


def _reason(reason: object) -> str:
    """A stable word of the agent's; AGENT_ERROR for anything that is no such word."""
    if isinstance(reason, str) and 0 < len(reason) <= MAX_REASON_CHARS:
        plain = _plain(reason)
        if clean_text(plain) == plain:
            return plain
    return "AGENT_ERROR"


def _message(message: object) -> str:
    if not isinstance(message, str):
        return f"the agent failed with a message of type {_type_of(message)}"
    return clean_text(_plain(message)[:MAX_ERROR_CHARS])


def _tool_call(call: ToolCall) -> ToolCall:
    """Raises InvalidAgentEvent for arguments that are too large, as JSON cannot be cut."""
    name = _name("ToolCall.name", call.name)
    arguments = clean_text(_text("ToolCall.arguments_json", call.arguments_json))
    if utf8_size(arguments) > MAX_TOOL_BYTES:
        raise InvalidAgentEvent(f"the arguments of {name!r} are larger than 1 MiB")
    return ToolCall(
        _call_id("ToolCall.tool_call_id", call.tool_call_id), name, _json_object(arguments)
    )


def _json_object(text: str) -> str:
    """The arguments of a call as a strict JSON object, so that the next turn's history is valid:
    providers refuse any other forever. Models do emit others, such as half an object, or brackets
    without end."""
    if not text or text.isspace():
        return "{}"
    try:
        if not has_too_many_parts(text):
            value = json.loads(text, parse_constant=_refuse_constant)
            if isinstance(value, dict):
                return _without_lone_surrogates(text, value)
    except (ValueError, RecursionError):
        pass
    wrapped = _wrap(text)
    # Escapes may make it larger. As it is invalid anyway, a part of it does as well.
    return wrapped if utf8_size(wrapped) <= MAX_TOOL_BYTES else _wrap(_part_of(text))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_lone_surrogates(text: str, value: dict[str, object]) -> str:
    r"""Replaces escapes such as `"\ud800"`, which are no character: parsers refuse them."""
    if "\\u" not in text:
        return text
    decoded = json.dumps(value, ensure_ascii=False, allow_nan=False)
    cleaned = clean_text(decoded)
    return text if cleaned == decoded else cleaned


def _wrap(text: str) -> str:
    return json.dumps({INVALID_JSON: text}, ensure_ascii=False)


def _part_of(text: str) -> str:
    """A part that fits with any escapes: the longest has six bytes for one character."""
    part, _ = cut_utf8(text, MAX_TOOL_BYTES // 8)
    return part


def _tool_result(result: ToolResult) -> ToolResult:
    content, _ = cut_utf8(clean_text(_text("ToolResult.content", result.content)), MAX_TOOL_BYTES)
    if not isinstance(result.is_error, bool):
        raise InvalidAgentEvent(
            f"ToolResult.is_error must be a bool, not {_type_of(result.is_error)}"
        )
    return ToolResult(
        _call_id("ToolResult.tool_call_id", result.tool_call_id),
        _name("ToolResult.name", result.name),
        content,
        result.is_error,
    )


_MEDIA_TYPES = {
    ArtifactKind.TEXT: "text/plain",
    ArtifactKind.DATA: "application/octet-stream",
    ArtifactKind.JSON: "application/json",
    ArtifactKind.URI: "",
}
"""The media type of an artifact whose agent names none."""


def _artifact(artifact: Artifact) -> ArtifactPiece:
    kind, content = _content(artifact)
    append, last = _flag("append", artifact.append), _flag("last", artifact.last)
    in_pieces = append or not last
    if in_pieces and kind not in {ArtifactKind.TEXT, ArtifactKind.DATA}:
        raise InvalidAgentEvent(f"Artifact.{kind} cannot come in pieces; text and data can")
    mime_type = _artifact_name("Artifact.mime_type", artifact.mime_type)
    return ArtifactPiece(
        _identifier("Artifact.artifact_id", artifact.artifact_id),
        _artifact_name("Artifact.name", artifact.name),
        mime_type or _MEDIA_TYPES[kind],
        kind,
        content,
        append,
        last,
    )


def _content(artifact: Artifact) -> tuple[ArtifactKind, str | bytes]:
    kinds = [kind for kind in ArtifactKind if getattr(artifact, kind) is not None]
    if len(kinds) != 1:
        raise InvalidAgentEvent("Artifact needs exactly one of text, data, json and uri")
    kind = kinds[0]
    match kind:
        case ArtifactKind.TEXT:
            content = clean_text(_text("Artifact.text", artifact.text))
            return kind, _small("Artifact.text", content, MAX_ARTIFACT_BYTES)
        case ArtifactKind.DATA:
            return kind, _data(artifact.data)
        case ArtifactKind.JSON:
            return kind, _json("Artifact.json", artifact.json)
        case ArtifactKind.URI:
            uri = clean_text(_text("Artifact.uri", artifact.uri))
            return kind, _small("Artifact.uri", uri, MAX_URI_BYTES)


def _data(value: object) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise InvalidAgentEvent(f"Artifact.data must be bytes, not {_type_of(value)}")
    data = bytes(value)
    if len(data) > MAX_ARTIFACT_BYTES:
        raise _too_large("Artifact.data", len(data), MAX_ARTIFACT_BYTES)
    return data


def _json(field: str, value: object) -> str:
    """A value as strict JSON: without NaN, with text as keys, and in Unicode."""
    if isinstance(value, JsonText):
        return _small(field, str(value), MAX_JSON_BYTES)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidAgentEvent(f"{field} is no JSON value: {describe(error)}") from None
    return _small(field, clean_text(text), MAX_JSON_BYTES)


def _identifier(field: str, value: object) -> str:
    text = _small(field, clean_text(_text(field, value)), MAX_ID_BYTES)
    if not text:
        raise InvalidAgentEvent(f"{field} is empty; give it 1 to {MAX_ID_BYTES} bytes")
    return text


def _artifact_name(field: str, value: object) -> str:
    return _small(field, clean_text(_text(field, value)), MAX_ARTIFACT_NAME_BYTES)


def _small(field: str, text: str, limit: int) -> str:
    size = utf8_size(text)
    if size > limit:
        raise _too_large(field, size, limit)
    return text


def _too_large(field: str, size: int, limit: int) -> InvalidAgentEvent:
    remedy = "; pass larger content as a `uri`" if field.startswith("Artifact.") else ""
    return InvalidAgentEvent(f"{field} has {size} bytes; {limit} is the limit{remedy}")


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidAgentEvent(f"Artifact.{name} must be a bool, not {_type_of(value)}")
    return value


def _call_id(field: str, value: object) -> str:
    return clean_text(_bounded(field, value, MAX_CALL_ID_CHARS))


def _name(field: str, value: object) -> str:
    return clean_text(_bounded(field, value, MAX_NAME_CHARS))


def _model(value: object) -> str:
    """A model is looked up and compared by its name, so a broken one is not corrected."""
    name = _bounded("Report.model", value, MAX_NAME_CHARS)
    if clean_text(name) != name:
        raise InvalidAgentEvent("Report.model is not valid Unicode: it has a lone surrogate")
    return name


def _bounded(field: str, value: object, limit: int) -> str:
    text = _text(field, value)
    if len(text) > limit:
        raise InvalidAgentEvent(f"{field} has {len(text)} characters; {limit} is the limit")
    return text


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidAgentEvent(f"{field} must be a str, not {_type_of(value)}")
    return _plain(value)


def _plain(text: str) -> str:
    """The characters of a text as a plain `str`: a subclass may override any method."""
    return text if type(text) is str else str.__getitem__(text, slice(None))


def _finish_reason(value: object) -> FinishReason:
    text = _text("Report.finish_reason", value)
    try:
        return FinishReason(text)
    except ValueError:
        known = ", ".join(FinishReason)
        raise InvalidAgentEvent(f"Report.finish_reason must be one of {known}") from None


def _type_of(value: object) -> str:
    return type(value).__name__
