"""The chat agent, against a real HTTP server with the API of OpenAI."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent as ModelAgent
from pydantic_ai import RunContext
from pydantic_ai.exceptions import ModelRetry

from runlane_server.agents.base import AgentError, AgentEvent, Report, Turn
from runlane_server.agents.chat.agent import ChatAgent
from runlane_server.agents.chat.grammar import NO_ANSWER
from runlane_server.agents.loader import AgentSettings, load_agent
from runlane_server.core.errors import StartError
from runlane_server.core.model import (
    Attachment,
    FinishReason,
    Prompt,
    ReasoningDelta,
    Role,
    ToolCall,
    ToolResult,
    Usage,
)
from support.models import KEY, failure
from support.openai_server import Answer, OpenAIServer
from support.turns import LocalTurn, Working, ask, collect, message, started, texts, usage


def contents(request_messages: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(m["role"], m.get("content")) for m in request_messages]


def reports(events: Sequence[AgentEvent]) -> list[Report]:
    return [event for event in events if isinstance(event, Report)]


# --- A turn -------------------------------------------------------------------------------------


async def test_the_answer_of_the_model_is_streamed(chat: Any, server: OpenAIServer) -> None:
    server.answer(Answer(reasoning=["let me", " see"], text=["Hel", "lo"]))
    events = await collect(chat, ask("hi"))
    assert texts(events) == ["Hel", "lo"]
    assert [e.text for e in events if isinstance(e, ReasoningDelta)] == ["let me", " see"]
    assert usage(events) == Usage(input_tokens=20, output_tokens=5, requests=1)
    assert reports(events)[0].model == "small-1"
    assert reports(events)[0].finish_reason is FinishReason.STOP
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body["model"] == "small"
    assert contents(request.messages) == [("system", "be kind"), ("user", "hi")]


async def test_text_arrives_before_the_answer_is_complete(chat: Any, server: OpenAIServer) -> None:
    server.answer(Answer(text=["first"], hold=True))
    working = Working(chat, ask("hi"))
    await working.said("first")
    assert not working.task.done()
    server.release()
    await working.task


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.CONTENT_FILTER])
@pytest.mark.parametrize("text", [["half"], []])
async def test_the_finish_reason_of_the_model_is_reported(
    chat: Any, server: OpenAIServer, reason: FinishReason, text: list[str]
) -> None:
    server.answer(Answer(text=text, finish=reason))
    events = await collect(chat, ask("hi"))
    assert texts(events) == text
    assert [r.finish_reason for r in reports(events) if r.finish_reason][-1] is reason


# --- History ------------------------------------------------------------------------------------


async def test_the_transcript_is_sent_in_a_form_that_providers_accept(
    chat: Any, server: OpenAIServer
) -> None:
    server.answer("fine")
    turn = LocalTurn(
        Prompt("and now?"),
        messages=[
            message(1, Role.USER, "one", Attachment("f", "image/png", b"\x01")),
            message(1, Role.ASSISTANT, "look", ToolCall("c", "see", '{"at":1}')),
            message(1, Role.TOOL, ToolResult("c", "see", "nothing", is_error=True)),
            message(1, Role.ASSISTANT, "answer one"),
            message(2, Role.USER, "cancelled on entry"),
            message(2, Role.ASSISTANT, finish_reason=FinishReason.CANCELED),
            message(3, Role.USER, "two"),
            message(3, Role.ASSISTANT, "half an", finish_reason=FinishReason.CANCELED),
            message(4, Role.USER, "three"),
            message(4, Role.ASSISTANT, ToolCall("c", "see", "{}")),
            message(4, Role.TOOL, ToolResult("c", "see", "cut off", is_error=True)),
            message(4, Role.USER, "folded in and not answered"),
            message(4, Role.ASSISTANT, finish_reason=FinishReason.CANCELED),
            message(5, Role.USER, "answered with a blank"),
            message(5, Role.ASSISTANT, " \n"),
        ],
    )
    await collect(chat, turn)
    sent = server.requests[0].messages
    assert [m["role"] for m in sent] == [
        *("system", "user", "assistant", "tool", "assistant"),
        *("user", "assistant"),
        *("user", "assistant", "tool", "assistant"),
        "user",
    ]
    assert sent[1]["content"][0] == {"type": "text", "text": "one"}
    assert sent[1]["content"][1]["image_url"]["url"] == "data:image/png;base64,AQ=="
    assert sent[2]["content"] == "look"
    assert sent[2]["tool_calls"][0]["function"] == {"name": "see", "arguments": '{"at":1}'}
    assert sent[3]["tool_call_id"] == sent[2]["tool_calls"][0]["id"] == "c"
    assert "nothing" in sent[3]["content"]
    assert sent[6]["content"] == "half an"
    second_id = sent[8]["tool_calls"][0]["id"]
    assert sent[9]["tool_call_id"] == second_id != "c"
    assert sent[10]["content"] == NO_ANSWER
    assert sent[11]["content"] == "and now?"


async def test_a_tool_result_without_a_call_is_left_out(chat: Any, server: OpenAIServer) -> None:
    server.answer("fine")
    history = [
        message(1, Role.USER, "one"),
        message(1, Role.TOOL, ToolResult("c", "see", "what?")),
        message(1, Role.ASSISTANT, "yes"),
    ]
    await collect(chat, LocalTurn(Prompt("two"), messages=history))
    assert [m["role"] for m in server.requests[0].messages] == [
        *("system", "user", "assistant", "user")
    ]


async def test_text_attachments_are_sent_with_their_names(chat: Any, server: OpenAIServer) -> None:
    server.answer("fine", "fine")
    await collect(chat, ask("read", Attachment("notes", "text/plain", "abc")))
    assert contents(server.requests[0].messages)[-1] == ("user", "read\n\nnotes:\nabc")
    await collect(chat, ask("", Attachment("", "text/plain", "only this")))
    assert contents(server.requests[1].messages)[-1] == ("user", "only this")


# --- Folding ------------------------------------------------------------------------------------


async def test_folded_prompts_join_the_next_request(server: OpenAIServer) -> None:
    turn = ask("first")
    model = ModelAgent("openai-chat:small")

    @model.tool_plain
    def look(where: str) -> str:
        turn.waiting = ["second", "third"]
        return f"seen {where}"

    server.answer(Answer(tool_calls=[("c1", "look", '{"where": "up"}')]), "all three")
    async with started(ChatAgent(model)) as agent:
        events = await collect(agent, turn)
    assert texts(events) == ["all three"]
    assert contents(server.requests[1].messages)[-3:] == [
        ("tool", "seen up"),
        ("assistant", NO_ANSWER),
        ("user", "second\n\nthird"),
    ]


async def test_prompts_folded_at_the_start_join_the_first_request(
    chat: Any, server: OpenAIServer
) -> None:
    server.answer("both")
    await collect(chat, ask("first", waiting=["second"]))
    assert contents(server.requests[0].messages)[1:] == [("user", "first\n\nsecond")]


async def test_prompts_folded_after_the_last_request_are_answered_too(
    chat: Any, server: OpenAIServer
) -> None:
    server.answer(Answer(text=["one"], hold=True), "two and three")
    turn = ask("first")
    working = Working(chat, turn)
    await working.said("one")
    turn.waiting = ["second", "third"]
    server.release()
    await working.task
    assert working.text == "onetwo and three"
    assert contents(server.requests[1].messages)[1:] == [
        ("user", "first"),
        ("assistant", "one"),
        ("user", "second\n\nthird"),
    ]
    assert usage(working.events).requests == 2
    assert usage(working.events).output_tokens == 10


# --- Tools --------------------------------------------------------------------------------------


async def test_tool_calls_and_results_are_reported_with_unique_ids(server: OpenAIServer) -> None:
    model = ModelAgent("openai-chat:small", system_prompt="you look")

    @model.tool_plain
    def look(where: str) -> str:
        if where == "down":
            raise ModelRetry("not there")
        return f"seen {where}"

    server.answer(
        Answer(text=["wait"], tool_calls=[("c1", "look", '{"where": "down"}')]),
        # The same id again: some models reuse ids.
        Answer(tool_calls=[("c1", "look", '{"where": "up"}')]),
        "found",
    )
    history = [message(1, Role.USER, "hi"), message(1, Role.ASSISTANT, "yes")]
    async with started(ChatAgent(model)) as agent:
        events = await collect(agent, LocalTurn(Prompt("go"), messages=history))
    calls = [event for event in events if isinstance(event, ToolCall | ToolResult)]
    assert [(type(c), c.name) for c in calls] == [
        (ToolCall, "look"),
        (ToolResult, "look"),
    ] * 2
    assert calls[0] == ToolCall("c1", "look", '{"where":"down"}')
    assert calls[1].tool_call_id == "c1"
    assert isinstance(calls[1], ToolResult)
    assert calls[1].is_error
    assert calls[1].content.startswith("not there")
    assert calls[2].tool_call_id == calls[3].tool_call_id != "c1"
    assert calls[3] == ToolResult(calls[3].tool_call_id, "look", "seen up")
    assert texts(events) == ["wait", "found"]
    # The agent's system prompt is sent even if there is a history.
    assert all(r.messages[0]["content"] == "you look" for r in server.requests)
    assert [r.finish_reason for r in reports(events) if r.finish_reason][-1] is FinishReason.STOP


@dataclass
class Customer:
    """Dependencies that are made of the turn."""

    name: str

    @classmethod
    async def from_turn(cls, turn: Turn) -> Customer:
        return cls(turn.metadata["customer"])


async def tool_result(server: OpenAIServer, agent: ModelAgent[Any, str]) -> str:
    """The result of the tool `who` of an agent in a turn of Ann's."""
    server.answer(Answer(tool_calls=[("c1", "who", "{}")]), "done")
    turn = LocalTurn(Prompt("x"), metadata={"customer": "Ann"})
    async with started(ChatAgent(agent)) as chat:
        events = await collect(chat, turn)
    return next(event.content for event in events if isinstance(event, ToolResult))


async def test_tools_get_the_turn_as_their_deps(server: OpenAIServer) -> None:
    agent = ModelAgent("openai-chat:small", deps_type=Turn)

    @agent.tool
    async def who(ctx: RunContext[Turn]) -> str:
        name: str = await ctx.deps.step("who", lambda: ctx.deps.metadata["customer"])
        return f"{name} in {ctx.deps.session_id}"

    assert await tool_result(server, agent) == "Ann in s1"


async def test_deps_of_an_own_type_are_made_of_the_turn(server: OpenAIServer) -> None:
    agent = ModelAgent("openai-chat:small", deps_type=Customer)

    @agent.tool
    def who(ctx: RunContext[Customer]) -> str:
        return ctx.deps.name

    assert await tool_result(server, agent) == "Ann"


async def test_deps_that_cannot_be_made_fail_the_run_and_name_the_type(
    server: OpenAIServer,
) -> None:
    agent = ModelAgent("openai-chat:small", deps_type=Customer)
    async with started(ChatAgent(agent)) as chat:
        with pytest.raises(AgentError, match=r"Customer.from_turn failed: KeyError: 'customer'"):
            await collect(chat, ask("x"))


async def test_structured_output_is_yielded_as_json(server: OpenAIServer) -> None:
    class City(BaseModel):
        name: str

    server.answer(Answer(tool_calls=[("c1", "final_result", '{"name": "Oslo"}')]))
    async with started(ChatAgent(ModelAgent("openai-chat:small", output_type=City))) as agent:
        events = await collect(agent, ask("where?"))
    assert texts(events) == ['{"name":"Oslo"}']
    assert not [e for e in events if isinstance(e, ToolCall | ToolResult)]


# --- Cancel -------------------------------------------------------------------------------------


async def test_a_cancel_closes_the_connection(chat: Any, server: OpenAIServer) -> None:
    server.answer(Answer(text=["first"], hold=True), "again")
    working = Working(chat, ask("hi"))
    await working.said("first")
    await working.cancel()
    async with asyncio.timeout(5):
        await server.requests[0].disconnected.wait()
    assert texts(await collect(chat, ask("hi"))) == ["again"]


async def test_closing_the_turn_early_closes_the_connection(
    chat: Any, server: OpenAIServer
) -> None:
    server.answer(Answer(text=["first"], hold=True))
    async with contextlib.aclosing(chat.run(ask("hi"))) as events:
        await anext(events)
    async with asyncio.timeout(5):
        await server.requests[0].disconnected.wait()


async def test_a_cancel_reaches_a_tool(server: OpenAIServer) -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()
    model = ModelAgent("openai-chat:small")

    @model.tool_plain
    async def wait() -> str:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return ""

    server.answer(Answer(tool_calls=[("c1", "wait", "{}")]))
    async with started(ChatAgent(model)) as agent:
        working = Working(agent, ask("hi"))
        await entered.wait()
        await working.cancel()
    assert cancelled.is_set()
    assert ToolCall("c1", "wait", "{}") in working.events


# --- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, "PROVIDER_REJECTED"),
        (401, "PROVIDER_AUTH"),
        (403, "PROVIDER_AUTH"),
        (404, "PROVIDER_REJECTED"),
        (429, "PROVIDER_RATE_LIMITED"),
        (500, "PROVIDER_UNAVAILABLE"),
        (503, "PROVIDER_UNAVAILABLE"),
    ],
)
async def test_an_error_status_becomes_a_reason_without_the_key(
    chat: Any, server: OpenAIServer, status: int, reason: str
) -> None:
    server.answer(Answer(status=status, error=f"because of {KEY}\n" + "x" * 1000))
    error = await failure(chat)
    assert error.reason == reason
    assert error.message.startswith(f"the provider answered {status} for small")
    assert len(error.message) <= 300
    assert ("because of ***" in error.message) == (reason != "PROVIDER_AUTH")
    assert len(server.requests) == 1


async def test_a_request_is_retried_as_often_as_configured(server: OpenAIServer) -> None:
    server.answer(Answer(status=500), "at last")
    agent = load_agent("chat:openai:small", AgentSettings(chat_max_retries=1))
    async with started(agent):
        assert texts(await collect(agent, ask("hi"))) == ["at last"]


async def test_an_unreachable_provider_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    agent = load_agent("chat:openai-chat:small", AgentSettings(chat_max_retries=0))
    async with started(agent):
        assert (await failure(agent)).reason == "PROVIDER_UNAVAILABLE"


async def test_a_broken_connection_fails_the_run_and_keeps_the_text(
    chat: Any, server: OpenAIServer
) -> None:
    server.answer(Answer(text=["half"], drop=True))
    working = Working(chat, ask("hi"))
    await asyncio.wait({working.task})
    error = working.task.exception()
    assert isinstance(error, AgentError), error
    assert error.reason == "PROVIDER_UNAVAILABLE"
    assert working.text == "half"


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("chat:", "is not provider:model"),
        ("chat:gpt-4o", "is not provider:model"),
        ("chat:nobody:small", "Unknown model"),
        ("chat:openai:small", "OPENAI_API_KEY"),
        ("chat:openai-responses:small", "OPENAI_API_KEY"),
    ],
)
def test_an_invalid_model_or_a_missing_key_fails_the_start_with_the_reason(
    spec: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(StartError, match=complaint) as failed:
        load_agent(spec)
    assert "\n" not in str(failed.value)


def test_an_empty_key_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(StartError, match=r"^agent chat: [^\n]+$"):
        load_agent("chat:openai:small")
