"""Push notification configs: the operations over each transport, and what is pushed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format
from google.protobuf.message import Message

from runlane import Client, PermissionDenied, WebhookRun
from runlane_server.config import Config
from runlane_server.core.limits import Limits
from runlane_server.testing import LocalServer
from runlane_web.guard import Policy
from support.a2a_door import A2A, TRANSPORTS, Failed, a2a_door, message, script
from support.callers import guarded
from support.endpoint import Endpoint, endpoint

LOCAL = Config(webhook_allow_network=("127.0.0.0/8",))

over_each_transport = pytest.mark.parametrize("transport", TRANSPORTS)

ASK = {"ask": {"text": "Which one?"}}

Config_ = pb.TaskPushNotificationConfig


@asynccontextmanager
async def pushing(agent: str = "scripted") -> AsyncIterator[tuple[A2A, Endpoint]]:
    async with (
        LocalServer(agent, config=LOCAL) as server,
        a2a_door(server.address) as a2a,
        endpoint() as served,
    ):
        yield a2a, served


def config(url: str, **fields: Any) -> pb.TaskPushNotificationConfig:
    """A config with both kinds of credentials."""
    made = pb.TaskPushNotificationConfig(url=url, token="t-1", **fields)  # noqa: S106
    made.authentication.scheme, made.authentication.credentials = "Bearer", "c 2"
    return made


def with_config(sent: pb.SendMessageRequest, url: str) -> pb.SendMessageRequest:
    sent.configuration.task_push_notification_config.CopyFrom(config(url))
    return sent


def pushed(served: Endpoint) -> list[pb.TaskStatusUpdateEvent]:
    """The pushed bodies, read as the SDK of A2A reads them."""
    found = [json_format.ParseDict(each.message, pb.StreamResponse()) for each in served.accepted]
    assert {each.WhichOneof("payload") for each in found} <= {"status_update"}
    return [each.status_update for each in found]


async def create(a2a: A2A, transport: str, made: Message) -> pb.TaskPushNotificationConfig:
    found: pb.TaskPushNotificationConfig = await a2a.call(
        transport, "CreateTaskPushNotificationConfig", made
    )
    return found


async def ids(a2a: A2A, transport: str, task_id: str) -> list[str]:
    request = pb.ListTaskPushNotificationConfigsRequest(task_id=task_id)
    listed = await a2a.call(transport, "ListTaskPushNotificationConfigs", request)
    return [each.id for each in listed.configs]


@over_each_transport
async def test_a_config_is_created_read_listed_and_deleted(transport: str) -> None:
    async with pushing("echo") as (a2a, served):
        served.answer = lambda _: 500  # none is deleted, since none delivers the end
        task = await a2a.task(transport, message("x"))
        other = await a2a.task(transport, message("y"))
        made = await create(a2a, transport, config(served.url, id="mine", task_id=task.id))
        assert (made.id, made.task_id, made.url) == ("mine", task.id, served.url)
        # Nobody learns the secrets from an answer.
        assert (made.authentication.scheme, made.authentication.credentials) == ("Bearer", "")
        assert not made.token
        named = pb.GetTaskPushNotificationConfigRequest(task_id=task.id, id="mine")
        assert await a2a.call(transport, "GetTaskPushNotificationConfig", named) == made
        minted = await create(a2a, transport, Config_(url=served.url, task_id=task.id))
        assert minted.id not in ("", "mine")
        assert await ids(a2a, transport, task.id) == [minted.id, "mine"]
        assert await ids(a2a, transport, other.id) == []
        page = pb.ListTaskPushNotificationConfigsRequest(task_id=task.id, page_size=1)
        listed = await a2a.call(transport, "ListTaskPushNotificationConfigs", page)
        page.page_token = listed.next_page_token
        rest = await a2a.call(transport, "ListTaskPushNotificationConfigs", page)
        assert [each.id for each in (*listed.configs, *rest.configs)] == [minted.id, "mine"]
        assert not rest.next_page_token
        # The same id is the same config.
        again = await create(
            a2a, transport, Config_(url=f"{served.url}2", id="mine", task_id=task.id)
        )
        assert await a2a.call(transport, "GetTaskPushNotificationConfig", named) == again
        gone = pb.DeleteTaskPushNotificationConfigRequest(task_id=task.id, id="mine")
        for _ in range(2):
            await a2a.call(transport, "DeleteTaskPushNotificationConfig", gone)
        assert await ids(a2a, transport, task.id) == [minted.id]
        with pytest.raises(Failed) as failed:
            await a2a.call(transport, "GetTaskPushNotificationConfig", named)
        assert (failed.value.reasons, failed.value.fields) == (["TASK_NOT_FOUND"], ["id"])


@over_each_transport
async def test_what_a_stream_says_of_a_task_is_pushed(transport: str) -> None:
    async with pushing() as (a2a, served):
        sent = with_config(script(ASK, {"text": "done"}, context_id="c"), served.url)
        streamed = [each async for each in a2a.stream(transport, "SendStreamingMessage", sent)]
        await served.until(lambda: len(served.accepted) == 1)
        [asked] = pushed(served)
        assert asked == streamed[-1].status_update
        assert asked.status.state == pb.TASK_STATE_INPUT_REQUIRED
        # Tasks beside it are not pushed.
        await a2a.task(transport, script({"text": "other"}, context_id="d"))
        reply = message("that", task_id=asked.task_id, message_id="m2")
        streamed = [each async for each in a2a.stream(transport, "SendStreamingMessage", reply)]
        await served.until(lambda: len(served.accepted) == 2)
        assert pushed(served)[1] == streamed[-1].status_update
        assert pushed(served)[1].status.state == pb.TASK_STATE_COMPLETED
        for each in served.accepted:
            assert each.headers["authorization"] == "Bearer c 2"
            assert each.headers["x-a2a-notification-token"] == "t-1"
            assert each.headers["content-type"] == "application/json"


ENDS = {
    "failed": ({"fail": "broken"}, "TASK_STATE_FAILED"),
    "rejected": ({"fail": "no", "reason": "REJECTED"}, "TASK_STATE_REJECTED"),
}


@pytest.mark.parametrize("name", ENDS)
async def test_an_error_is_pushed_as_the_stream_says_it(name: str) -> None:
    step, expected = ENDS[name]
    async with pushing() as (a2a, served):
        sent = with_config(script(step), served.url)
        streamed = [each async for each in a2a.stream("grpc", "SendStreamingMessage", sent)]
        await served.until(lambda: len(served.accepted) == 1)
    [found] = pushed(served)
    assert found == streamed[-1].status_update
    assert pb.TaskState.Name(found.status.state) == expected


async def test_a_cancel_is_pushed() -> None:
    async with pushing() as (a2a, served):
        sent = with_config(script(ASK), served.url)
        task = await a2a.task("rest", sent)
        await a2a.call("rest", "CancelTask", pb.CancelTaskRequest(id=task.id))
        await served.until(lambda: len(served.accepted) == 2)
    assert pushed(served)[1].status.state == pb.TASK_STATE_CANCELED


@over_each_transport
async def test_a_config_that_is_refused_starts_no_task(transport: str) -> None:
    async with pushing("echo") as (a2a, served):
        for url, field in (("http://10.0.0.1/", "url"), ("", "url"), ("https://a b/", "url")):
            with pytest.raises(Failed) as failed:
                await a2a.task(transport, with_config(message("x", context_id="c"), url))
            assert failed.value.fields[0].endswith(field)
        for made, field in (
            (Config_(url=served.url, token="a\r\nX: y"), "token"),  # noqa: S106
            (Config_(url=served.url, task_id="other"), "taskId"),
            (Config_(url=served.url, tenant="other"), "tenant"),
            (Config_(url=served.url, authentication={"credentials": "x"}), "scheme"),
            (
                Config_(url=served.url, authentication={"scheme": "B\n", "credentials": "x"}),
                "authentication",
            ),
        ):
            sent = message("x", context_id="c")
            sent.configuration.task_push_notification_config.CopyFrom(made)
            with pytest.raises(Failed) as failed:
                await a2a.task(transport, sent)
            assert failed.value.fields[0].endswith(field), made
        listed = await a2a.call(transport, "ListTasks", pb.ListTasksRequest(context_id="c"))
        assert not listed.tasks
        assert not served.accepted


async def test_r06_a_refused_message_leaves_no_config() -> None:
    full = replace(LOCAL, limits=Limits(max_active_runs=0, max_waiting_runs=1))
    async with (
        LocalServer("echo", config=full) as server,
        a2a_door(server.address) as a2a,
        endpoint() as served,
        server.client() as client,
    ):
        waiting = message("x", context_id="c")
        waiting.configuration.return_immediately = True
        task = await a2a.task("jsonrpc", with_config(waiting, served.url))
        assert await ids(a2a, "jsonrpc", task.id) == [task.id]
        with pytest.raises(Failed) as failed:
            await a2a.task("jsonrpc", with_config(message("y", context_id="c"), served.url))
        assert failed.value.reasons == ["QUEUE_FULL"]
        left = [each.run.run_id async for each in client.list_webhooks() if each.run]
        assert left == [task.id]


async def test_r06_a_message_whose_key_is_that_of_another_changes_no_config() -> None:
    async with pushing() as (a2a, served):
        first = with_config(script(ASK, context_id="c"), served.url)
        key = {"Idempotency-Key": "k"}
        for _ in range(2):
            answer = await a2a.call("rest", "SendMessage", first, **key)
            assert answer.task.id == "k"
        other = with_config(message("other", context_id="c"), f"{served.url}2")
        other.configuration.task_push_notification_config.id = "more"
        same = with_config(message("other", context_id="c"), f"{served.url}2")
        for sent in (other, same):
            with pytest.raises(Failed) as failed:
                await a2a.call("rest", "SendMessage", sent, **key)
            assert "RUN_ID_CONFLICT" in failed.value.reasons
        assert await ids(a2a, "rest", "k") == ["k"]
        named = pb.GetTaskPushNotificationConfigRequest(task_id="k", id="k")
        found = await a2a.call("rest", "GetTaskPushNotificationConfig", named)
        assert found.url == served.url


@over_each_transport
async def test_a_run_has_at_most_ten_configs(transport: str) -> None:
    async with pushing("echo") as (a2a, served):
        served.answer = lambda _: 500  # none is deleted, since none delivers the end
        task = await a2a.task(transport, message("x"))
        for n in range(10):
            await create(a2a, transport, config(served.url, id=f"c{n}", task_id=task.id))
        with pytest.raises(Failed) as failed:
            await create(a2a, transport, config(served.url, id="more", task_id=task.id))
        assert failed.value.reasons == ["QUOTA_EXCEEDED"]


@over_each_transport
async def test_configs_are_for_callers_who_start_runs_and_of_their_tenant(
    tmp_path: Path, transport: str
) -> None:
    made = Config_(url="https://example.org/", id="c", task_id="r-theirs")
    async with guarded(tmp_path) as world, a2a_door(world.wire.address, Policy()) as a2a:
        a2a.token = world.texts["run"]
        assert (await create(a2a, transport, made)).id == "c"
        a2a.token = world.texts["webhooks"]
        assert await ids(a2a, transport, "r-theirs") == ["c"]
        for name, reasons in (
            ("read", ["PERMISSION_DENIED"]),
            ("stranger", ["TASK_NOT_FOUND", "RUN_NOT_FOUND"]),
        ):
            a2a.token = world.texts[name]
            for operation, request in (
                ("CreateTaskPushNotificationConfig", made),
                (
                    "GetTaskPushNotificationConfig",
                    pb.GetTaskPushNotificationConfigRequest(task_id="r-theirs", id="c"),
                ),
                (
                    "ListTaskPushNotificationConfigs",
                    pb.ListTaskPushNotificationConfigsRequest(task_id="r-theirs"),
                ),
                (
                    "DeleteTaskPushNotificationConfig",
                    pb.DeleteTaskPushNotificationConfigRequest(task_id="r-theirs", id="c"),
                ),
            ):
                with pytest.raises(Failed) as failed:
                    await a2a.call(transport, operation, request)
                assert failed.value.reasons == reasons, (name, operation)


async def test_a_caller_who_starts_runs_manages_no_other_webhook(tmp_path: Path) -> None:
    async with (
        guarded(tmp_path) as world,
        Client(world.wire.address, token=world.texts["run"]) as client,
    ):
        with pytest.raises(PermissionDenied, match="only for webhooks of runs"):
            await client.create_webhook("https://example.org/")
        with pytest.raises(PermissionDenied, match="only for webhooks of runs"):
            await client.list_webhooks().page()
        for name in ("w-r-theirs", "unknown"):  # it may not learn which of them exists
            with pytest.raises(PermissionDenied, match="only for webhooks of runs"):
                await client.get_webhook(name)
            with pytest.raises(PermissionDenied, match="only for webhooks of runs"):
                await client.delete_webhook(name)
        made = await client.create_webhook("https://example.org/", run=WebhookRun("r"))
        webhook_id = made.webhook.webhook_id
        assert (await client.get_webhook(webhook_id)).run == WebhookRun("r")
        with pytest.raises(PermissionDenied):
            await client.rotate_webhook_secret(webhook_id)
        await client.delete_webhook(webhook_id)
