"""Answers of endpoints that are only nearly compatible: values of any type, anywhere."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from pydantic_ai import Agent as ModelAgent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from structlog.testing import capture_logs

from runlane_server.agents.base import Agent, AgentError, Report
from runlane_server.agents.chat.agent import ChatAgent
from runlane_server.core.turn import InvalidAgentEvent
from runlane_server.engine.agent_output import ReportCheck
from support.openai_server import Answer, OpenAIServer
from support.turns import Working, ask, collect, started, texts

REASONS = {
    "PROVIDER_AUTH",
    "PROVIDER_CONTEXT_LENGTH",
    "PROVIDER_ERROR",
    "PROVIDER_RATE_LIMITED",
    "PROVIDER_REJECTED",
    "PROVIDER_UNAVAILABLE",
    "MODEL_ERROR",
}
"""The reasons that docs/histories.md lists."""


def chunk(delta: Any, finish: Any = None) -> dict[str, Any]:
    """A chunk of an answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": [choice]}  # fmt: skip


CALL = {"index": 0, "id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}

CHUNKS = [
    chunk({"role": "assistant", "content": "a", "reasoning_content": "hm"}),
    chunk({"content": "b", "refusal": None, "tool_calls": [CALL]}),
    {**chunk({}, "stop"), "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}},
]
"""A valid answer."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values within a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items if isinstance(value, dict | list) else ():
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


PLACES = sorted(set(places(CHUNKS)), key=str)

ODD: list[Any] = [None, 0, -1, 1.5, 10**30, "", "x", "\ud83d", [], [1], [None], {}, {"a": 1}, True]


def with_odd_values(*odd: tuple[tuple[Any, ...], Any], chunks: Sequence[Any] = CHUNKS) -> list[Any]:
    """The valid answer with other values at some places."""
    answer: list[Any] = copy.deepcopy(list(chunks))
    for path, value in odd:
        inner: Any = answer
        try:
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = copy.deepcopy(value)
        except (TypeError, LookupError):
            pass  # a change before this one removed the place
    return answer


async def check_end(*answers: list[Any]) -> None:
    """Lets a model give the answers, and checks that the turn ends as documented."""
    async with OpenAIServer().serving() as server:
        server.answer(*(Answer(chunks=chunks) for chunks in answers), *["fine"] * 5)
        async with AsyncOpenAI(base_url=server.base_url, api_key="x", max_retries=0) as client:
            model = OpenAIChatModel("small", provider=OpenAIProvider(openai_client=client))
            own: ModelAgent[None, str] = ModelAgent(model)

            @own.tool_plain
            def add() -> str:
                return "3"

            async with started(ChatAgent(own)) as agent:
                problem = await _problem_of(agent)
    assert problem is None or problem.reason in REASONS, problem
    assert problem is None or "Error" not in problem.message, problem


async def _problem_of(agent: Agent) -> AgentError | None:
    """The error of a turn; None if it completes, with events that the engine takes."""
    check = ReportCheck()
    try:
        for event in await collect(agent, ask("hi")):
            _ = check.report(event) if isinstance(event, Report) else check.event(event)
    except AgentError as error:
        return error
    except InvalidAgentEvent as error:  # the engine refuses a count above 2^63
        if not str(error).startswith("Usage."):
            raise
    return None


# pydantic-ai warns of values that it cannot use
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(ODD)), min_size=1, max_size=3))
def test_r21_an_answer_with_odd_values_ends_the_turn_as_documented(
    odd: list[tuple[tuple[Any, ...], Any]],
) -> None:
    with capture_logs():  # formatting the errors would take most of the time
        asyncio.run(check_end(with_odd_values(*odd)))


async def test_an_answer_that_cannot_be_read_fails_and_keeps_its_text(
    chat: Any, server: OpenAIServer
) -> None:
    server.answer(Answer(chunks=[chunk({"content": "half"}), chunk("no delta")]))
    working = Working(chat, ask("hi"))
    with pytest.raises(AgentError, match=r"^the answer of m cannot be read$") as failed:
        await working.task
    assert (failed.value.reason, working.text) == ("PROVIDER_ERROR", "half")


async def test_an_answer_that_cannot_be_put_in_order_fails_and_keeps_its_text(
    chat: Any, server: OpenAIServer
) -> None:
    """A call without a name is no part of an answer, and pydantic-ai counts the next one wrong."""
    nameless = {**CALL, "function": {"arguments": "{"}}
    named = {**CALL, "index": 1, "id": "b"}
    deltas = [{"tool_calls": [nameless]}, {"content": "half"}, {"tool_calls": [named]}]
    server.answer(Answer(chunks=[*map(chunk, deltas), chunk({}, "tool_calls")]))
    working = Working(chat, ask("hi"))
    with pytest.raises(AgentError, match=r"^the answer of m cannot be read$") as failed:
        await working.task
    assert (failed.value.reason, working.text) == ("PROVIDER_ERROR", "half")


async def test_the_valid_answer_is_valid(chat: Any, server: OpenAIServer) -> None:
    server.answer(Answer(chunks=[CHUNKS[0], CHUNKS[2]]))
    assert texts(await collect(chat, ask("hi"))) == ["a"]
