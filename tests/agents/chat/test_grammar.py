"""The grammar of a history: any transcript becomes a request that the strictest provider takes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from pydantic_ai import Agent as ModelAgent
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ModelResponsePart,
    SystemPromptPart,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from runlane_server.agents.chat.agent import ChatAgent
from runlane_server.agents.chat.grammar import (
    INVALID_JSON,
    NO_ANSWER,
    NO_OUTPUT,
    NO_PROMPT,
    valid,
    valid_arguments,
)
from runlane_server.agents.chat.history import model_messages
from runlane_server.core.model import (
    Attachment,
    FinishReason,
    Folded,
    Message,
    Part,
    Prompt,
    Reasoning,
    ReasoningDelta,
    Role,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
)
from runlane_server.core.turn import CUT_OFF, InvalidAgentEvent, TurnDraft, close
from support.openai_server import OpenAIServer
from support.strict_history import refusal
from support.turns import LocalTurn, collect, message, texts

TEXTS = st.sampled_from(["", " ", "\n", "word", "é ☃", "\ud83d", "NaN"])
IDS = st.sampled_from(["a", "b", "a_1", "", "x" * 300])
NAMES = st.sampled_from(["look", "functions.look", "", "two words", "n" * 200])
ARGUMENTS = st.sampled_from(
    ["", "{}", '{"at": 1}', "[]", "null", '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "b":', "x"]
)
CALLS = st.builds(ToolCall, IDS, NAMES, ARGUMENTS)
RESULTS = st.builds(ToolResult, IDS, NAMES, TEXTS, st.booleans())
FILES = st.builds(
    Attachment,
    st.sampled_from(["", "f"]),
    st.sampled_from(["image/png", "text/plain", "text/plain; charset=latin-1", "application/json"]),
    st.sampled_from([b"", b"caf\xe9", "", "text"]),
)

EVENTS = st.lists(
    st.one_of(
        st.builds(TextDelta, TEXTS),
        st.builds(ReasoningDelta, TEXTS),
        CALLS,
        RESULTS,
        st.just(Folded("r0", "r1")),
    ),
    max_size=8,
)
"""The output of an agent in a turn, in any order."""

PARTS = st.lists(
    st.one_of(st.builds(Text, TEXTS), st.builds(Reasoning, TEXTS), CALLS, RESULTS, FILES),
    max_size=3,
)

MESSAGES = st.lists(
    st.tuples(
        st.integers(1, 3), st.sampled_from(Role), PARTS, st.sampled_from([None, *FinishReason])
    ),
    max_size=9,
)
"""Messages that no turn would have: an older server or another agent may have stored them."""


def turn_of(number: int, events: Sequence[Any], reason: FinishReason) -> Iterator[Message]:
    """The messages that a turn with these events has when it ends."""
    draft = TurnDraft()
    for event in events:
        try:
            draft.add(event)
        except InvalidAgentEvent:
            break
    yield message(number, Role.USER, f"prompt {number}")
    for one in close(draft.messages(), reason):
        parts = one.parts or ((Text("folded"),) if one.role is Role.USER else ())
        yield message(number, one.role, *parts, finish_reason=one.finish_reason)


async def answer_after(history: Sequence[Message]) -> tuple[OpenAIServer, str]:
    """The answer of a strict model to a prompt after a history, and the server that it runs on."""
    async with OpenAIServer(refusal).serving() as server:
        server.answer("fine", "fine", "fine")
        async with AsyncOpenAI(base_url=server.base_url, api_key="x", max_retries=0) as client:
            model = OpenAIChatModel("small", provider=OpenAIProvider(openai_client=client))
            agent = ChatAgent(ModelAgent(model, system_prompt="you look"))
            await agent.start()
            turn = LocalTurn(Prompt("next"), messages=list(history), waiting=["folded"])
            events = await collect(agent, turn)
            await agent.close()
    return server, "".join(texts(events))


SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)


@SETTINGS
@given(st.lists(st.tuples(EVENTS, st.sampled_from(FinishReason)), max_size=4))
def test_r16_a_strict_provider_takes_the_history_of_turns_that_ended_in_any_way(
    turns: Sequence[tuple[Sequence[Any], FinishReason]],
) -> None:
    history = [
        one
        for number, (events, reason) in enumerate(turns, start=1)
        for one in turn_of(number, events, reason)
    ]
    server, answer = asyncio.run(answer_after(history))
    assert (server.refused, answer) == ([], "fine")


@SETTINGS
@given(MESSAGES)
def test_a_strict_provider_takes_the_history_of_any_transcript(
    messages: Sequence[tuple[int, Role, Sequence[Part], FinishReason | None]],
) -> None:
    ordered = sorted(messages, key=lambda one: one[0])
    history = [
        message(turn, role, *parts, finish_reason=reason) for turn, role, parts, reason in ordered
    ]
    server, answer = asyncio.run(answer_after(history))
    assert (server.refused, answer) == ([], "fine")


@given(MESSAGES)
def test_a_valid_history_stays_as_it_is(
    messages: Sequence[tuple[int, Role, Sequence[Part], FinishReason | None]],
) -> None:
    history = model_messages(
        message(turn, role, *parts, finish_reason=reason) for turn, role, parts, reason in messages
    )
    once = valid([*history, ModelRequest(parts=[UserPromptPart(content="next")])])
    # The same objects, so that the request has the same bytes, and a cached prefix is found again
    assert list(map(id, valid(once))) == list(map(id, once))
    kinds = [kind for kind, _ in groupby(once, key=type)]
    assert len(kinds) == len(once)
    assert kinds[0] is kinds[-1] is ModelRequest


# --- Single rules -------------------------------------------------------------------------------


def prompt(*content: str) -> ModelRequest:
    return ModelRequest(parts=[UserPromptPart(content=one) for one in content])


def called(*calls: tuple[str, str]) -> ModelResponse:
    return ModelResponse(parts=[ToolCallPart("look", args, id_) for id_, args in calls])


def results(*given_: tuple[str, str]) -> ModelRequest:
    return ModelRequest(parts=[ToolReturnPart("look", text, id_) for id_, text in given_])


def shown(messages: Sequence[ModelMessage]) -> list[str]:
    """Each part as `kind: content`, with a bar between two messages."""
    lines: list[str] = []
    for one in messages:
        lines += ["|"] if lines else []
        for part in one.parts:
            match part:
                case ToolCallPart(args=args, tool_call_id=id_):
                    lines.append(f"call {id_}: {args}")
                case ToolReturnPart(content=content, tool_call_id=id_):
                    lines.append(f"result {id_}: {content}")
                case UserPromptPart(content=content):
                    lines.append(f"prompt: {content}")
                case TextPart(content=content):
                    lines.append(f"text: {content}")
                case _:
                    lines.append(part.part_kind)
    return lines


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([called(("a", "{}")), prompt("next")],
         [f"prompt: {NO_PROMPT}", "|", "call a: {}", "|", f"result a: {CUT_OFF}", "|",
          f"text: {NO_ANSWER}", "|", "prompt: next"]),
        ([prompt("one"), called(("a", "{}"), ("a", "{}")), results(("a", "1"), ("a", "2"))],
         ["prompt: one", "|", "call a: {}", "call a_1: {}", "|", "result a: 1", "result a_1: 2"]),
        ([prompt("one"), called(("a", "{}"), ("b", "{}")), results(("b", "2"), ("a", ""))],
         ["prompt: one", "|", "call a: {}", "call b: {}", "|", f"result a: {NO_OUTPUT}",
          "result b: 2"]),
        ([prompt("one"), results(("a", "stray")), prompt("two", " ")],
         ["prompt: one\n\ntwo"]),
        ([prompt("one"), ModelResponse(parts=[ThinkingPart("hm"), TextPart(" ")]), prompt("two")],
         ["prompt: one\n\ntwo"]),
        ([prompt("one"), ModelResponse(parts=[TextPart("x")]),
          ModelRequest(parts=[SystemPromptPart("be brief"), UserPromptPart("two")])],
         ["prompt: one", "|", "text: x", "|", "prompt: be brief\n\ntwo"]),
        ([prompt("one"), ModelResponse(parts=[TextPart("x")]), called(("a", "{}")),
          results(("a", "1"))],
         ["prompt: one", "|", "text: x", "call a: {}", "|", "result a: 1"]),
        ([ModelRequest(parts=[SystemPromptPart("kind")]), ModelResponse(parts=[TextPart("x")]),
          prompt("two")],
         ["system-prompt", f"prompt: {NO_PROMPT}", "|", "text: x", "|", "prompt: two"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_added_and_what_is_too_much_is_left_out(
    messages: Sequence[ModelMessage], expected: list[str]
) -> None:
    assert shown(valid(messages)) == expected


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("", {}),
        (None, {}),
        ('{"a": [1.5, null]}', {"a": [1.5, None]}),
        ({"a": 1}, {"a": 1}),
        ('{"a": NaN}', {INVALID_JSON: '{"a": NaN}'}),
        ({"a": float("inf")}, {INVALID_JSON: '{"a": Infinity}'}),
        ('{"a": [1e999]}', {INVALID_JSON: '{"a": [1e999]}'}),
        ('{"a": -1e999}', {INVALID_JSON: '{"a": -1e999}'}),
        ('{"a": 1e300}', {"a": 1e300}),
        ("[1]", {INVALID_JSON: "[1]"}),
        ("null", {INVALID_JSON: "null"}),
        ('{"a": 1, "b": ', {INVALID_JSON: '{"a": 1, "b": '}),
        ("[" * 100_000, {INVALID_JSON: "[" * 100_000}),
        ("\ud83d", {INVALID_JSON: "\ufffd"}),
    ],
)
def test_arguments_become_a_json_object(args: Any, expected: dict[str, Any]) -> None:
    made = valid_arguments(args)
    assert (json.loads(made) if isinstance(made, str) else made) == expected


def test_arguments_that_are_kept_as_text_are_not_escaped() -> None:
    kept = valid_arguments('{"a": "漢字')
    assert kept == json.dumps({INVALID_JSON: '{"a": "漢字'}, ensure_ascii=False)


def test_half_a_surrogate_pair_is_replaced_in_every_part() -> None:
    half = "a\ud83d"
    parts: list[ModelResponsePart] = [
        ThinkingPart(half),
        TextPart(half),
        ToolCallPart("look", half, half),
    ]
    history: list[ModelMessage] = [prompt(half), ModelResponse(parts=parts), prompt("next")]
    # Otherwise the request could not be encoded, and the turn would fail.
    for one in valid(history):
        for part in one.parts:
            for value in (getattr(part, "content", ""), getattr(part, "args", "")):
                str(value).encode()


def test_the_name_of_an_unknown_tool_is_made_valid_and_that_of_a_known_one_kept() -> None:
    call = ModelResponse(
        parts=[ToolCallPart("mcp.look", "{}", "a"), ToolCallPart("no.no", "{}", "b")]
    )
    (_, response, request) = valid([prompt("one"), call], {"mcp.look"})
    for one in (response, request):
        names = [
            part.tool_name for part in one.parts if isinstance(part, ToolCallPart | ToolReturnPart)
        ]
        assert names == ["mcp.look", "no_no"]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "the last message"),
        ([("user", "x"), ("user", "y")], "unexpected role 'user' after role 'user'"),
        ([("user", "x"), ("tool", "y")], "unexpected role 'tool'"),
        ([("user", " ")], "empty content"),
        ([("user", "x"), ("assistant", "y"), ("system", "z")], "unexpected role 'system'"),
        ([("user", "x"), ("assistant", None), ("user", "y")], "empty content"),
    ],
)
def test_the_strict_provider_is_strict(
    messages: Sequence[tuple[str, str | None]], complaint: str
) -> None:
    why = refusal([{"role": role, "content": content} for role, content in messages])
    assert why is not None
    assert complaint in why
