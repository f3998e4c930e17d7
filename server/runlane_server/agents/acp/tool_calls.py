"""One call and one result for each tool call of an agent.

A tool call has an id, a title, a kind, and a status. Its input often comes after its first report,
content is replaced by every update that has some, and some agents introduce a call by asking for a
permission. So the reports are collected: the call is an event once it is at work, has ended, or
asks; its result is one once it has ended.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
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
    """What is known of a tool call. `is_shown`: its event was yielded."""

    call_id: str
    title: str = ""
    kind: str = OTHER
    status: str = "pending"
    content: list[Any] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    raw_input: Any = None
    raw_output: Any = None
    is_shown: bool = False


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
        _merge(call, report, with_content=not asks)
        events: list[AgentEvent] = []
        if asks or call.status != "pending":
            events += _shown(call)
        if call.status in {"completed", "failed"}:
            events.append(_result(call))
            self._ended.add(call.call_id)
            del self._open[call.call_id]
        return events

    def kind_of(self, call_id: str) -> str:
        """The kind of a call that has not ended."""
        call = self._open.get(call_id)
        return OTHER if call is None else call.kind

    def rest(self) -> list[AgentEvent]:
        """The calls that were announced and never began, at the end of the turn."""
        return [event for call in self._open.values() for event in _shown(call)]


def _merge(call: _Call, report: CallReport, *, with_content: bool) -> None:
    """Takes over what the report has: an empty list replaces, an absent field does not. The content
    of a question explains the question, and is no result."""
    call.title = report.title or call.title
    call.kind = report.kind or call.kind
    call.status = report.status or call.status
    if report.content is not None and with_content:
        call.content = list(report.content)
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
    arguments: dict[str, Any] = {"title": call.title}
    if call.locations:
        arguments["locations"] = call.locations
    if call.raw_input not in (None, {}, ""):
        arguments["input"] = call.raw_input
    return [ToolCall(call.call_id, call.kind, _json(arguments))]


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
