"""Answers that the chat agent reads without the SDK: nothing but their cost may differ."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic_ai import Agent as ModelAgent
from structlog.testing import capture_logs

from agents.chat.test_odd_answers import CALL, CHUNKS, ODD, PLACES, chunk, with_odd_values
from runlane_server.agents.base import Agent, AgentError, AgentEvent, Report
from runlane_server.agents.chat import direct as direct_module
from runlane_server.agents.chat.agent import ChatAgent
from runlane_server.agents.chat.plain import MAX_EVENT_BYTES, EventStream, Odd, data_of
from runlane_server.agents.loader import AgentSettings, load_agent
from runlane_server.core.model import (
    Attachment,
    Prompt,
    ReasoningDelta,
    Role,
    TextDelta,
    ToolCall,
    ToolResult,
)
from support.models import KEY
from support.openai_server import Answer, OpenAIServer
from support.turns import LocalTurn, Working, ask, collect, message, started, texts, usage


@pytest.fixture(autouse=True)
def endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def direct() -> Agent:
    """An agent that reads plain answers itself."""
    return load_agent("chat:openai:small", AgentSettings(chat_max_retries=0))


def by_sdk() -> Agent:
    """The same agent, for which the SDK and pydantic-ai read all answers."""
    return ChatAgent(ModelAgent("openai-chat:small", model_settings={"max_retries": 0}))


def content(events: Sequence[AgentEvent]) -> list[tuple[str, str]]:
    """The events of a turn, without their reports; adjacent deltas are one."""
    merged: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, TextDelta | ReasoningDelta):
            kind = type(event).__name__
            if merged and merged[-1][0] == kind:
                merged[-1] = (kind, merged[-1][1] + event.text)
            else:
                merged.append((kind, event.text))
        elif not isinstance(event, Report):
            merged.append((type(event).__name__, str(event)))
    return merged


async def outcome(make: Callable[[], Agent], *answers: Answer) -> tuple[Any, ...]:
    """The content and the end of a turn, and the number of requests."""
    with pytest.MonkeyPatch.context() as patch:
        async with OpenAIServer().serving() as server:
            patch.setenv("OPENAI_BASE_URL", server.base_url)
            async with started(make()) as agent:
                return await turn_of(agent, server, *answers)


async def turn_of(agent: Agent, server: OpenAIServer, *answers: Answer) -> tuple[Any, ...]:
    server.answer(*answers, *["fine"] * 5)
    working = Working(agent, ask("hi"))
    await asyncio.wait({working.task})
    error = working.task.exception()
    if error is not None and not isinstance(error, AgentError):
        raise error
    reports = [event for event in working.events if isinstance(event, Report)]
    ends = (
        (usage(working.events), reports[-1].finish_reason or reports[0].finish_reason)
        if error is None
        else (error.reason, error.message)
    )
    return (content(working.events), *ends, len(server.requests))


def chunks(*deltas: dict[str, Any], finish: str = "stop") -> Answer:
    """An answer of some deltas."""
    return Answer(chunks=[*map(chunk, deltas), chunk({}, finish)])


ANSWERS = {
    "plain": Answer(text=["a ", "b"]),
    "reasoning": Answer(reasoning=["hm", "m"], text=["a"]),
    "reasoning in tags": chunks(
        *({"content": piece} for piece in ("<think>", "h", "m", "</think>", "a", "b"))
    ),
    "tags without an end": chunks(*({"content": piece} for piece in ("a", "<think>", "h"))),
    "nothing": Answer(),
    "a blank": Answer(text=[" \n"]),
    "only reasoning": Answer(reasoning=["hm"]),
    "a call after text": Answer(text=["a"], tool_calls=[("c", "none", "{}")]),
    "a call between": chunks({"content": "a"}, {"tool_calls": [CALL]}, {"content": "b"}),
    "a refusal": chunks({"content": "a"}, {"refusal": "no"}),
    "parts": chunks({"content": [{"type": "text", "text": "a"}]}, {"content": "b"}),
    "reasoning between": chunks({"content": "a"}, {"reasoning": "h"}, {"content": "b"}),
    "both reasonings": chunks({"reasoning": "h", "reasoning_content": "x", "content": "a"}),
    "cut": Answer(text=["half"], cut=True),
    "cut at once": Answer(cut=True),
    "broken": Answer(text=["half"], drop=True),
    "broken at once": Answer(drop=True),
    "failed": Answer(text=["half"], failure=503, error="overloaded"),
    "failed at once": Answer(failure=400, error="too long"),
    "halves": chunks({"content": "a\ud83d"}, {"content": "\ude00b"}, {"refusal": "no"}),
    "lengths": Answer(text=["half"], finish="length"),
    "no text before the length": Answer(finish="length"),
    "another reason": Answer(text=["half"], finish="guardrail"),
    "counting": Answer(text=["a"] * 5, counting=True),
    "refused": Answer(status=400, error="no"),
    "limited": Answer(status=429, error="slow down", retry_after="120"),
    "without anything": Answer(status=204),
    "long": Answer(text=["a", "b" * 2 * MAX_EVENT_BYTES, "c"]),
    "no chunks": Answer(chunks=[]),
    "a list": Answer(chunks=[chunk({"content": "a"}), []]),
}


@pytest.mark.filterwarnings("ignore")  # pydantic-ai warns of values that it cannot use
@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_ends_the_turn_as_with_the_sdk(name: str) -> None:
    answer = ANSWERS[name]
    found = await outcome(direct, copy.deepcopy(answer))
    assert found == await outcome(by_sdk, answer)


class Pair:
    """Both agents before one endpoint, for many turns: a start takes longer than a turn."""

    def __init__(self, server: OpenAIServer, agents: Sequence[Agent]) -> None:
        self._server = server
        self._agents = agents

    async def outcomes(self, answer: Answer) -> list[tuple[Any, ...]]:
        """The outcome of a turn with an answer, for each agent."""
        found = []
        for agent in self._agents:
            self._server.forget()
            found.append(await turn_of(agent, self._server, answer))
        return found


@asynccontextmanager
async def both_started() -> AsyncIterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        async with OpenAIServer().serving() as server:
            patch.setenv("OPENAI_BASE_URL", server.base_url)
            async with started(direct()) as one, started(by_sdk()) as other:
                yield Pair(server, (one, other))


@pytest.fixture(scope="module")
def run_both() -> Iterator[Callable[[Answer], list[tuple[Any, ...]]]]:
    with asyncio.Runner() as runner:
        opened = both_started()
        pair = runner.run(opened.__aenter__())
        yield lambda answer: runner.run(pair.outcomes(answer))
        runner.run(opened.__aexit__(None, None, None))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(ODD)), min_size=1, max_size=2))
@example([((2, "usage", "prompt_tokens"), 1.5)])
@example([((2, "usage", "completion_tokens"), None)])
@example([((0, "choices", 0, "delta", "reasoning_content"), ["x"])])
def test_r21_odd_values_end_the_turn_as_with_the_sdk(
    run_both: Callable[[Answer], list[tuple[Any, ...]]], odd: list[tuple[Any, Any]]
) -> None:
    plain = copy.deepcopy(CHUNKS)
    del plain[1]["choices"][0]["delta"]["tool_calls"]  # otherwise the SDK reads every answer
    answer = Answer(chunks=with_odd_values(*odd, chunks=plain))
    with capture_logs():
        found, expected = run_both(answer)
    assert found == expected


# --- What is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attachments", [(), (Attachment("f", "image/png", b"\x01"),), (Attachment("t", "text/x", "t"),)]
)
async def test_the_request_is_that_of_the_sdk(
    attachments: tuple[Attachment, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [
        message(1, Role.USER, "one", *attachments),
        message(1, Role.ASSISTANT, "look", ToolCall("c", "see", '{"at":1}')),
        message(1, Role.TOOL, ToolResult("c", "see", "nothing", is_error=True)),
        message(1, Role.ASSISTANT, "answer one"),
    ]
    bodies: list[dict[str, Any]] = []
    for make in (direct, by_sdk):
        async with OpenAIServer().serving() as server:
            monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
            server.answer("fine")
            turn = LocalTurn(Prompt("two", attachments), history, waiting=["three"])
            async with started(make()) as agent:
                await collect(agent, turn)
            bodies.append(server.requests[0].body)
    assert bodies[0] == bodies[1]


async def test_a_plain_answer_needs_no_sdk_and_another_no_second_request(
    server: OpenAIServer,
) -> None:
    odd = chunks({"content": "a"}, {"refusal": "no"})
    server.answer("fine", odd)
    async with started(direct()) as agent:
        assert texts(await collect(agent, ask("hi"))) == ["fine"]
        assert texts(await collect(agent, ask("hi"))) == ["a"]
    assert [request.headers["user-agent"] for request in server.requests] == ["runlane"] * 2


async def test_a_prompt_that_waits_while_an_odd_answer_arrives_is_answered(
    server: OpenAIServer,
) -> None:
    """The request of the odd answer was sent, so no prompt can join it any more."""
    turn = ask("first")
    parts = {"content": [{"type": "text", "text": "b"}]}
    server.answer(chunks({"content": "a"}, parts), "second")
    async with started(direct()) as agent:
        working = Working(agent, turn)
        await server.arrived(1)
        turn.waiting = ["later"]
        await working.task
    assert working.text == "absecond"
    assert [m["content"] for m in server.requests[1].messages] == ["first", "ab", "later"]


@pytest.mark.parametrize("url", ["127.0.0.1:9/v1", "v1", "http:///v1"])
async def test_a_url_without_a_host_fails_the_run_as_with_the_sdk(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    found: list[str] = []
    for make in (direct, by_sdk):
        async with started(make()) as agent:
            with pytest.raises(AgentError) as failed:
                await collect(agent, ask("hi"))
            found.append(str(failed.value))
    assert found[0] == found[1]


@pytest.mark.parametrize("parts", [[], ["half"], [{"content": [{"type": "text", "text": "half"}]}]])
async def test_an_endpoint_that_falls_silent_is_unavailable(
    parts: list[Any], server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_module, "READ_SECONDS", 0.2)
    texts_ = [part if isinstance(part, str) else part["content"] for part in parts]
    server.answer(Answer(text=texts_, hold=True))
    async with started(direct()) as agent:
        working = Working(agent, ask("hi"))
        with pytest.raises(AgentError) as failed:
            await working.task
    assert (failed.value.reason, working.text) == ("PROVIDER_UNAVAILABLE", "half" * len(parts))
    assert server.requests[0].disconnected.is_set()


async def test_the_trace_of_the_run_goes_with_the_request(server: OpenAIServer) -> None:
    server.answer("fine")
    turn = LocalTurn(Prompt("hi"), traceparent=f"00-{'a' * 32}-{'b' * 16}-01")
    async with started(direct()) as agent:
        await collect(agent, turn)
    assert server.requests[0].headers["traceparent"] == turn.traceparent


# --- Events of a stream -------------------------------------------------------------------------


@given(st.data())
def test_events_are_the_same_however_the_bytes_arrive(data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.text(alphabet="aé☃\U0001f600 {}:"), min_size=1))
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    whole = "".join(f": ping{end}{end}data: {text}{end}{end}" for text in wanted).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    stream = EventStream()
    found: list[str] = []
    for begin, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        found += map(data_of, stream.events(whole[begin:stop]))
    assert found == [text for one in wanted for text in ("", one)]
    assert stream.rest == b""


@pytest.mark.parametrize("event", [b"<html>", b"event: x", b"data: \xff", b"\xef\xbb\xbfdata: {}"])
def test_another_event_is_odd(event: bytes) -> None:
    with pytest.raises(Odd):
        data_of(event)


def test_the_data_of_an_event_may_have_several_lines() -> None:
    assert json.loads(data_of(b"event: x\ndata:{\nid: 1\ndata: }")) == {}
