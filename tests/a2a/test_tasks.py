"""A context is a session, and a task is a run: the operations, the same over each transport."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from runlane import RunRetryPolicy, TextDelta
from runlane_server.testing import LocalServer
from runlane_web.gateway import Limits
from support.a2a_door import A2A, TRANSPORTS, Failed, a2a_door, message, script

over_each_transport = pytest.mark.parametrize("transport", TRANSPORTS)

RICH = (
    {"text": "Hel"},
    {"text": "lo"},
    {"artifact": {"id": "notes", "text": "one ", "last": False}},
    {"artifact": {"id": "notes", "text": "two", "append": True}},
    {"artifact": {"id": "file", "name": "a.bin", "mime_type": "image/png", "data": "AAE="}},
    {"artifact": {"id": "table", "json": {"rows": [1, 2.5, None], "big": 9007199254740993}}},
    {"artifact": {"id": "where", "uri": "https://example.com/x"}},
    {"text": "!"},
)


def states(events: Iterable[pb.StreamResponse]) -> list[str]:
    """The states in a stream, in order, without their prefix."""
    found = [
        each.task.status.state if each.HasField("task") else each.status_update.status.state
        for each in events
        if not each.HasField("artifact_update")
    ]
    return [pb.TaskState.Name(each).removeprefix("TASK_STATE_") for each in found]


def rebuilt(events: Iterable[pb.StreamResponse]) -> pb.Task:
    """The task that a caller knows after a stream: pieces of an artifact are put together."""
    task = pb.Task()
    for each in events:
        if each.HasField("task"):
            task.CopyFrom(each.task)
        elif each.HasField("status_update"):
            task.status.CopyFrom(each.status_update.status)
        else:
            _add(task, each.artifact_update)
    return task


def _add(task: pb.Task, update: pb.TaskArtifactUpdateEvent) -> None:
    known = [each for each in task.artifacts if each.artifact_id == update.artifact.artifact_id]
    if not known:
        assert not update.append
        task.artifacts.add().CopyFrom(update.artifact)
    elif not update.append:
        known[0].CopyFrom(update.artifact)
    else:
        known[0].parts[0].text += update.artifact.parts[0].text


async def stored(server: LocalServer, run_id: str, text: str) -> None:
    """Waits until output of a run is stored."""
    async with server.client() as client, client.subscribe_run(run_id) as events:
        async for event in events:
            if event.body == TextDelta(text):
                return


@over_each_transport
async def test_a_message_becomes_a_task_that_completes(transport: str) -> None:
    async with LocalServer() as server, a2a_door(server.address) as a2a:
        task = await a2a.task(transport, message("hello", context_id="c"))
        async with server.client() as client:
            run = await client.get_run(task.id)
    assert (task.context_id, run.session_id) == ("c", "c")
    assert task.status.state == pb.TASK_STATE_COMPLETED
    assert [each.parts[0].text for each in task.artifacts] == ["hello"]
    assert [each.parts[0].text for each in task.history] == ["hello"]
    assert run.metadata == {"a2a.message_id": "m", "a2a.hops": "1"}


@over_each_transport
async def test_the_task_reads_the_same_live_and_from_the_transcript(transport: str) -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        sent = await a2a.task(transport, script(*RICH))
        read = await a2a.get(sent.id, transport)
    assert read == sent
    kinds = {each.artifact_id: each.parts[0].WhichOneof("content") for each in sent.artifacts}
    # JSON whose number protobuf would round stays text.
    assert kinds == {
        "runlane.output": "text",
        "notes": "text",
        "file": "raw",
        "table": "text",
        "where": "url",
    }
    texts = {each.artifact_id: each.parts[0].text for each in sent.artifacts}
    assert (texts["runlane.output"], texts["notes"]) == ("Hello!", "one two")


@over_each_transport
async def test_a_stream_begins_with_the_task_and_adds_up_to_it(transport: str) -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        events = [
            each async for each in a2a.stream(transport, "SendStreamingMessage", script(*RICH))
        ]
        read = await a2a.get(events[0].task.id, transport)
    assert states(events) == ["SUBMITTED", "WORKING", "COMPLETED"]
    assert events[-1].HasField("status_update")
    assert list(rebuilt(events).artifacts) == list(read.artifacts)
    assert rebuilt(events).status == read.status


@over_each_transport
async def test_a_subscriber_gets_the_task_as_it_is_and_exactly_the_rest(transport: str) -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        sent = script({"text": "one "}, {"wait": "g"}, {"text": "two"})
        sent.configuration.return_immediately = True
        task = await a2a.task(transport, sent)
        await stored(server, task.id, "one ")
        events = []
        async for each in a2a.stream(
            transport, "SubscribeToTask", pb.SubscribeToTaskRequest(id=task.id)
        ):
            events.append(each)
            server.gates.open("g")
        read = await a2a.get(task.id, transport)
    assert states(events) == ["WORKING", "COMPLETED"]
    assert events[0].task.artifacts[0].parts[0].text == "one "
    assert rebuilt(events) == read


@over_each_transport
async def test_a_cancelled_task_is_canceled_once(transport: str) -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        sent = script({"text": "half"}, {"wait": "g"})
        sent.configuration.return_immediately = True
        task = await a2a.task(transport, sent)
        await stored(server, task.id, "half")
        cancel = pb.CancelTaskRequest(id=task.id)
        cancelled: pb.Task = await a2a.call(transport, "CancelTask", cancel)
        assert cancelled.status.state == pb.TASK_STATE_CANCELED
        assert cancelled.artifacts[0].parts[0].text == "half"
        assert await a2a.get(task.id, transport) == cancelled
        with pytest.raises(Failed, match="is cancelled") as failed:
            await a2a.call(transport, "CancelTask", cancel)
    assert (failed.value.reasons, failed.value.fields) == (["TASK_NOT_CANCELABLE"], ["id"])


@over_each_transport
async def test_tasks_are_listed_by_context_state_and_page(transport: str) -> None:
    async with LocalServer() as server, a2a_door(server.address) as a2a:
        for n in range(3):
            await a2a.task(transport, message(f"m{n}", context_id="c"))
        await a2a.task(transport, message("elsewhere", context_id="d"))
        request = pb.ListTasksRequest(context_id="c", page_size=2)
        page: pb.ListTasksResponse = await a2a.call(transport, "ListTasks", request)
        assert (len(page.tasks), page.page_size, page.total_size) == (2, 2, 3)
        assert not any(task.artifacts or task.history for task in page.tasks)
        times = [task.status.timestamp.ToNanoseconds() for task in page.tasks]
        assert times == sorted(times, reverse=True)
        request = pb.ListTasksRequest(
            context_id="c", page_size=2, page_token=page.next_page_token, include_artifacts=True
        )
        rest: pb.ListTasksResponse = await a2a.call(transport, "ListTasks", request)
        assert [task.artifacts[0].parts[0].text for task in rest.tasks] == ["m0"]
        assert rest.next_page_token == ""
        for state, number in ((pb.TASK_STATE_COMPLETED, 4), (pb.TASK_STATE_FAILED, 0)):
            found = await a2a.call(transport, "ListTasks", pb.ListTasksRequest(status=state))
            assert len(found.tasks) == number
        unknown = await a2a.call(transport, "ListTasks", pb.ListTasksRequest(context_id="no"))
        assert not unknown.tasks


async def test_the_same_key_sends_a_message_once() -> None:
    async with LocalServer() as server, a2a_door(server.address) as a2a:
        key = {"Idempotency-Key": "key-1"}
        first, again = [
            await a2a.call(transport, "SendMessage", message("hello"), **key)
            for transport in ("jsonrpc", "grpc")
        ]
        with pytest.raises(Failed) as failed:
            await a2a.call("rest", "SendMessage", message("other"), **key)
    assert first.task == again.task
    assert first.task.id == "key-1"
    assert failed.value.reasons == ["INVALID_PARAMS", "RUN_ID_CONFLICT"]


async def test_a_caller_that_goes_away_cancels_nothing() -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        request = script({"text": "a"}, {"wait": "g"}, {"text": "b"}, context_id="c")
        stream = a2a.stream("rest", "SendStreamingMessage", request)
        task_id = (await anext(stream)).task.id
        await server.gates.reached("g")
        await stream.aclose()  # type: ignore[attr-defined]
        server.gates.open("g")
        async with server.client() as client:
            run = await client.wait_run(task_id, timeout=20)
    assert run.run_complete is not None
    assert run.run_complete.text == "ab"


@pytest.mark.parametrize(
    ("step", "state", "text"),
    [
        ({"fail": "no luck"}, pb.TASK_STATE_FAILED, "no luck"),
        ({"fail": "not mine", "reason": "REJECTED"}, pb.TASK_STATE_REJECTED, "not mine"),
    ],
)
async def test_a_task_that_fails_says_why(step: object, state: pb.TaskState, text: str) -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        task = await a2a.task("jsonrpc", script(step))
        found = await a2a.call("rest", "ListTasks", pb.ListTasksRequest(status=state))
    assert (task.status.state, task.status.message.parts[0].text) == (state, text)
    assert [each.id for each in found.tasks] == [task.id]


async def test_an_agent_may_answer_with_a_message() -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        request = script({"custom": {"type": "a2a.message", "json": {}}}, {"text": "hi"})
        answer = await a2a.call("grpc", "SendMessage", request)
    assert answer.message.parts[0].text == "hi"
    assert answer.message.role == pb.ROLE_AGENT


async def test_the_history_is_as_long_as_asked_for() -> None:
    async with LocalServer() as server, a2a_door(server.address) as a2a:
        request = message("hello")
        request.configuration.history_length = 0
        task = await a2a.task("jsonrpc", request)
        assert not task.history
        for length, number in ((0, 0), (1, 1), (9, 1)):
            got = await a2a.call(
                "rest", "GetTask", pb.GetTaskRequest(id=task.id, history_length=length)
            )
            assert len(got.history) == number


async def test_a_task_that_works_again_changed_with_the_answer() -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        asked = await a2a.task("rest", script({"ask": {"text": "?"}}, {"wait": "w"}))
        answer = message("x", task_id=asked.id, message_id="a")
        answer.configuration.return_immediately = True
        await a2a.task("rest", answer)
        task = await a2a.get(asked.id)
        while task.status.state != pb.TASK_STATE_WORKING:
            task = await a2a.get(asked.id)
        since = pb.ListTasksRequest(status_timestamp_after=task.status.timestamp)
        for request in (pb.ListTasksRequest(), since):
            listed = await a2a.call("rest", "ListTasks", request)
            assert [each.status for each in listed.tasks] == [task.status]
        server.gates.open("w")


@pytest.mark.parametrize("status", [pb.TASK_STATE_UNSPECIFIED, pb.TASK_STATE_COMPLETED])
@pytest.mark.parametrize(
    "time", [Timestamp(seconds=10**15), Timestamp(seconds=-(10**15)), Timestamp(nanos=-1)]
)
async def test_a_time_that_is_none_is_refused(status: pb.TaskState, time: Timestamp) -> None:
    async with LocalServer() as server, a2a_door(server.address) as a2a:
        request = pb.ListTasksRequest(status=status, status_timestamp_after=time)
        with pytest.raises(Failed) as failed:
            await a2a.call("grpc", "ListTasks", request)
    assert failed.value.reasons == ["INVALID_PARAMS"]
    assert failed.value.fields == ["statusTimestampAfter"]


async def test_a_second_attempt_begins_the_artifacts_again() -> None:
    async with LocalServer("scripted") as server, a2a_door(server.address) as a2a:
        async with server.client() as client:
            handle = await client.run_accepted(
                "c",
                script({"text": "x"}, {"fail": "once", "attempts": 1}).message.parts[0].text,
                allow_missing=True,
                retry_policy=RunRetryPolicy(max_attempts=2, after_output=True),
            )
            await handle.completed()
        task = await a2a.get(handle.run_id)
    assert [each.parts[0].text for each in task.artifacts] == ["x"]


async def test_streams_and_waits_of_one_caller_are_limited() -> None:
    limits = Limits(streams=9, streams_per_caller=1)
    async with (
        LocalServer("scripted") as server,
        a2a_door(server.address, limits=limits) as a2a,
    ):
        stream = a2a.stream("grpc", "SendStreamingMessage", script({"wait": "g"}))
        first = await anext(stream)
        await _expect_overloaded(a2a, first.task.id)
        server.gates.open("g")
        async for _ in stream:
            pass
        for transport in TRANSPORTS:  # its place is free again
            await a2a.task(transport, script({"text": "x"}))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_calls_that_do_not_wait_need_no_place(transport: str) -> None:
    limits = Limits(streams=9, streams_per_caller=1)
    async with (
        LocalServer("scripted") as server,
        a2a_door(server.address, limits=limits) as a2a,
    ):
        stream = a2a.stream("grpc", "SendStreamingMessage", script({"wait": "g"}))
        task = (await anext(stream)).task
        assert (await a2a.get(task.id, transport)).id == task.id
        await a2a.call(transport, "ListTasks", pb.ListTasksRequest())
        request = script({"text": "x"})
        request.configuration.return_immediately = True
        await a2a.task(transport, request)
        await a2a.call(transport, "CancelTask", pb.CancelTaskRequest(id=task.id))
        *_, last = [each async for each in stream]
    assert last.status_update.status.state == pb.TASK_STATE_CANCELED


async def _expect_overloaded(a2a: A2A, task_id: str) -> None:
    calls: list[tuple[str, Message]] = [
        ("SendMessage", script({"text": "x"})),
        ("SendStreamingMessage", script({"text": "x"})),
        ("SubscribeToTask", pb.SubscribeToTaskRequest(id=task_id)),
    ]
    for transport in TRANSPORTS:
        for name, request in calls:
            with pytest.raises(Failed) as failed:
                await a2a.call(transport, name, request)
            assert failed.value.reasons == ["OVERLOADED"], (transport, name)
