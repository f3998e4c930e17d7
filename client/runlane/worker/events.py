"""The events and prompts of an agent in a worker, and their form on the wire."""

from __future__ import annotations

import json as json_
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from runlane.types import (
    Attachment,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)
from runlane.v1 import run_pb2
from runlane.worker.v1 import worker_service_pb2 as pb

DELTA_CHARS = 1 << 16
"""Maximum length of a delta; a longer text becomes several events."""

RESULT_BYTES = 1 << 20
"""The content of a tool result is cut here."""

EVENT_BYTES = 2 << 20
"""Size limit of an event, which the agent cannot emit above it."""

MAX_ID_BYTES = 128
"""Size limit of the key of a step or of a question."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The input of a run: text, attachments, or both."""

    text: str
    attachments: tuple[Attachment, ...] = ()


@dataclass(frozen=True, slots=True)
class FoldedPrompt:
    """The prompt of a run that joined the turn."""

    run_id: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Report:
    """Facts about a turn as a whole.

    An agent may yield several: usage is summed up, and of the other fields the last value that is
    not None counts.
    """

    usage: Usage | None = None
    model: str | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """Something that the run makes besides its text, such as a file, a table or a picture.

    Exactly one of these is given: `text`, `data`, `json` (any value that JSON has) and `uri`, the
    address of content that is kept elsewhere. All pieces together have at most 1 MiB; larger
    content is passed by `uri`.

    Text and data may come in pieces: the first one with `last=False`, the others with
    `append=True`, the final one with `last=True`. Without `append`, a second piece replaces what
    the artifact had.
    """

    artifact_id: str
    name: str = ""
    mime_type: str = ""
    text: str | None = None
    data: bytes | None = None
    json: object = None
    uri: str | None = None
    append: bool = False
    last: bool = True


@dataclass(frozen=True, slots=True)
class Custom:
    """An event of a type of the agent's own, with any value that JSON has.

    Clients that do not know the type pass over it. It is among the events of the run, not in the
    transcript.
    """

    type: str
    json: object = None


@dataclass(frozen=True, slots=True)
class Result:
    """The structured result of the run: any value that JSON has, at most 1 MiB of it.

    The RunComplete of a run that completes carries the last one that the agent gave.
    """

    json: object


AgentEvent: TypeAlias = (
    TextDelta | ReasoningDelta | ToolCall | ToolResult | Artifact | Custom | Result | Report
)
"""An event of a turn. The agent calls its tools itself, and reports the calls and results."""


class AgentError(Exception):
    """A failure that the agent explains: `reason` is a stable word, `message` one sentence."""

    def __init__(self, message: str, *, reason: str = "AGENT_ERROR") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def explained(failure: BaseException) -> AgentError:
    """The error that the server gets for an exception of an agent."""
    reason = getattr(failure, "reason", None) or "AGENT_ERROR"
    message = getattr(failure, "message", None)
    if message is None:
        is_named = isinstance(failure, AgentError)
        message = reason if is_named else f"{type(failure).__name__}: {failure}"
    return AgentError(clean(str(message)), reason=clean(str(reason)))


def is_report(event: object) -> bool:
    """Whether an event is a report, of this package or of `runlane_server`."""
    return type(event).__name__ == "Report"


def is_result(event: object) -> bool:
    """Whether an event is the structured result, of this package or of `runlane_server`."""
    return type(event).__name__ == "Result"


def to_json(field: str, value: object) -> str:
    """A value as strict JSON. Raises AgentError for one that has no form in JSON."""
    try:
        text = json_.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise AgentError(f"{field} is no JSON value: {error}") from None
    return clean(text)


def step_event(key: str, result: object) -> pb.Event:
    """The event that stores the result of a step. Raises AgentError."""
    return pb.Event(step=run_pb2.RunEvent.Step(key=key, result=to_json("result of a step", result)))


def check_step_key(key: str) -> str:
    """The key of a step. Raises AgentError for one that is none."""
    size = len(clean(key).encode())
    if not 1 <= size <= MAX_ID_BYTES:
        raise AgentError(f"key of a step has {size} bytes; it must have 1 to {MAX_ID_BYTES}")
    return clean(key)


def encode(event: object) -> Iterator[pb.Event]:
    """The events on the wire for an event of the agent. Raises AgentError for another object.

    The events of `runlane_server.agents` have the same names and fields, so an agent that a server
    can import works here too.
    """
    found: Any = event
    match type(event).__name__:
        case "str":
            yield from (pb.Event(text_delta=piece) for piece in _pieces(found))
        case "TextDelta":
            yield from (pb.Event(text_delta=piece) for piece in _pieces(found.text))
        case "ReasoningDelta":
            yield from (pb.Event(reasoning_delta=piece) for piece in _pieces(found.text))
        case "ToolCall":
            yield pb.Event(
                tool_call=run_pb2.ToolCall(
                    tool_call_id=found.tool_call_id,
                    name=found.name,
                    arguments_json=clean(found.arguments_json),
                )
            )
        case "ToolResult":
            yield pb.Event(
                tool_result=run_pb2.ToolResult(
                    tool_call_id=found.tool_call_id,
                    name=found.name,
                    content=_cut(clean(found.content)),
                    is_error=found.is_error,
                )
            )
        case "Artifact":
            yield pb.Event(artifact=_artifact(found))
        case "Custom":
            yield pb.Event(
                custom=run_pb2.RunEvent.Custom(
                    type=clean(found.type), json=to_json("Custom.json", found.json)
                )
            )
        case other:
            raise AgentError(
                f"the agent yielded a {other}; expected a string or an event", reason="BAD_EVENT"
            )


def _cut(text: str) -> str:
    if len(text) * 4 <= RESULT_BYTES:
        return text
    return text.encode()[:RESULT_BYTES].decode(errors="ignore")


def _artifact(found: Any) -> run_pb2.Artifact:
    contents = [found.text, found.data, found.json, found.uri]
    if sum(one is not None for one in contents) != 1:
        raise AgentError("Artifact needs exactly one of text, data, json and uri")
    made = run_pb2.Artifact(
        artifact_id=clean(found.artifact_id),
        name=clean(found.name),
        mime_type=clean(found.mime_type),
        append=found.append,
        last=found.last,
    )
    if found.text is not None:
        made.text = clean(found.text)
    elif found.data is not None:
        made.data = bytes(found.data)
    elif found.json is not None:
        made.json = to_json("Artifact.json", found.json)
    else:
        made.uri = clean(found.uri)
    return made


def _pieces(text: str) -> Iterator[str]:
    text = clean(text)
    for at in range(0, len(text), DELTA_CHARS):
        yield text[at : at + DELTA_CHARS]


def clean(text: str) -> str:
    """Replaces each lone half of a surrogate pair with U+FFFD: UTF-8 cannot encode it."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def merged(last: pb.Event, event: pb.Event) -> pb.Event | None:
    """Two adjacent deltas as one; None if they cannot be merged."""
    kind = event.WhichOneof("event")
    if kind not in {"text_delta", "reasoning_delta"} or last.WhichOneof("event") != kind:
        return None
    text: str = getattr(last, str(kind)) + getattr(event, str(kind))
    if len(text) > DELTA_CHARS:
        return None
    if kind == "text_delta":
        return pb.Event(text_delta=text)
    return pb.Event(reasoning_delta=text)


class Totals:
    """The reports of a turn, added up."""

    def __init__(self) -> None:
        self._usage: dict[str, int] = {}
        self.model = ""
        self.finish_reason = run_pb2.FINISH_REASON_UNSPECIFIED

    def add(self, report: Any) -> None:
        """Adds a report."""
        if report.usage is not None:
            for one in fields(Usage):
                count = getattr(report.usage, one.name)
                self._usage[one.name] = self._usage.get(one.name, 0) + count
        if report.model is not None:
            self.model = report.model
        if report.finish_reason is not None:
            name = f"FINISH_REASON_{str(report.finish_reason).upper()}"
            self.finish_reason = run_pb2.FinishReason.Value(name)

    @property
    def usage(self) -> run_pb2.Usage | None:
        """The sum of the usage; None if none was reported."""
        return run_pb2.Usage(**self._usage) if self._usage else None


def prompt_from(text: str, attachments: Iterable[run_pb2.Attachment]) -> Prompt:
    """A prompt from the wire."""
    return Prompt(text, tuple(_attachment(sent) for sent in attachments))


def _attachment(sent: run_pb2.Attachment) -> Attachment:
    content: str | bytes = sent.data if sent.WhichOneof("content") == "data" else sent.text
    return Attachment(sent.name, content, sent.mime_type)
