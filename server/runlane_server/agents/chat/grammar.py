"""The grammar of a valid history: what every provider accepts, also the strictest.

    history   = [system] prompt response { ( prompt | results ) response } ( prompt | results )
    prompt    = one user message that is not empty
    response  = one assistant message: text that is not blank, or tool calls, or both
    results   = one tool message for each call of the response before, in the order of the calls

    - prompt and results never follow each other: an answer stands between them
    - the id of a tool call is unique in the history, its arguments are a JSON object, and its name
      is that of a tool or has only letters, digits, `_` and `-`
    - text is valid Unicode; a tool result is not empty

`valid` makes a request conform, however its earlier turns ended. It adds what is missing, such as
the result of a call that was cut off, and leaves out what no provider can use. It changes nothing
in a history that conforms, so that a provider's cache of the prefix stays valid. docs/histories.md
says the same for users.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelRequestPart,
    ModelResponse,
    ModelResponsePart,
    SystemPromptPart,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserContent,
    UserPromptPart,
)

from runlane_server.core.model import clean_text
from runlane_server.core.turn import CUT_OFF

NO_ANSWER = "(no answer)"
"""Stands between results and a prompt where the model gave no answer."""

NO_PROMPT = "(no text)"
"""Stands for a prompt without text, and before an answer that no prompt precedes."""

NO_OUTPUT = "(no output)"
"""The result of a tool that returned an empty text."""

INVALID_JSON = "INVALID_JSON"
"""The key under which arguments that are no JSON object are kept."""

MAX_NAME_CHARS = 64
"""Maximum length of the name of a tool that does not exist; OpenAI refuses longer ones."""

_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_-]")

_Message = TypeVar("_Message", ModelRequest, ModelResponse)


def valid(messages: Iterable[ModelMessage], tools: Container[str] = ()) -> list[ModelMessage]:
    """The messages of a request, made to conform to the grammar.

    `tools` are the names of the tools that the request offers.
    """
    history = _History(tools)
    for message in messages:
        if isinstance(message, ModelRequest):
            history.add_request(message)
        else:
            history.add_response(message)
    return history.finished()


def valid_response(response: ModelResponse, earlier: Iterable[ModelMessage]) -> ModelResponse:
    """A new response whose tool calls conform: unique ids, and a JSON object as arguments.

    Arguments that were cut by a token limit stay as they are: pydantic-ai recognizes them by that.
    """
    if not any(isinstance(part, ToolCallPart) for part in response.parts):
        return response
    ids = _UniqueIds(
        part.tool_call_id
        for message in earlier
        if isinstance(message, ModelResponse)
        for part in message.parts
        if isinstance(part, ToolCallPart)
    )
    parts: list[ModelResponsePart] = []
    for part in response.parts:
        if isinstance(part, ToolCallPart):
            call_id = ids.make(part.tool_call_id)
            is_cut = response.finish_reason == "length"
            part = _with_id(part, call_id) if is_cut else _valid_call(part, call_id)  # noqa: PLW2901
        parts.append(part)
    return _with_parts(response, parts)


def is_silent(response: ModelResponse) -> bool:
    """Whether a response has neither text nor calls: nothing that a provider takes back."""
    return all(_is_silent(part) for part in response.parts)


class _History:
    """The conforming messages so far, and the calls of the last response without a result."""

    def __init__(self, tools: Container[str]) -> None:
        self._tools = tools
        self._messages: list[ModelMessage] = []
        self._ids = _UniqueIds()
        self._open: list[tuple[str, ToolCallPart]] = []
        self._results: dict[str, ToolReturnPart] = {}
        self._request = ModelRequest(parts=[])

    def add_request(self, request: ModelRequest) -> None:
        """Adds results and prompts, in this order."""
        rest: list[ModelRequestPart] = []
        for part in request.parts:
            if isinstance(part, ToolReturnPart):
                self._add_result(part, request)
            else:
                rest.append(part)
        if rest:
            self._close_calls()
            self._add_prompt(request, rest)

    def add_response(self, response: ModelResponse) -> None:
        """Adds a response; a silent one is left out."""
        self._close_calls()
        parts = self._response_parts(response)
        if all(_is_silent(part) for part in parts):
            return
        last = self._last
        if isinstance(last, ModelResponse):
            self._messages[-1] = replace(response, parts=[*last.parts, *parts])
            return
        if last is None or not _has(last, UserPromptPart, ToolReturnPart):
            self._add_prompt(ModelRequest(parts=[]), [UserPromptPart(content=NO_PROMPT)])
        self._messages.append(_with_parts(response, parts))

    def finished(self) -> list[ModelMessage]:
        """All messages."""
        self._close_calls()
        return self._messages

    def _add_result(self, part: ToolReturnPart, request: ModelRequest) -> None:
        """Pairs a result with the first open call of its id; one without a call is left out."""
        for called_id, call in self._open:
            if called_id == part.tool_call_id and call.tool_call_id not in self._results:
                self._results[call.tool_call_id] = _valid_result(part, call)
                self._request = request
                return

    def _close_calls(self) -> None:
        """Adds the results of the last response's calls; a call without one was cut off."""
        if not self._open:
            return
        results = [self._results.get(call.tool_call_id) or _cut_off(call) for _, call in self._open]
        self._messages.append(_with_parts(self._request, results))
        self._open, self._results = [], {}
        self._request = ModelRequest(parts=[])

    @property
    def _last(self) -> ModelMessage | None:
        return self._messages[-1] if self._messages else None

    def _add_prompt(self, request: ModelRequest, parts: list[ModelRequestPart]) -> None:
        last = self._last
        if last is not None:
            parts = [_as_prompt(part) for part in parts]
        if isinstance(last, ModelRequest):
            if _has(last, ToolReturnPart) and any(isinstance(p, UserPromptPart) for p in parts):
                self._messages.append(ModelResponse(parts=[TextPart(content=NO_ANSWER)]))
            else:
                self._messages.pop()
                parts = [*last.parts, *parts]
        self._messages.append(_with_parts(request, _with_one_prompt(parts)))

    def _response_parts(self, response: ModelResponse) -> list[ModelResponsePart]:
        parts: list[ModelResponsePart] = []
        for part in response.parts:
            match part:
                case ToolCallPart():
                    call = _valid_call(part, self._ids.make(part.tool_call_id))
                    if call.tool_name not in self._tools:
                        call = _with_valid_name(call)
                    self._open.append((part.tool_call_id, call))
                    parts.append(call)
                case TextPart(content=text) if not text.strip():
                    pass
                case TextPart(content=text) | ThinkingPart(content=text) if (
                    clean := clean_text(text)
                ) is not text:
                    parts.append(replace(part, content=clean))
                case _:
                    parts.append(part)
        return parts


class _UniqueIds:
    """Makes the ids of tool calls unique. An id that is used for the first time stays the same:
    providers use ids as cache keys, and some gateways sign them."""

    def __init__(self, used: Iterable[str] = ()) -> None:
        self._used = set(used)

    def make(self, call_id: str) -> str:
        unique = call_id = clean_text(str(call_id)) or "call"
        number = len(self._used)
        while unique in self._used:
            unique = f"{call_id}_{number}"
            number += 1
        self._used.add(unique)
        return unique


def _with_parts(message: _Message, parts: Sequence[Any]) -> _Message:
    """The message with these parts; the same object if they are its own."""
    if len(parts) == len(message.parts) and all(map(_is_same, parts, message.parts)):
        return message
    return replace(message, parts=list(parts))


def _is_same(one: object, other: object) -> bool:
    return one is other


def _is_silent(part: ModelResponsePart) -> bool:
    match part:
        case TextPart(content=text):
            return not text.strip()
        case ThinkingPart():
            return True
        case _:
            return False


def _has(message: ModelMessage, *kinds: type) -> bool:
    return any(isinstance(part, kinds) for part in message.parts)


def _as_prompt(part: ModelRequestPart) -> ModelRequestPart:
    """A system prompt within the conversation becomes part of the user's message."""
    return UserPromptPart(content=part.content) if isinstance(part, SystemPromptPart) else part


def _with_one_prompt(parts: Sequence[ModelRequestPart]) -> list[ModelRequestPart]:
    """Joins the prompts of a request; a provider may require that roles alternate."""
    prompts = [part for part in parts if isinstance(part, UserPromptPart)]
    if not prompts:
        return list(parts)
    content = _joined([prompt.content for prompt in prompts])
    if len(prompts) == 1 and content == prompts[0].content:
        return list(parts)
    joined = replace(prompts[0], content=content)
    return [*(part for part in parts if not isinstance(part, UserPromptPart)), joined]


def _joined(contents: Sequence[str | Sequence[UserContent]]) -> str | list[UserContent]:
    """The contents as one, without blank texts; text alone stays a string."""
    items: list[UserContent] = []
    for content in contents:
        items += [content] if isinstance(content, str) else content
    items = [clean_text(item) if isinstance(item, str) else item for item in items]
    items = [item for item in items if not isinstance(item, str) or item.strip()]
    texts = [item for item in items if isinstance(item, str)]
    if len(texts) == len(items):
        return "\n\n".join(texts) or NO_PROMPT
    return items


def _valid_result(part: ToolReturnPart, call: ToolCallPart) -> ToolReturnPart:
    content = part.content
    if isinstance(content, str):
        content = clean_text(content) if content.strip() else NO_OUTPUT
    same = content is part.content and call.tool_call_id == part.tool_call_id
    if same and call.tool_name == part.tool_name:
        return part
    return replace(part, content=content, tool_call_id=call.tool_call_id, tool_name=call.tool_name)


def _cut_off(call: ToolCallPart) -> ToolReturnPart:
    return ToolReturnPart(
        tool_name=call.tool_name, content=CUT_OFF, tool_call_id=call.tool_call_id, outcome="failed"
    )


def _valid_call(call: ToolCallPart, call_id: str) -> ToolCallPart:
    args = valid_arguments(call.args)
    call = _with_id(call, call_id)
    return call if args is call.args else replace(call, args=args)


def _with_id(call: ToolCallPart, call_id: str) -> ToolCallPart:
    name = str(call.tool_name)  # a provider may send anything
    if call_id == call.tool_call_id and name is call.tool_name:
        return call
    return replace(call, tool_call_id=call_id, tool_name=name)


def _with_valid_name(call: ToolCallPart) -> ToolCallPart:
    """Models call tools that do not exist, by names that providers then refuse to read."""
    name = _NOT_IN_A_NAME.sub("_", call.tool_name)[:MAX_NAME_CHARS] or "unknown"
    return call if name == call.tool_name else replace(call, tool_name=name)


def valid_arguments(args: str | Mapping[str, Any] | None) -> str | dict[str, Any]:
    """Arguments as a JSON object. Anything else is kept as text under the key `INVALID_JSON`."""
    if not args:
        return "{}"
    text = args if isinstance(args, str) else json.dumps(args, default=str, ensure_ascii=False)
    text = clean_text(text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if isinstance(value, dict):
            return args if isinstance(args, dict) else text
    except (ValueError, RecursionError):
        pass
    return json.dumps({INVALID_JSON: text}, ensure_ascii=False)


def _finite(number: str) -> float:
    """Refuses a number like 1e999, which pydantic-ai would send on as Infinity."""
    if math.isinf(value := float(number)):
        raise ValueError(f"{number} is too large")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
