"""One call and one result for each tool call of an agent.

A tool call has an id, a title, a kind, and a status. Its input often comes after its first report,
content is replaced by every update that has some, and some agents introduce a call by asking for a
permission. So the reports are collected: the call is an event once it is at work, has ended, or
asks; its result is one once it has ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from acp.schema import (
    ContentToolCallContent,
    FileEditToolCallContent,
    ToolCallProgress,
    ToolCallStart,
    ToolCallUpdate,
)
from pydantic import BaseModel

from runlane_server.agents.acp.connection import ACP_PROTOCOL
from runlane_server.agents.acp.content import text_of_block
from runlane_server.agents.acp.policy import OTHER
from runlane_server.agents.base import AgentError, AgentEvent
from runlane_server.core.model import ToolCall, ToolResult

MAX_OPEN = 1000
"""Number of tool calls of a turn that may be unfinished."""

CallReport: TypeAlias = ToolCallStart | ToolCallProgress | ToolCallUpdate


@dataclass
class _Call:
    """The known fields of a tool call. `is_shown`: its event was yielded."""

    call_id: str
    title: str = ""
    kind: str = OTHER
    status: str = "pending"
    content: list[Any] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    raw_input: Any = None
    raw_output: Any = None
    is_shown: bool = False


@dataclass(frozen=True, slots=True)
class AskedCall:
    """All that is known of a tool call that the agent asks a permission for."""

    kind: str
    title: str
    arguments: Mapping[str, Any]


class ToolCalls:
    """The tool calls of one turn."""

    def __init__(self) -> None:
        self._open: dict[str, _Call] = {}
        self._ended: set[str] = set()

    def update(self, report: CallReport, *, asks: bool = False) -> list[AgentEvent]:
        """Takes a report; returns the events that are due. `asks`: the agent waits for an answer.

        Reports of a call that has ended are ignored: agents repeat them.
        """
        if report.tool_call_id in self._ended:
            return []
        call = self._open.setdefault(report.tool_call_id, _Call(report.tool_call_id))
        if len(self._open) > MAX_OPEN:
            message = f"the agent has more than {MAX_OPEN} unfinished tool calls"
            raise AgentError(message, reason=ACP_PROTOCOL)
        _merge(call, report, asks=asks)
        events: list[AgentEvent] = []
        if asks or call.status != "pending":
            events += _shown(call)
        if call.status in {"completed", "failed"}:
            events.append(_result(call))
            self._ended.add(call.call_id)
            del self._open[call.call_id]
        return events

    def asked(self, report: ToolCallUpdate) -> AskedCall:
        """The call of a question: what earlier reports said, and what the question says of it. Of a
        call that has ended only the question counts."""
        call = self._open.get(report.tool_call_id) or _Call(report.tool_call_id)
        call = replace(call)
        _merge(call, report, asks=True)
        content = call.content if report.content is None else report.content
        arguments = _arguments(call)
        if content:
            arguments["content"] = [_as_json(one) for one in content]
        return AskedCall(call.kind, call.title, arguments)

    def rest(self) -> list[AgentEvent]:
        """The calls that were announced and never began, at the end of the turn."""
        return [event for call in self._open.values() for event in _shown(call)]


def _merge(call: _Call, report: CallReport, *, asks: bool) -> None:
    """Takes over what the report has: an empty list replaces, an absent field does not. The content
    of a question explains the question, and is no result; nor has its call ended."""
    call.title = report.title or call.title
    call.kind = report.kind or call.kind
    if not asks:
        call.status = report.status or call.status
        call.content = call.content if report.content is None else list(report.content)
    if report.locations is not None:
        call.locations = [one.path for one in report.locations]
    if report.raw_input is not None:
        call.raw_input = report.raw_input
    if report.raw_output is not None:
        call.raw_output = report.raw_output


def _shown(call: _Call) -> list[AgentEvent]:
    if call.is_shown:
        return []
    call.is_shown = True
    return [ToolCall(call.call_id, call.kind, _json(_arguments(call)))]


def _arguments(call: _Call) -> dict[str, Any]:
    arguments: dict[str, Any] = {"title": call.title}
    if call.locations:
        arguments["locations"] = call.locations
    if call.raw_input not in (None, {}, ""):
        arguments["input"] = call.raw_input
    return arguments


def _as_json(content: BaseModel) -> Any:
    return content.model_dump(mode="json", by_alias=True, exclude_none=True)


def _result(call: _Call) -> AgentEvent:
    texts = [_text_of(one) for one in call.content]
    text = "\n".join(one for one in texts if one)
    if not text and call.raw_output is not None:
        text = call.raw_output if isinstance(call.raw_output, str) else _json(call.raw_output)
    return ToolResult(call.call_id, call.kind, text, is_error=call.status == "failed")


def _text_of(content: BaseModel) -> str:
    match content:
        case ContentToolCallContent():
            return text_of_block(content.content)
        case FileEditToolCallContent():
            return f"{content.path}:\n{content.new_text}"
        case _:
            return ""


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
