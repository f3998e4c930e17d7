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
from runlane_server.agents.worker.turn import JsonText, KeptStep
from runlane_server.core.turn import InvalidAgentEvent
from runlane_server.engine.agent_output import MAX_JSON_BYTES, ReportCheck
from runlane_server.rpc import worker_events

MANY_LISTS = "[" + ",".join(["[]"] * 300_000) + "]"
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


@pytest.mark.parametrize("text", ["", "[", "NaN", "-Infinity", "1e999", "[" * 100_000, "1" * 5000])
async def test_text_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(AgentError, match=r"result of a step is no JSON value"):
        await worker_events.events(emit(step(text)))
    assert gc.isenabled()


def test_json_of_workers_has_the_limit_of_all_json() -> None:
    value = "x" * MAX_JSON_BYTES
    for given in (value, JsonText(json.dumps(value))):
        with pytest.raises(InvalidAgentEvent, match="is the limit"):
            ReportCheck().step("k", given)
