"""The scripts of the scripted agent: their steps, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runlane_server.core.model import FinishReason, ToolCall, ToolResult, Usage


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what to do, with what, and how often."""

    kind: str
    value: Any
    repeat: int = 1
    reason: str = "AGENT_ERROR"
    ignore_cancel: bool = False


class BadScript(Exception):
    """The script cannot be read; the message names the step and what is wrong."""


def parse_script(text: str) -> list[Step] | None:
    """The steps of a script, or None where the text is not a JSON list. Raises BadScript."""
    if not text.lstrip().startswith("["):
        return None
    try:
        steps = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadScript(f"not JSON: {exc}") from exc
    return [_step(number, step) for number, step in enumerate(steps, start=1)]


def _step(number: int, step: object) -> Step:
    try:
        return _parsed(step)
    except (TypeError, ValueError, KeyError, RecursionError) as exc:
        detail = f"{exc.args[0]!r} is missing" if isinstance(exc, KeyError) else str(exc)
        raise BadScript(f"step {number}: {detail}") from exc


def _parsed(step: object) -> Step:
    fields = dict(_object(step))
    repeat = _count(fields.pop("repeat", 1))
    kinds = [kind for kind in _READERS if kind in fields]
    if len(kinds) != 1:
        raise ValueError(f"needs exactly one of {', '.join(_READERS)}")
    kind = kinds[0]
    value = _READERS[kind](fields.pop(kind))
    allowed = {"fail": {"reason"}, "wait": {"ignore_cancel"}}.get(kind, set())
    if unknown := sorted(set(fields) - allowed):
        raise ValueError(f"{kind!r} does not take {', '.join(map(repr, unknown))}")
    reason = _text(fields.get("reason", "AGENT_ERROR"))
    ignore_cancel = _flag(fields.get("ignore_cancel", False))
    return Step(kind, value, repeat, reason, ignore_cancel)


def _object(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not an object")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not true or false")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _said_back(value: object) -> str:
    if value not in SAID_BACK:
        raise ValueError(f"{value!r} is none of {', '.join(SAID_BACK)}")
    return str(value)


def _tool_call(value: object) -> ToolCall:
    fields = _object(value)
    arguments = json.dumps(_object(fields.get("arguments", {})))
    return ToolCall(_text(fields["id"]), _text(fields["name"]), arguments)


def _tool_result(value: object) -> ToolResult:
    fields = _object(value)
    return ToolResult(
        _text(fields["id"]),
        _text(fields["name"]),
        _text(fields.get("content", "")),
        is_error=_flag(fields.get("is_error", False)),
    )


def _usage(value: object) -> Usage:
    return Usage(**{name: _count(count) for name, count in _object(value).items()})


SAID_BACK = ("attempt", "history", "metadata", "run_id", "session_id")

_READERS: Mapping[str, Callable[[object], Any]] = {
    "text": _text,
    "reasoning": _text,
    "tool_call": _tool_call,
    "tool_result": _tool_result,
    "usage": _usage,
    "model": _text,
    "finish": lambda value: FinishReason(_text(value)),
    "wait": _text,
    "open": _text,
    "step": _flag,
    "say": _said_back,
    "fail": _text,
    "crash": _text,
}
"""What a step may be, and how its value is read."""
