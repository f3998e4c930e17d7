"""The scripted agent and its latches."""

from __future__ import annotations

import asyncio
import json

import pytest

from runlane_server.agents.base import AgentError, Artifact, Custom, Report, Result
from runlane_server.agents.scripted.agent import BAD_SCRIPT, ScriptedAgent
from runlane_server.agents.scripted.latches import Latches
from runlane_server.core.model import (
    FinishReason,
    Prompt,
    ReasoningDelta,
    Role,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)
from support.turns import LocalTurn, Working, ask, collect, message, texts, usage


def script(*steps: object) -> LocalTurn:
    return ask(json.dumps(steps))


async def test_each_kind_of_step_yields_its_events() -> None:
    events = await collect(
        ScriptedAgent(),
        script(
            {"reasoning": "hm"},
            {"text": "so", "repeat": 2},
            {"tool_call": {"id": "1", "name": "look", "arguments": {"at": 3}}},
            {"tool_result": {"id": "1", "name": "look", "content": "seen", "is_error": True}},
            {"artifact": {"id": "a", "name": "n", "data": "/w==", "last": False}},
            {"custom": {"type": "t", "json": [1]}},
            {"result": {"n": 1}},
            {"usage": {"input_tokens": 3}},
            {"model": "m"},
            {"finish": "length"},
        ),
    )
    assert events == [
        ReasoningDelta("hm"),
        TextDelta("so"),
        TextDelta("so"),
        ToolCall("1", "look", '{"at": 3}'),
        ToolResult("1", "look", "seen", is_error=True),
        Artifact(artifact_id="a", name="n", data=b"\xff", last=False),
        Custom("t", [1]),
        Result({"n": 1}),
        Report(usage=Usage(input_tokens=3)),
        Report(model="m"),
        Report(finish_reason=FinishReason.LENGTH),
    ]
    assert usage(events) == Usage(input_tokens=3)


async def test_a_prompt_that_is_no_script_is_echoed() -> None:
    assert texts(await collect(ScriptedAgent(), ask("hello {there}"))) == ["hello {there}"]


async def test_only_a_step_takes_folded_prompts() -> None:
    turn = script({"text": "a"}, {"step": True}, {"text": "b"})
    turn.waiting = ["x", "y"]
    found = texts(await collect(ScriptedAgent(), turn))
    assert found == ["a", "[folded: x]", "[folded: y]", "b"]
    untaken = script({"text": "a"})
    untaken.waiting = ["x"]
    await collect(ScriptedAgent(), untaken)
    assert untaken.waiting == ["x"]


async def test_say_yields_each_fact_about_the_turn() -> None:
    kinds = ["attempt", "history", "metadata", "run_id", "session_id"]
    turn = LocalTurn(
        Prompt(json.dumps([{"say": kind} for kind in kinds])),
        messages=[message(1, Role.USER, "hi"), message(1, Role.ASSISTANT, "yes")],
        metadata={"k": "v"},
        attempt=2,
    )
    found = texts(await collect(ScriptedAgent(), turn))
    assert found == ["2", "user: hi\nassistant: yes", '{"k": "v"}', "r1", "s1"]


async def test_fail_and_crash_raise_their_errors() -> None:
    with pytest.raises(AgentError) as failed:
        await collect(ScriptedAgent(), script({"fail": "no luck", "reason": "LUCK"}))
    assert (failed.value.reason, failed.value.message) == ("LUCK", "no luck")
    with pytest.raises(RuntimeError, match="boom"):
        await collect(ScriptedAgent(), script({"crash": "boom"}))


async def test_one_run_opens_the_latch_of_another() -> None:
    agent = ScriptedAgent()
    waiting = Working(agent, script({"text": "before"}, {"wait": "g"}, {"text": "after"}))
    await waiting.said("before")
    await agent.latches.reached("g")
    assert waiting.text == "before"
    await collect(agent, script({"open": "g"}))
    await waiting.task
    assert waiting.text == "beforeafter"


async def test_a_run_at_a_latch_can_be_cancelled() -> None:
    agent = ScriptedAgent()
    working = Working(agent, script({"wait": "g"}))
    await agent.latches.reached("g")
    await working.cancel()


async def test_a_run_can_ignore_cancels_until_its_latch_opens() -> None:
    latches = Latches()
    steps = script({"wait": "g", "ignore_cancel": True}, {"text": "still here"})
    working = Working(ScriptedAgent(latches), steps)
    await latches.reached("g")
    for _ in range(2):
        working.task.cancel()
        await latches.cancel_ignored("g")
    await asyncio.sleep(0)
    assert not working.task.done()
    latches.open("g")
    await working.task
    assert working.text == "still here"


async def test_a_cancel_ends_a_step_that_repeats_without_end() -> None:
    working = Working(ScriptedAgent(), script({"text": "x", "repeat": 10**9}))
    await working.said("x")
    await working.cancel()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[", "invalid JSON"),
        ("[" * 100_000, "invalid JSON"),
        ("[1]", "step 1: 1 is not an object"),
        ('[{"text": "a"}, {"txt": "b"}]', "step 2: exactly one of these is required: text, "),
        ('[{"text": "a", "wait": "g"}]', "step 1: exactly one of these is required"),
        ('[{"text": 1}]', "step 1: 1 is not a string"),
        ('[{"text": "a", "reason": "b"}]', "step 1: 'text' does not accept 'reason'"),
        ('[{"finish": "tired"}]', "'tired' is not a valid FinishReason"),
        ('[{"tool_call": {"id": "1"}}]', "step 1: 'name' is missing"),
        ('[{"usage": {"euros": 1}}]', "unexpected keyword argument 'euros'"),
        ('[{"say": "hello"}]', "'hello' is not one of attempt, history"),
        ('[{"text": "a", "repeat": -1}]', "-1 is not a non-negative integer"),
    ],
)
async def test_a_bad_script_is_rejected_before_its_first_step(text: str, complaint: str) -> None:
    with pytest.raises(AgentError) as failed:
        await anext(ScriptedAgent().run(ask(text)))
    assert failed.value.reason == BAD_SCRIPT
    assert complaint in failed.value.message
