"""Answers that are odd, cut off or rejected, and the turns that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent as ModelAgent
from pydantic_ai import PromptedOutput, ToolOutput
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.openai import OpenAIChatModel

from runlane_server.agents.base import AgentError, AgentEvent
from runlane_server.agents.chat.agent import ChatAgent
from runlane_server.agents.chat.grammar import INVALID_JSON
from runlane_server.agents.loader import AgentSettings, load_agent
from runlane_server.core.model import (
    Attachment,
    FinishReason,
    Message,
    Prompt,
    Role,
    ToolCall,
    ToolResult,
    Usage,
)
from support.models import KEY, failure
from support.openai_server import Answer, OpenAIServer
from support.turns import LocalTurn, Working, ask, collect, message, started, texts, usage

PNG = Attachment("a.png", "image/png", b"\x89PNG")


def looking() -> ModelAgent[None, str]:
    """An agent with a tool that adds."""
    agent: ModelAgent[None, str] = ModelAgent("openai-chat:small")

    @agent.tool_plain
    def add(a: int, b: int) -> str:
        return str(a + b)

    return agent


def adding(*calls: tuple[str, str]) -> Answer:
    """An answer that calls the tool, by ids and arguments."""
    return Answer(tool_calls=[(id_, "add", args) for id_, args in calls])


def tool_events(events: Sequence[AgentEvent]) -> list[ToolCall | ToolResult]:
    return [event for event in events if isinstance(event, ToolCall | ToolResult)]


# --- The end of an answer -----------------------------------------------------------------------


@pytest.mark.parametrize("text", [["half an"], ["half", " an"]])
async def test_an_answer_without_a_finish_reason_was_cut_off_and_its_text_is_kept(
    chat: Any, server: OpenAIServer, text: list[str]
) -> None:
    server.answer(Answer(text=text, cut=True))
    working = Working(chat, ask("hi"))
    with pytest.raises(AgentError, match=r"finish reason.*--chat-lenient-end") as failed:
        await working.task
    assert failed.value.reason == "PROVIDER_UNAVAILABLE"
    assert working.text == "half an"


async def test_a_call_without_a_finish_reason_is_not_executed(server: OpenAIServer) -> None:
    server.answer(Answer(tool_calls=[("c1", "add", '{"a": 1, "b": 2}')], cut=True))
    async with started(ChatAgent(looking())) as agent:
        assert (await failure(agent, ask("hi"))).reason == "PROVIDER_UNAVAILABLE"
    assert len(server.requests) == 1


@pytest.mark.parametrize("spec", ["chat:openai:small", "own_model:agent"])
async def test_a_provider_that_never_sends_a_finish_reason_can_be_named(
    server: OpenAIServer, spec: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "import pydantic_ai\nagent = pydantic_ai.Agent('openai-chat:small')\n"
    (tmp_path / "own_model.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    server.answer(Answer(text=["all"], cut=True), Answer(text=["all"], cut=True))
    async with started(load_agent(spec, AgentSettings(chat_lenient_end=True))) as agent:
        assert texts(await collect(agent, ask("hi"))) == ["all"]
    async with started(load_agent(spec)) as agent:
        assert (await failure(agent, ask("hi"))).reason == "PROVIDER_UNAVAILABLE"


async def test_a_model_within_the_process_needs_no_finish_reason() -> None:
    async def stream(_: object, __: AgentInfo) -> Any:
        yield "all"

    agent = ChatAgent(ModelAgent(FunctionModel(stream_function=stream)))
    async with started(agent):
        assert texts(await collect(agent, ask("hi"))) == ["all"]


async def test_an_answer_without_anything_is_unavailable(chat: Any, server: OpenAIServer) -> None:
    server.answer(Answer(status=204))
    error = await failure(chat)
    assert (error.reason, error.message) == (
        "PROVIDER_UNAVAILABLE",
        "the provider of small sent no answer",
    )


# --- Odd answers --------------------------------------------------------------------------------


async def test_a_usage_with_every_chunk_is_counted_once(chat: Any, server: OpenAIServer) -> None:
    server.answer(Answer(text=["a"] * 20, counting=True))
    events = await collect(chat, ask("hi"))
    assert usage(events) == Usage(input_tokens=20, output_tokens=5, requests=1)


@pytest.mark.parametrize("silence", [Answer(text=[""]), Answer(), Answer(reasoning=["done"])])
async def test_a_model_may_end_its_work_with_tools_in_silence(
    server: OpenAIServer, silence: Answer
) -> None:
    server.answer(adding(("c1", '{"a": 1, "b": 2}')), silence, "second")
    turn = ask("go")
    async with started(ChatAgent(looking())) as agent:
        events = await collect(agent, turn)
    assert (texts(events), len(server.requests)) == ([], 2)
    assert usage(events).requests == 2
    assert [type(event) for event in tool_events(events)] == [ToolCall, ToolResult]


class City(BaseModel):
    name: str


OSLO = '{"name": "Oslo"}'


@pytest.mark.parametrize(
    ("output", "last"),
    [
        (City, Answer(tool_calls=[("c2", "final_result", OSLO)])),
        (ToolOutput(City), Answer(tool_calls=[("c2", "final_result", OSLO)])),
        (PromptedOutput(City), Answer(text=[OSLO])),
    ],
)
async def test_silence_is_no_answer_where_the_output_has_a_type(
    server: OpenAIServer, output: Any, last: Answer
) -> None:
    model = ModelAgent("openai-chat:small", output_type=output)

    @model.tool_plain
    def look() -> str:
        return "seen"

    server.answer(Answer(tool_calls=[("c1", "look", "{}")]), Answer(), last)
    async with started(ChatAgent(model)) as agent:
        assert texts(await collect(agent, ask("where?")))[-1] == '{"name":"Oslo"}'
    assert len(server.requests) == 3


async def test_calls_with_the_same_id_in_one_answer_get_their_own_results(
    server: OpenAIServer,
) -> None:
    server.answer(adding(("c", '{"a": 1, "b": 1}'), ("c", '{"a": 2, "b": 2}')), "done")
    async with started(ChatAgent(looking())) as agent:
        events = await collect(agent, ask("go"))
    found = tool_events(events)
    calls = [event.tool_call_id for event in found if isinstance(event, ToolCall)]
    results = {e.tool_call_id: e.content for e in found if isinstance(e, ToolResult)}
    # The tools run at the same time, so their results come in any order
    assert [results[id_] for id_ in calls] == ["2", "4"]
    sent = server.requests[1].messages[-2:]
    assert [m["content"] for m in sent] == ["2", "4"]


@pytest.mark.parametrize("bad", ['{"a": 1, "b": ', "[]", '"text"', '{"a": NaN, "b": 1}'])
async def test_the_model_can_correct_arguments_that_are_no_object(
    server: OpenAIServer, bad: str
) -> None:
    server.answer(adding(("c1", bad)), adding(("c2", '{"a": 1, "b": 2}')), "3")
    async with started(ChatAgent(looking())) as agent:
        events = await collect(agent, ask("go"))
    assert texts(events) == ["3"]
    first, refused, *_ = tool_events(events)
    assert isinstance(first, ToolCall)
    assert INVALID_JSON in first.arguments_json
    assert isinstance(refused, ToolResult)
    assert refused.is_error


# --- Attachments --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["video/mp4", "audio/ogg", "application/x-unknown"])
async def test_an_attachment_that_the_model_does_not_take_is_named(
    chat: Any, server: OpenAIServer, kind: str
) -> None:
    error = await failure(chat, ask("look", Attachment("a", kind, b"x")))
    assert (error.reason, server.requests) == ("PROVIDER_REJECTED", [])
    assert error.message == f"small does not take one of these kinds of attachments: {kind}"


@pytest.mark.parametrize(
    ("kind", "data", "text"),
    [
        ("text/plain", b"caf\xe9", "caf\ufffd"),
        ("text/plain; charset=iso-8859-1", b"caf\xe9", "caf\xe9"),
        ("text/csv; charset=none-such", b"a,b", "a,b"),
        ("text/csv; charset=zlib", b"a,b", "a,b"),
        ("application/json", b"{}", "{}"),
        ("image/svg+xml", b"<svg/>", "<svg/>"),
    ],
)
async def test_a_file_of_text_is_sent_as_text(
    chat: Any, server: OpenAIServer, kind: str, data: bytes, text: str
) -> None:
    server.answer("fine")
    await collect(chat, ask("read", Attachment("f", kind, data)))
    assert server.requests[0].messages[-1]["content"] == f"read\n\nf:\n{text}"


# --- A past that the provider rejects -----------------------------------------------------------


def rejecting(*words: str) -> OpenAIServer:
    """A provider that refuses each request in which one of the words occurs."""
    return OpenAIServer(lambda sent: next((w for w in words if w in str(sent)), None))


HISTORIES: dict[str, list[Message]] = {
    "image_url": [message(1, Role.USER, "look", PNG), message(1, Role.ASSISTANT, "seen")],
    "tool_calls": [
        message(1, Role.USER, "go"),
        message(1, Role.ASSISTANT, "calling", ToolCall("c", "gone", "{}")),
        message(1, Role.TOOL, ToolResult("c", "gone", "x")),
        message(1, Role.ASSISTANT, "seen"),
    ],
    "forbidden": [
        message(1, Role.USER, "one"),
        message(1, Role.ASSISTANT, "seen"),
        message(2, Role.USER, "forbidden"),
        message(2, Role.ASSISTANT, "half an", finish_reason=FinishReason.ERROR),
    ],
}
"""Histories by what the provider refuses in them."""


@pytest.mark.parametrize("word", HISTORIES)
async def test_a_turn_works_although_the_provider_rejects_an_earlier_one(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rejecting(word).serving() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        server.answer("fine")
        turn = LocalTurn(Prompt("next"), messages=HISTORIES[word], waiting=["folded"])
        async with started(load_agent("chat:openai:small")) as agent:
            assert texts(await collect(agent, turn)) == ["fine"]
        assert len(server.refused) == 1
        sent = server.requests[1].messages
        assert sent[-1]["content"] == "next\n\nfolded"  # what was folded in is not lost
        assert "seen" in str(sent)


async def test_a_rejected_prompt_is_not_sent_again(chat: Any, server: OpenAIServer) -> None:
    server.answer(Answer(status=400, error="no"), "never asked")
    history = [message(1, Role.USER, "one"), message(1, Role.ASSISTANT, "two")]
    error = await failure(chat, LocalTurn(Prompt("bad"), messages=history))
    assert (error.reason, len(server.requests)) == ("PROVIDER_REJECTED", 1)


async def test_a_request_rejected_after_some_words_is_not_sent_again(
    chat: Any, server: OpenAIServer
) -> None:
    server.answer(Answer(text=["I see"], failure=400, error="Could not process image"), "never")
    turn = LocalTurn(Prompt("x"), messages=HISTORIES["image_url"])
    working = Working(chat, turn)
    with pytest.raises(AgentError, match="Could not process image") as failed:
        await working.task
    assert (failed.value.reason, working.text) == ("PROVIDER_REJECTED", "I see")
    assert len(server.requests) == 1


async def test_the_files_of_a_failed_turn_are_not_shown_again(
    chat: Any, server: OpenAIServer
) -> None:
    server.answer("fine")
    history = [
        message(1, Role.USER, "look", PNG, Attachment("t", "text/plain", "kept")),
        message(1, Role.ASSISTANT, "I see", finish_reason=FinishReason.ERROR),
    ]
    await collect(chat, LocalTurn(Prompt("next"), messages=history))
    (_, first, *_) = server.requests[0].messages
    note = "(the file 'a.png' of type image/png is not shown again)"
    assert first["content"] == f"look\n\n{note}\n\nt:\nkept"


# --- Errors -------------------------------------------------------------------------------------


async def test_a_conversation_that_is_too_long_has_a_reason_of_its_own(
    chat: Any, server: OpenAIServer
) -> None:
    server.answer(Answer(status=400, code="context_length_exceeded", error="too many tokens"))
    assert (await failure(chat)).reason == "PROVIDER_CONTEXT_LENGTH"


async def test_a_rate_limit_says_when_to_come_back(chat: Any, server: OpenAIServer) -> None:
    server.answer(Answer(status=429, error="slow down", retry_after="120"))
    error = await failure(chat)
    assert error.reason == "PROVIDER_RATE_LIMITED"
    assert "retry after 120 s" in error.message


async def test_the_last_error_of_a_fallback_is_the_reason(server: OpenAIServer) -> None:
    server.answer(*[Answer(status=503)] * 9)
    model = FallbackModel(OpenAIChatModel("small"), OpenAIChatModel("other"))
    async with started(ChatAgent(ModelAgent(model))) as agent:
        error = await failure(agent, ask("hi"))
    assert (error.reason, "other" in error.message) == ("PROVIDER_UNAVAILABLE", True)
