"""Messages of a request that the strictest providers refuse, in their words.

Each check is the rule of some provider: Mistral refuses a user message after a tool message and two
user messages in a row, OpenAI a call without a result, Anthropic blank text, vLLM a system message
in the middle, and so on. Nothing here is shared with the server's own grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

Sent = Mapping[str, Any]

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

FOLLOWERS = {
    "": {"system", "user"},
    "system": {"system", "user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant"},
}
"""The roles that may follow a role."""


def refusal(messages: Sequence[Sent]) -> str | None:
    """Why a strict provider refuses a request; None if it is valid."""
    previous = ""
    waiting: list[str] = []
    seen: set[str] = set()
    for at, message in enumerate(messages):
        role = message["role"]
        if role not in FOLLOWERS[previous]:
            return f"messages[{at}]: unexpected role {role!r} after role {previous!r}"
        if waiting and role != "tool":
            return f"messages[{at}]: tool calls without a result: {waiting}"
        previous = role
        problem = _in_content(message) or _in_result(message, waiting)
        for call in message.get("tool_calls") or ():
            problem = problem or _in_call(call, seen)
            seen.add(call["id"])
            waiting.append(call["id"])
        if problem:
            return f"messages[{at}]: {problem}"
    if waiting:
        return f"tool calls without a result: {waiting}"
    return None if previous in {"user", "tool"} else f"the last message is of role {previous!r}"


def _in_content(message: Sent) -> str | None:
    content = message.get("content")
    if isinstance(content, list):
        texts = [item["text"] for item in content if item["type"] == "text"]
        return None if content and all(map(str.strip, texts)) else "empty content"
    if content is None and message.get("tool_calls"):
        return None
    return None if isinstance(content, str) and content.strip() else "empty content"


def _in_result(message: Sent, waiting: list[str]) -> str | None:
    if message["role"] != "tool":
        return None
    if not waiting or message["tool_call_id"] != waiting[0]:
        return f"no call waits for the result of {message['tool_call_id']!r}"
    waiting.pop(0)
    return None


def _in_call(call: Sent, seen: set[str]) -> str | None:
    if not call["id"] or call["id"] in seen:
        return f"the tool call id {call['id']!r} is used twice"
    if not NAME.fullmatch(call["function"]["name"]):
        return f"the name {call['function']['name']!r} does not match the pattern"
    try:
        arguments = json.loads(call["function"]["arguments"], parse_constant=_refuse)
    except ValueError:
        return f"the arguments are not JSON: {call['function']['arguments'][:80]!r}"
    return None if isinstance(arguments, dict) else "the arguments are not an object"


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)
