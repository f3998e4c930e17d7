"""A task that asks people is INPUT_REQUIRED; a message to it is the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb

from runlane_a2a.parts import data_of, data_part
from runlane_server.agents.base import Turn
from runlane_server.testing import LocalServer
from support.a2a_door import A2A, TRANSPORTS, Failed, a2a_door, message, script

SECONDS = 20.0

ASK = {"ask": {"text": "Which?"}}
APPROVE = {"ask": {"text": "May I?", "tool_name": "rm", "arguments": {"path": "/x"}}}


def question(task: pb.Task) -> dict[str, Any]:
    """The data of the question in the status of a task."""
    assert task.status.state == pb.TASK_STATE_INPUT_REQUIRED
    found = data_of(task.status.message.parts)
    assert found is not None
    return found


def answer(task: pb.Task, *parts: pb.Part | str, message_id: str = "a") -> pb.SendMessageRequest:
    return message(*parts, task_id=task.id, message_id=message_id)


async def refused(a2a: A2A, request: pb.SendMessageRequest) -> Failed:
    with pytest.raises(Failed) as failed:
        await a2a.call("rest", "SendMessage", request)
    return failed.value


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_message_to_a_task_that_waits_answers_it(transport: str) -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        task = await a2a.task(transport, script(ASK, context_id="c"))
        assert question(task)["kind"] == "text"
        assert task.status.message.parts[0].text == "Which?"
        assert await a2a.get(task.id, transport) == task
        done = await a2a.task(transport, answer(task, "that one"))
        assert (done.id, done.context_id) == (task.id, "c")
        assert done.status.state == pb.TASK_STATE_COMPLETED
        texts = [each.parts[0].text for each in done.history]
        assert texts[1:] == ["Which?", "that one"]
        assert await a2a.get(task.id, transport) == done


async def test_a_stream_ends_when_people_are_asked_and_the_answer_has_its_own() -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        request = script(ASK, {"text": "thanks"})
        asked = [each async for each in a2a.stream("grpc", "SendStreamingMessage", request)]
        assert asked[-1].status_update.status.state == pb.TASK_STATE_INPUT_REQUIRED
        reply = answer(asked[0].task, "that")
        told = [each async for each in a2a.stream("grpc", "SendStreamingMessage", reply)]
    assert told[0].task.id == asked[0].task.id
    assert told[-1].status_update.status.state == pb.TASK_STATE_COMPLETED


async def test_the_same_answer_again_changes_nothing_and_another_is_refused() -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        task = await a2a.task("jsonrpc", script(ASK, ASK | {"ask": {"text": "And?"}}))
        second = await a2a.task("jsonrpc", answer(task, "one"))
        assert second.status.message.parts[0].text == "And?"
        assert await a2a.task("jsonrpc", answer(task, "one")) == second
        # Some callers use an id twice: another text is another answer.
        done = await a2a.task("jsonrpc", answer(task, "two"))
        assert done.status.state == pb.TASK_STATE_COMPLETED
        late = await refused(a2a, answer(task, "three"))
    assert late.reasons == ["UNSUPPORTED_OPERATION", "TASK_ENDED"]
    assert late.fields == ["message.taskId"]


async def test_an_approval_must_name_its_question() -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        task = await a2a.task("jsonrpc", script(APPROVE))
        asked = question(task)
        assert (asked["toolName"], asked["argumentsJson"]) == ("rm", '{"path": "/x"}')
        for part in (
            "yes",
            data_part({"approved": True}),
            data_part({"inputRequestId": asked["inputRequestId"], "approved": "yes"}),
            data_part({"inputRequestId": "other", "approved": True}),
            data_part(
                {
                    "inputRequestId": asked["inputRequestId"],
                    "questionDigest": "other",
                    "approved": True,
                }
            ),
        ):
            failed = await refused(a2a, answer(task, part))
            assert failed.reasons == ["INVALID_PARAMS", "ANSWER_INVALID"]
            assert failed.fields == ["message.parts"]
        given = data_part({**asked, "approved": False, "reason": "no"})
        done = await a2a.task("jsonrpc", answer(task, given))
    assert done.status.state == pb.TASK_STATE_COMPLETED
    assert data_of(done.history[-1].parts) == {"approved": False, "reason": "no"}


async def test_a_choice_and_a_form_are_checked_by_the_server() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        task = await a2a.task(
            "rest",
            script(
                {"ask": {"text": "Which?", "choices": ["a", "b"]}},
                {"ask": {"text": "How many?", "schema": schema}},
            ),
        )
        assert question(task)["choices"] == ["a", "b"]
        failed = await refused(a2a, answer(task, "c"))
        assert failed.reasons == ["INVALID_PARAMS", "ANSWER_INVALID"]
        task = await a2a.task("rest", answer(task, "b"))
        assert "required" in question(task)["schemaJson"]
        assert (await refused(a2a, answer(task, "7"))).fields == ["message.parts"]
        done = await a2a.task("rest", answer(task, data_part({"n": 7})))
    assert done.status.state == pb.TASK_STATE_COMPLETED
    assert data_of(done.history[-1].parts) == {"n": 7}


async def two(turn: Turn) -> AsyncGenerator[str, None]:
    """Asks two people at once."""
    first, second = await asyncio.gather(turn.ask("first?"), turn.ask("second?"))
    yield f"{first} {second}"


async def both(a2a: A2A) -> tuple[pb.Task, list[dict[str, Any]]]:
    """Starts a task of `two`; returns it with the data of its questions, "first?" first."""
    task = await a2a.task("rest", message("x", context_id="c"))
    while len(task.status.message.parts) < 4:  # the questions are asked one after the other
        task = await a2a.get(task.id)
    parts = task.status.message.parts
    found = {parts[n].text: data_of([parts[n + 1]]) or {} for n in (0, 2)}
    return task, [found["first?"], found["second?"]]


def named(data: dict[str, Any]) -> pb.Part:
    return data_part({"inputRequestId": data["inputRequestId"]})


async def test_the_status_has_all_open_questions_until_each_is_answered() -> None:
    async with (
        LocalServer(two) as server,
        a2a_door(server.address) as a2a,
        asyncio.timeout(SECONDS),
    ):
        task, (first, second) = await both(a2a)
        failed = await refused(a2a, answer(task, "which?"))
        assert "2 questions are open" in failed.message
        task = await a2a.task("rest", answer(task, "A", named(first)))
        assert question(task) == second
        assert await a2a.get(task.id) == task
        listed = await a2a.call("rest", "ListTasks", pb.ListTasksRequest(context_id="c"))
        assert [each.status for each in listed.tasks] == [task.status]
        done = await a2a.task("rest", answer(task, "B", named(second), message_id="b"))
    assert done.status.state == pb.TASK_STATE_COMPLETED
    assert done.artifacts[0].parts[0].text == "A B"
    texts = [each.parts[0].text for each in done.history]
    assert sorted(texts) == ["A", "B", "first?", "second?", "x"]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_stream_of_an_answer_ends_with_the_questions_that_are_left(
    transport: str,
) -> None:
    async with (
        LocalServer(two) as server,
        a2a_door(server.address) as a2a,
        asyncio.timeout(SECONDS),
    ):
        task, (first, second) = await both(a2a)
        follower = a2a.stream("grpc", "SubscribeToTask", pb.SubscribeToTaskRequest(id=task.id))
        await anext(follower)
        request = answer(task, "A", named(first))
        told = [each async for each in a2a.stream(transport, "SendStreamingMessage", request)]
        assert question(told[-1].task) == second
        # A follower sees the change too.
        (seen,) = [each async for each in follower]
        assert seen.status_update.status == told[-1].task.status


async def test_a_task_that_asks_nothing_takes_no_message() -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        request = script({"wait": "g"})
        request.configuration.return_immediately = True
        task = await a2a.task("jsonrpc", request)
        failed = await refused(a2a, answer(task, "more"))
        assert failed.reasons == ["UNSUPPORTED_OPERATION", "NO_INPUT_REQUIRED"]
        server.gates.open("g")


async def test_a_cancel_withdraws_the_question() -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        task = await a2a.task("jsonrpc", script(ASK))
        found = await a2a.call(
            "rest", "ListTasks", pb.ListTasksRequest(status=pb.TASK_STATE_INPUT_REQUIRED)
        )
        assert [each.id for each in found.tasks] == [task.id]
        done = await a2a.call("grpc", "CancelTask", pb.CancelTaskRequest(id=task.id))
        assert done.status.state == pb.TASK_STATE_CANCELED
        assert not done.status.HasField("message")
        assert (await refused(a2a, answer(task, "x"))).reasons[1] == "TASK_ENDED"
