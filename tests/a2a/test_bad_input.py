"""Requests that cannot be served: the same code, reason and field over each transport."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from a2a.types import a2a_pb2 as pb
from google.protobuf.message import Message

from runlane_a2a.parts import data_part
from runlane_a2a.settings import Settings
from runlane_server.testing import LocalServer
from support.a2a_door import A2A, TRANSPORTS, Failed, a2a_door, message

pytestmark = pytest.mark.asyncio(loop_scope="module")

JSON = {"Content-Type": "application/json"}


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="a2a")
async def _a2a() -> AsyncIterator[A2A]:
    settings = Settings(metadata=frozenset({"team"}), max_hops=3)
    async with LocalServer() as server, a2a_door(server.address, settings=settings) as found:
        yield found


def meta(**values: Any) -> pb.SendMessageRequest:
    """A message with metadata."""
    request = message("x")
    request.message.metadata.update({key.replace("_", "."): value for key, value in values.items()})
    return request


def push() -> pb.SendMessageRequest:
    request = message("x")
    request.configuration.task_push_notification_config.url = "http://10.0.0.1/"
    return request


def negative() -> pb.SendMessageRequest:
    request = message("x")
    request.configuration.history_length = -1
    return request


REFUSED: list[tuple[str, Message, int, str, str]] = [
    ("SendMessage", pb.SendMessageRequest(), -32602, "INVALID_PARAMS", "message"),
    ("SendMessage", message(), -32602, "INVALID_PARAMS", "message.parts"),
    ("SendMessage", message(""), -32602, "EMPTY_PROMPT", "message.parts"),
    ("SendMessage", message(pb.Part()), -32602, "INVALID_PARAMS", "message.parts[0]"),
    (
        "SendMessage",
        message("x", pb.Part(url="file:///etc/passwd")),
        -32005,
        "URL_NOT_FETCHED",
        "message.parts[1].url",
    ),
    (
        "SendMessage",
        message(pb.Part(raw=b"x", media_type="application/x-sh")),
        -32005,
        "MEDIA_TYPE_NOT_SUPPORTED",
        "message.parts[0].mediaType",
    ),
    (
        "SendMessage",
        message(pb.Part(raw=b"x", media_type="text/plain", filename="f" * 300)),
        -32602,
        "INVALID_ARGUMENT",
        "message.parts[0].name",
    ),
    ("SendMessage", message("x" * (1 << 20) + "y"), -32602, "PROMPT_TOO_LARGE", "message.parts"),
    ("SendMessage", message("x", role=pb.ROLE_AGENT), -32602, "INVALID_PARAMS", "message.role"),
    ("SendMessage", message("x", message_id=""), -32602, "INVALID_PARAMS", "message.message_id"),
    (
        "SendMessage",
        message("x", message_id="m" * 1025),
        -32602,
        "INVALID_PARAMS",
        "message.messageId",
    ),
    ("SendMessage", message("x", context_id="c" * 129), -32602, "INVALID_ARGUMENT", "contextId"),
    ("SendMessage", message("x", task_id="no"), -32001, "RUN_NOT_FOUND", ""),
    ("SendMessage", meta(team="t" * 5000), -32602, "INVALID_PARAMS", "message.metadata.team"),
    ("SendMessage", meta(runlane_hops="x"), -32602, "INVALID_PARAMS", "metadata.runlane.hops"),
    ("SendMessage", meta(runlane_hops=-1), -32602, "INVALID_PARAMS", "metadata.runlane.hops"),
    ("SendMessage", meta(runlane_hops=3), -32004, "TOO_MANY_HOPS", "metadata.runlane.hops"),
    ("SendMessage", push(), -32602, "INVALID_ARGUMENT", "url"),
    (
        "CreateTaskPushNotificationConfig",
        pb.TaskPushNotificationConfig(task_id="no", url="https://example.com"),
        -32001,
        "TASK_NOT_FOUND",
        "",
    ),
    (
        "ListTaskPushNotificationConfigs",
        pb.ListTaskPushNotificationConfigsRequest(task_id="no"),
        -32001,
        "TASK_NOT_FOUND",
        "",
    ),
    (
        "DeleteTaskPushNotificationConfig",
        pb.DeleteTaskPushNotificationConfigRequest(task_id="no", id="x"),
        -32001,
        "TASK_NOT_FOUND",
        "",
    ),
    ("SendMessage", negative(), -32602, "INVALID_PARAMS", "historyLength"),
    ("GetTask", pb.GetTaskRequest(id="no"), -32001, "TASK_NOT_FOUND", ""),
    ("GetTask", pb.GetTaskRequest(id="no", tenant="t"), -32602, "INVALID_PARAMS", "tenant"),
    ("CancelTask", pb.CancelTaskRequest(id="no"), -32001, "TASK_NOT_FOUND", ""),
    ("SubscribeToTask", pb.SubscribeToTaskRequest(id="no"), -32001, "TASK_NOT_FOUND", ""),
    ("ListTasks", pb.ListTasksRequest(page_size=0), -32602, "INVALID_PARAMS", "pageSize"),
    ("ListTasks", pb.ListTasksRequest(page_size=101), -32602, "INVALID_PARAMS", "pageSize"),
    (
        "ListTasks",
        pb.ListTasksRequest(page_token="x"),  # noqa: S106
        -32602,
        "PAGE_TOKEN_INVALID",
        "pageToken",
    ),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[3]}-{case[4]}")
async def test_bad_input_gets_code_reason_and_field(
    a2a: A2A, transport: str, case: tuple[str, Message, int, str, str]
) -> None:
    name, request, code, reason, field = case
    with pytest.raises(Failed) as failed:
        await a2a.call(transport, name, request)
    assert reason in failed.value.reasons
    assert ([field] if field else []) == failed.value.fields
    wire = {
        -32001: ("NOT_FOUND", 404),
        -32003: ("FAILED_PRECONDITION", 400),
        -32004: ("FAILED_PRECONDITION", 400),
        -32005: ("INVALID_ARGUMENT", 400),
        -32602: ("INVALID_ARGUMENT", 400),
    }[code]
    assert failed.value.code == {"jsonrpc": code, "rest": wire[1]}.get(transport, failed.value.code)
    assert failed.value.status in ("", wire[0])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("version", ["", "0.3", "1", "1.1", "99.0", "x" * 500])
async def test_another_version_is_refused(a2a: A2A, transport: str, version: str) -> None:
    with pytest.raises(Failed) as failed:
        await a2a.call(transport, "ListTasks", pb.ListTasksRequest(), **{"A2A-Version": version})
    assert failed.value.reasons == ["VERSION_NOT_SUPPORTED"]
    assert failed.value.fields == ["A2A-Version"]


async def test_a_patch_of_the_version_does_not_matter(a2a: A2A) -> None:
    for transport in TRANSPORTS:
        await a2a.call(transport, "ListTasks", pb.ListTasksRequest(), **{"A2A-Version": "1.0.3"})


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (b"{", -32700, ""),
        (b"\xff", -32700, ""),
        (b'{"a":' * 2000, -32700, ""),
        (b"[]", -32600, ""),
        (b'"x"', -32600, ""),
        (b"{}", -32600, "jsonrpc"),
        (b'{"jsonrpc": "1.0", "id": 1, "method": "GetTask"}', -32600, "jsonrpc"),
        (b'{"jsonrpc": "2.0", "id": {}, "method": "GetTask"}', -32600, "id"),
        (b'{"jsonrpc": "2.0", "id": 1}', -32600, "method"),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "tasks/get"}', -32601, "method"),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": []}', -32602, "params"),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": {"id": 7}}', -32602, ""),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": {}}', -32602, "id"),
        (
            b'{"jsonrpc": "2.0", "id": 1, "method": "ListTasks", "params": {"status": "X"}}',
            -32602,
            "status",
        ),
    ],
)
async def test_json_rpc_answers_what_is_no_call(
    a2a: A2A, body: bytes, code: int, field: str
) -> None:
    headers = {**a2a.headers, **JSON}
    got = await a2a.opened.http.post("/a2a/jsonrpc", content=body, headers=headers)
    error = got.json()["error"]
    assert (got.status_code, error["code"]) == (200, code)
    fields = [each["fieldViolations"][0]["field"] for each in error["data"][1:]]
    assert fields == ([field] if field else [])


@pytest.mark.parametrize(
    ("verb", "path", "http", "reason"),
    [
        ("GET", "/a2a/jsonrpc", 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", "/a2a/tasks/x", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/a2a/nothing", 404, "METHOD_NOT_FOUND"),
        ("GET", "/a2a/tenant/tasks", 404, "METHOD_NOT_FOUND"),
        ("POST", "/.well-known/agent-card.json", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/a2a/tasks?pageSize=x", 400, "INVALID_PARAMS"),
        ("GET", "/a2a/tasks?status=NONE", 400, "INVALID_PARAMS"),
    ],
)
async def test_paths_and_methods_that_are_not_served(
    a2a: A2A, verb: str, path: str, http: int, reason: str
) -> None:
    got = await a2a.opened.http.request(verb, path, headers=a2a.headers)
    assert got.status_code == http
    assert reason in got.text


async def test_a_body_of_another_type_or_too_large_is_refused(a2a: A2A) -> None:
    http = a2a.opened.http
    headers = {**a2a.headers, "Content-Type": "text/plain"}
    got = await http.post("/a2a/jsonrpc", content=b"{}", headers=headers)
    assert got.json()["error"]["code"] == -32005
    got = await http.post("/a2a/message:send", content=b"{}", headers=headers)
    assert (got.status_code, "CONTENT_TYPE_NOT_SUPPORTED" in got.text) == (415, True)
    headers = {**a2a.headers, **JSON}
    got = await http.post("/a2a/message:send", content=b" " * (4 << 20) + b"{}", headers=headers)
    assert got.status_code == 413


async def test_metadata_sets_only_labels_that_are_allowed(a2a: A2A) -> None:
    request = meta(team="red", agent="other", tenant="t", timeout=1, traceparent="x")
    request.metadata.update({"team": "blue", "a2a.hops": "9"})
    task = await a2a.task("grpc", request)
    assert task.status.state == pb.TASK_STATE_COMPLETED
    got = await a2a.opened.http.get(f"/v1/runs/{task.id}")
    run = got.json()["run"]
    assert run["metadata"] == {"a2a.hops": "1", "a2a.message_id": "m", "team": "red"}
    assert "timeout" not in run


async def test_a_hop_is_counted(a2a: A2A) -> None:
    task = await a2a.task("rest", meta(runlane_hops=2))
    got = await a2a.opened.http.get(f"/v1/runs/{task.id}")
    assert got.json()["run"]["metadata"]["a2a.hops"] == "3"


async def test_data_and_files_reach_the_agent_as_attachments(a2a: A2A) -> None:
    task = await a2a.task("jsonrpc", message(data_part({"n": 1, "x": [1.5, True, None]})))
    # Protobuf has no order of keys; the same message must be the same prompt.
    assert task.artifacts[0].parts[0].text == '{"n": 1, "x": [1.5, true, null]}'
    attached = task.history[0].parts[0]
    assert (attached.filename, attached.media_type) == ("data-1.json", "application/json")
