"""JSON that workers send: read and written once, and not for long at a time."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from runlane.v1 import run_pb2
from runlane.worker.v1 import worker_service_pb2 as pb
from runlane_server.agents.base import AgentError, Artifact, Custom, Result
from runlane_server.agents.json_parts import MAX_JSON_PARTS, TOO_MANY_PARTS
from runlane_server.agents.worker.turn import JsonText, KeptStep
from runlane_server.core.model import ToolCall
from runlane_server.core.turn import InvalidAgentEvent
from runlane_server.engine.agent_output import MAX_JSON_BYTES, ReportCheck
from runlane_server.rpc import worker_events

MANY_LISTS = "[" + ",".join(["[]"] * (MAX_JSON_PARTS - 1)) + "]"
"""A value whose making would begin hundreds of garbage collections."""


def step(result: str) -> pb.Event:
    return pb.Event(step=run_pb2.RunEvent.Step(key="k", result=result))


def custom(text: str) -> pb.Event:
    return pb.Event(custom=run_pb2.RunEvent.Custom(type="t", json=text))


def artifact(text: str) -> pb.Event:
    return pb.Event(artifact=run_pb2.Artifact(artifact_id="a", json=text, last=True))


def emit(*events: pb.Event) -> pb.WorkRequest.Emit:
    return pb.WorkRequest.Emit(number=1, events=events)


@contextmanager
def collections() -> Iterator[list[str]]:
    """The garbage collections that begin meanwhile."""
    seen: list[str] = []

    def note(phase: str, _: Any) -> None:
        if phase == "start":
            seen.append(phase)

    gc.callbacks.append(note)
    try:
        yield seen
    finally:
        gc.callbacks.remove(note)


async def test_large_json_begins_no_garbage_collection_and_is_not_kept_as_objects() -> None:
    sent = emit(step(MANY_LISTS), step(MANY_LISTS))
    with collections() as seen:
        _, found = await worker_events.events(sent)
    assert len(seen) <= 2
    assert gc.isenabled()
    for event in found:
        assert isinstance(event, KeptStep)
        assert event.result == MANY_LISTS
        # The engine stores it as it is.
        assert ReportCheck().step("k", event.result).json == MANY_LISTS


async def test_the_event_loop_does_other_work_between_large_events() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    large = "1" + " " * worker_events.MAX_BYTES_AT_ONCE
    await worker_events.events(emit(*[step(large)] * 10))
    assert turns == 9
    await worker_events.events(emit(*[step("1")] * worker_events.MAX_EVENTS))
    assert turns == 9
    counting.cancel()


WRITTEN = {
    ' { "a" : [ 1 , 2.50 ] } ': '{"a":[1,2.5]}',
    '{"a":1,"a":2}': '{"a":2}',
    r'"\u00e9\ud800"': '"é\ufffd"',
    '"text"': '"text"',
    "null": "null",
}


@pytest.mark.parametrize("text", WRITTEN)
async def test_json_is_stored_strict_and_compact(text: str) -> None:
    _, found = await worker_events.events(emit(step(text), custom(text), artifact(text)))
    check, stored = ReportCheck(), []
    for event in found:
        if isinstance(event, KeptStep):
            stored.append(check.step(event.key, event.result).json)
        else:
            assert isinstance(event, Custom | Artifact)
            body: Any = check.event(event)
            stored.append(body.json if isinstance(event, Custom) else body.content)
    _, result = worker_events.finished(pb.WorkRequest.Finish(result_json=text))
    assert isinstance(result, Result)
    stored.append(check.result(result))
    assert stored == [WRITTEN[text]] * 4
    assert {type(one) for one in stored} == {str}


@pytest.mark.parametrize("text", ["", "[", "NaN", "-Infinity", "1e999", "[" * 60_000, "1" * 5000])
async def test_text_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(AgentError, match=r"result of a step is no JSON value"):
        await worker_events.events(emit(step(text)))
    assert gc.isenabled()


async def test_json_that_is_too_large_is_refused_before_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json, "loads", None)  # calling it would raise another error
    with pytest.raises(AgentError, match=f"{MAX_JSON_BYTES} is the limit"):
        await worker_events.events(emit(step(" " * MAX_JSON_BYTES + "1")))
    for field in ("arguments_json", "schema_json", "default_json"):
        question = pb.Question(key="k")
        setattr(question, field, " " * (256 << 10) + "1")
        ask = pb.WorkRequest.Ask(questions=[question])
        with pytest.raises(AgentError, match=f"{256 << 10} is the limit") as raised:
            worker_events.questions(ask)
        assert raised.value.reason == "QUESTION_INVALID"


async def test_json_of_very_many_lists_is_refused_before_it_is_parsed() -> None:
    nested = "[" + "[]," * (MAX_JSON_PARTS - 1) + '"' + "[" * MAX_JSON_PARTS + '\\"["]'
    assert await worker_events.events(emit(step(nested)))
    with pytest.raises(AgentError, match=TOO_MANY_PARTS):
        await worker_events.events(emit(step("[[]," + nested[1:])))
    arguments = ToolCall("c", "tool", '{"a": ' + nested + "}")
    call = ReportCheck().event(arguments)
    assert isinstance(call, ToolCall)
    assert json.loads(call.arguments_json) == {"INVALID_JSON": arguments.arguments_json}


def test_json_of_workers_has_the_limit_of_all_json() -> None:
    value = "x" * MAX_JSON_BYTES
    for given in (value, JsonText(json.dumps(value))):
        with pytest.raises(InvalidAgentEvent, match="is the limit"):
            ReportCheck().step("k", given)
