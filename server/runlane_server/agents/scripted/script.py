"""Parses the scripts of the scripted agent."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runlane_server.agents.base import Artifact, Custom, Result
from runlane_server.agents.questions import Asked
from runlane_server.core.model import FinishReason, ToolCall, ToolResult, Usage


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a script; the type of `value` depends on `kind`."""

    kind: str
    value: Any
    repeat: int = 1
    reason: str = "AGENT_ERROR"
    ignore_cancel: bool = False
    leave: bool = False
    attempts: int | None = None


class BadScript(Exception):
    """The script is invalid; the message names the step and the problem."""


def parse_script(text: str) -> list[Step] | None:
    """Parses a script; returns None if the text is not a JSON list. Raises BadScript."""
    if not text.lstrip().startswith("["):
        return None
    try:
        steps = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadScript(f"invalid JSON: {exc}") from exc
    return [_parse_numbered_step(number, step) for number, step in enumerate(steps, start=1)]


def _parse_numbered_step(number: int, step: object) -> Step:
    try:
        return _parse_step(step)
    except (TypeError, ValueError, KeyError, RecursionError) as exc:
        detail = f"{exc.args[0]!r} is missing" if isinstance(exc, KeyError) else str(exc)
        raise BadScript(f"step {number}: {detail}") from exc


def _parse_step(step: object) -> Step:
    fields = dict(_object(step))
    repeat = _count(fields.pop("repeat", 1))
    kinds = [kind for kind in _PARSERS if kind in fields]
    if len(kinds) != 1:
        raise ValueError(f"exactly one of these is required: {', '.join(_PARSERS)}")
    kind = kinds[0]
    value = _PARSERS[kind](fields.pop(kind))
    allowed = _OPTIONS.get(kind, frozenset())
    if unknown := sorted(set(fields) - allowed):
        raise ValueError(f"{kind!r} does not accept {', '.join(map(repr, unknown))}")
    reason = _text(fields.get("reason", "AGENT_ERROR"))
    ignore_cancel = _flag(fields.get("ignore_cancel", False))
    leave = _flag(fields.get("leave", False))
    attempts = _count(fields["attempts"]) if "attempts" in fields else None
    return Step(kind, value, repeat, reason, ignore_cancel, leave, attempts)


def _object(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not an object")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not true or false")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a non-negative integer")
    return value


def _fact(value: object) -> str:
    if value not in FACTS:
        raise ValueError(f"{value!r} is not one of {', '.join(FACTS)}")
    return str(value)


def _tool_call(value: object) -> ToolCall:
    fields = _object(value)
    arguments = json.dumps(_object(fields.get("arguments", {})), ensure_ascii=False)
    return ToolCall(_text(fields["id"]), _text(fields["name"]), arguments)


def _tool_result(value: object) -> ToolResult:
    fields = _object(value)
    return ToolResult(
        _text(fields["id"]),
        _text(fields["name"]),
        _text(fields.get("content", "")),
        is_error=_flag(fields.get("is_error", False)),
    )


def _artifact(value: object) -> Artifact:
    fields = dict(_object(value))
    if "data" in fields:
        fields["data"] = b64decode(_text(fields["data"]), validate=True)
    return Artifact(artifact_id=_text(fields.pop("id")), **fields)


def _custom(value: object) -> Custom:
    fields = _object(value)
    return Custom(_text(fields["type"]), fields.get("json"))


def _usage(value: object) -> Usage:
    return Usage(**{name: _count(count) for name, count in _object(value).items()})


_OPTIONS = {
    "fail": frozenset({"reason", "attempts"}),
    "wait": frozenset({"ignore_cancel"}),
    "ask": frozenset({"leave"}),
}
"""The further fields of a step."""

FACTS = ("attempt", "history", "metadata", "run_id", "session_id")

_PARSERS: Mapping[str, Callable[[object], Any]] = {
    "text": _text,
    "reasoning": _text,
    "tool_call": _tool_call,
    "tool_result": _tool_result,
    "artifact": _artifact,
    "custom": _custom,
    "result": Result,
    "usage": _usage,
    "model": _text,
    "finish": lambda value: FinishReason(_text(value)),
    "wait": _text,
    "open": _text,
    "step": _flag,
    "once": _text,
    "say": _fact,
    "ask": lambda value: Asked(**{"key": "", **_object(value)}),
    "fail": _text,
    "crash": _text,
}
"""The kinds of steps, each with the parser of its value."""
