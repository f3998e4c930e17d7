"""AG-UI: the events of a run as its own models accept them, and answers to questions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx2
import pytest
from ag_ui.core import Event as AgUiEvent
from pydantic import TypeAdapter

from runlane_server.agents.base import Turn
from runlane_server.testing import LocalServer
from runlane_web.ag_ui_door import AgUiDoor
from support.door import Door, door, reason, violation

SECONDS = 20.0

EVENT: TypeAdapter[Any] = TypeAdapter(AgUiEvent)

TURN = (
    {"reasoning": "hm"},
    {"text": "Hello"},
    {"tool_call": {"id": "t1", "name": "add", "arguments": {"a": 1}}},
    {"tool_result": {"id": "t1", "name": "add", "content": "2"}},
    {"artifact": {"id": "a", "name": "n", "data": "AAE="}},
    {"custom": {"type": "mine", "json": {"x": 1}}},
    {"text": "!"},
)


def body(run_id: str, *steps: Any, **more: Any) -> dict[str, Any]:
    """The input of a run of the scripted agent."""
    last = {"id": "m", "role": "user", "content": json.dumps(steps)}
    return {"threadId": "s", "runId": run_id, "messages": [last], **more}


def resume(run_id: str, *entries: Any) -> dict[str, Any]:
    return {"threadId": "s", "runId": run_id, "messages": [], "resume": list(entries)}


async def post(opened: Door, fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each checked by the models of AG-UI."""
    async with opened.http.stream("POST", "/ag-ui", json=fields) as response:
        assert response.status_code == 200, await response.aread()
        lines = [line async for line in response.aiter_lines()]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line[:6] == "data: "]
    for event in events:
        EVENT.validate_python(event)
    return events


async def refused(opened: Door, fields: Any) -> httpx2.Response:
    got = await opened.http.post("/ag-ui", json=fields)
    assert got.status_code == 400
    return got


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [str(event["type"]) for event in events]


async def test_a_turn_has_the_events_of_ag_ui() -> None:
    async with (
        LocalServer("scripted") as server,
        door(server.address, more=[AgUiDoor()]) as opened,
    ):
        events = await post(opened, body("r", *TURN))
        again = await post(opened, body("r", *TURN))
    assert kinds(events) == [
        "RUN_STARTED",
        *("REASONING_START", "REASONING_MESSAGE_START", "REASONING_MESSAGE_CONTENT"),
        *("REASONING_MESSAGE_END", "REASONING_END"),
        *("TEXT_MESSAGE_START", "TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_END"),
        *("TOOL_CALL_START", "TOOL_CALL_ARGS", "TOOL_CALL_END", "TOOL_CALL_RESULT"),
        *("CUSTOM", "CUSTOM"),
        *("TEXT_MESSAGE_START", "TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_END"),
        "RUN_FINISHED",
    ]
    assert (events[0]["threadId"], events[0]["runId"]) == ("s", "r")
    assert events[-1]["outcome"] == {"type": "success"}
    # The id of a run is its idempotency key.
    assert again == events


async def test_a_question_is_an_interrupt_and_resume_answers_it() -> None:
    ask = {"ask": {"text": "May I?", "tool_name": "rm", "arguments": {}}}
    async with (
        LocalServer("scripted") as server,
        door(server.address, more=[AgUiDoor()]) as opened,
    ):
        events = await post(opened, body("r", {"text": "Well. "}, ask, {"text": "Done."}))
        outcome = events[-1]["outcome"]
        assert outcome["type"] == "interrupt"
        (asked,) = outcome["interrupts"]
        assert (asked["message"], asked["metadata"]["toolName"]) == ("May I?", "rm")
        for payload in (None, "yes", {"approved": 1}):
            entry = {"interruptId": asked["id"], "status": "resolved", "payload": payload}
            got = await refused(opened, resume("r2", entry))
            assert violation(got)[0] == "resume[0].payload"
        got = await refused(opened, resume("r2", {"interruptId": "no", "status": "resolved"}))
        assert violation(got)[0] == "resume[0].interruptId"
        entry = {"interruptId": asked["id"], "status": "resolved", "payload": {"approved": True}}
        told = await post(opened, resume("r2", entry))
    texts = [event["delta"] for event in told if event["type"] == "TEXT_MESSAGE_CONTENT"]
    assert "".join(texts) == "approved {}Done."
    assert {event.get("runId", "r2") for event in told} == {"r2"}
    assert told[-1]["outcome"] == {"type": "success"}


async def two(turn: Turn) -> AsyncGenerator[str, None]:
    """Asks two people at once."""
    first, second = await asyncio.gather(turn.ask("first?"), turn.ask("second?"))
    yield f"{first} {second}"


def resolved(asked: Any, payload: Any) -> dict[str, Any]:
    return {"interruptId": asked["id"], "status": "resolved", "payload": payload}


async def both(opened: Door) -> dict[str, Any]:
    """Starts a run of `two`; returns its questions by their text."""
    fields = {"threadId": "s", "messages": [{"id": "m", "role": "user", "content": "x"}]}
    asked: list[Any] = []
    while len(asked) < 2:  # the questions are asked one after the other
        asked = (await post(opened, {**fields, "runId": "r"}))[-1]["outcome"]["interrupts"]
    return {each["message"]: each for each in asked}


async def test_one_of_two_interrupts_can_be_answered_at_a_time() -> None:
    async with (
        LocalServer(two) as server,
        door(server.address, more=[AgUiDoor()]) as opened,
        asyncio.timeout(SECONDS),
    ):
        asked = await both(opened)
        told = await post(opened, resume("r2", resolved(asked["first?"], "A")))
        assert kinds(told) == ["RUN_STARTED", "RUN_FINISHED"]
        assert told[-1]["outcome"]["interrupts"] == [asked["second?"]]
        again = await post(opened, resume("r2", resolved(asked["first?"], "A")))
        assert again == told
        told = await post(opened, resume("r3", resolved(asked["second?"], "B")))
    texts = [event["delta"] for event in told if event["type"] == "TEXT_MESSAGE_CONTENT"]
    assert "".join(texts) == "A B"
    assert told[-1]["outcome"] == {"type": "success"}


@pytest.mark.parametrize("status", ["resolved", "cancelled"])
async def test_the_same_resume_again_has_the_same_events(status: str) -> None:
    async with (
        LocalServer("scripted") as server,
        door(server.address, more=[AgUiDoor()]) as opened,
        asyncio.timeout(SECONDS),
    ):
        ask = {"ask": {"text": "Which?"}}
        events = await post(opened, body("r", {"text": "Well. "}, ask, {"text": "Done."}))
        (asked,) = events[-1]["outcome"]["interrupts"]
        entry = {**resolved(asked, "x"), "status": status}
        told = await post(opened, resume("r2", entry))
        assert await post(opened, resume("r2", entry)) == told
        # Another call is no repetition.
        if status == "resolved":
            got = await refused(opened, resume("r3", entry))
            assert violation(got)[0] == "resume[0].interruptId"


async def test_an_interrupt_that_is_cancelled_cancels_the_run() -> None:
    async with (
        LocalServer("scripted") as server,
        door(server.address, more=[AgUiDoor()]) as opened,
    ):
        events = await post(opened, body("r", {"ask": {"text": "Which?"}}))
        (asked,) = events[-1]["outcome"]["interrupts"]
        told = await post(opened, resume("r2", {"interruptId": asked["id"], "status": "cancelled"}))
    assert told[-1]["outcome"] == {"type": "cancelled"}


async def test_a_run_that_fails_ends_with_an_error() -> None:
    async with (
        LocalServer("scripted") as server,
        door(server.address, more=[AgUiDoor()]) as opened,
    ):
        events = await post(opened, body("r", {"fail": "no luck", "reason": "LUCK"}))
    assert events[-1] == {"type": "RUN_ERROR", "message": "no luck", "code": "LUCK"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "threadId"),
        ({"threadId": "s"}, "runId"),
        ({"threadId": "s", "runId": "r"}, "messages"),
        ({"threadId": "s", "runId": "r", "messages": [{"role": "assistant"}]}, "messages"),
        ({"threadId": "s", "runId": "r", "messages": [{"role": "user"}]}, "messages"),
        ({"threadId": "s", "runId": "r", "resume": {"a": 1}}, "resume"),
        ({"threadId": "s", "runId": "r", "resume": [7]}, "resume[0].interruptId"),
        (
            {
                "threadId": "s",
                "runId": "r",
                "messages": [{"role": "user", "content": [{"type": "image"}]}],
            },
            "messages",
        ),
    ],
)
async def test_input_that_is_none_is_refused(fields: dict[str, Any], field: str) -> None:
    async with LocalServer() as server, door(server.address, more=[AgUiDoor()]) as opened:
        await opened.http.post("/v1/sessions", json={"sessionId": "s"})
        assert violation(await refused(opened, fields))[0] == field


async def test_a_caller_needs_a_token() -> None:
    async with LocalServer() as server, door(server.address, more=[AgUiDoor()]) as opened:
        got = await opened.http.post("/ag-ui", json={}, headers={"Authorization": "Bearer x"})
        assert (got.status_code, reason(got)) == (401, "UNAUTHENTICATED")
        assert (await opened.http.get("/ag-ui")).status_code == 405
