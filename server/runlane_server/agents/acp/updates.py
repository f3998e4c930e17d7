"""Converts the reports of a working agent to events of the turn.

Most updates are text. A plan is a tool call `plan`, whose arguments are the entries: it has its
place among the other calls, and clients show it without knowing more.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import structlog
from acp.schema import (
    AgentMessageChunk,
    AgentPlanUpdate,
    AgentThoughtChunk,
    CurrentModeUpdate,
    RequestPermissionRequest,
    SessionNotification,
    ToolCallProgress,
    ToolCallStart,
)
from pydantic import ValidationError

from runlane_server.agents.acp.content import text_of_block
from runlane_server.agents.acp.tool_calls import ToolCalls
from runlane_server.agents.base import AgentEvent
from runlane_server.core.model import ReasoningDelta, TextDelta, ToolCall, ToolResult

PLAN = "plan"
"""The name of the tool call that stands for a plan."""

log = structlog.get_logger()


class Updates:
    """The updates of one turn."""

    def __init__(self, session_id: str) -> None:
        self.calls = ToolCalls()
        self._session_id = session_id
        self._plans = itertools.count(1)
        self._last_plan = ""
        self._last_message = ""
        self._has_text = False
        self._is_logged = False

    def take(self, params: Mapping[str, Any]) -> list[AgentEvent]:
        """The events of a notification `session/update`; none if it is invalid or unknown."""
        if (events := self._plain_text(params)) is not None:
            return events
        try:
            notification = SessionNotification.model_validate(params)
        except ValidationError as error:
            self._log_once("an update of an agent is invalid or unknown; ignored", error)
            return []
        if notification.session_id != self._session_id:
            return []
        return self._events_of(notification)

    def _events_of(self, notification: SessionNotification) -> list[AgentEvent]:
        events: list[AgentEvent] = []
        match notification.update:
            case AgentMessageChunk() as chunk:
                events = self._message(text_of_block(chunk.content), chunk.message_id or "")
            case AgentThoughtChunk() as chunk:
                text = text_of_block(chunk.content)
                events = [ReasoningDelta(text)] if text else []
            case ToolCallStart() | ToolCallProgress() as report:
                events = self._after_text(self.calls.update(report))
            case AgentPlanUpdate() as plan:
                events = self._plan(plan)
            case CurrentModeUpdate() as update:
                log.info("mode of the agent changed", mode=update.current_mode_id)
            case _:
                pass  # commands, options, titles, and usage whose meaning differs by agent
        return events

    def asked(self, params: Mapping[str, Any]) -> list[AgentEvent]:
        """The events of a request for permission: the call that it is about."""
        try:
            request = RequestPermissionRequest.model_validate(params)
        except ValidationError:
            return []  # its answer is a refusal
        return self._after_text(self.calls.update(request.tool_call, asks=True))

    def _plain_text(self, params: Mapping[str, Any]) -> list[AgentEvent] | None:
        """The events of a piece of text, which is nearly every update, without the full check."""
        match params:
            case {
                "sessionId": self._session_id,
                "update": {
                    "sessionUpdate": "agent_message_chunk",
                    "content": {"type": "text", "text": str() as text},
                } as update,
            }:
                message = update.get("messageId")
                return self._message(text, message if isinstance(message, str) else "")
        return None

    def _message(self, text: str, message_id: str) -> list[AgentEvent]:
        """A piece of a message. Two messages in a row are paragraphs."""
        if not text:
            return []
        is_next = bool(self._last_message) and message_id not in {"", self._last_message}
        self._last_message = message_id or self._last_message
        separated = is_next and self._has_text
        self._has_text = True
        return [TextDelta(f"\n\n{text}" if separated else text)]

    def _after_text(self, events: list[AgentEvent]) -> list[AgentEvent]:
        if events:
            self._has_text = False
        return events

    def _plan(self, plan: AgentPlanUpdate) -> list[AgentEvent]:
        entries = plan.model_dump_json(include={"entries"}, exclude_none=True)
        if entries == self._last_plan:
            return []
        self._last_plan = entries
        call_id = f"{PLAN}-{next(self._plans)}"
        return self._after_text([ToolCall(call_id, PLAN, entries), ToolResult(call_id, PLAN, "")])

    def _log_once(self, event: str, error: ValidationError) -> None:
        if not self._is_logged:
            self._is_logged = True
            log.warning(event, error=str(error)[:500])
