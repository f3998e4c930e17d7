"""A2A before a server, and calls of its operations over each transport."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
import httpx2
from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]

from runlane_a2a.card import Addresses, make_card
from runlane_a2a.door import A2ADoor, GrpcListen
from runlane_a2a.operations import BY_NAME
from runlane_a2a.settings import Settings
from runlane_web.gateway import Limits
from runlane_web.guard import Policy
from support.door import OWN, Door, door

TRANSPORTS = ("jsonrpc", "rest", "grpc")

URL = "https://agents.example.com"

VERSION = {"A2A-Version": "1.0"}

_RESPONSES: Mapping[str, type[Message]] = {
    "SendMessage": pb.SendMessageResponse,
    "SendStreamingMessage": pb.StreamResponse,
    "SubscribeToTask": pb.StreamResponse,
    "GetTask": pb.Task,
    "CancelTask": pb.Task,
    "ListTasks": pb.ListTasksResponse,
    "CreateTaskPushNotificationConfig": pb.TaskPushNotificationConfig,
    "GetTaskPushNotificationConfig": pb.TaskPushNotificationConfig,
    "ListTaskPushNotificationConfigs": pb.ListTaskPushNotificationConfigsResponse,
    "DeleteTaskPushNotificationConfig": Empty,
    "GetExtendedAgentCard": pb.AgentCard,
}


class Failed(Exception):
    """An error, as each transport sends it."""

    def __init__(self, status: status_pb2.Status, code: int) -> None:
        super().__init__(status.message)
        self.status = code_pb2.Code.Name(status.code) if status.code else ""
        self.code = code
        self.message: str = status.message
        self.reasons: list[str] = []
        self.fields: list[str] = []
        self.retry_after: float | None = None
        for detail in status.details:
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                self.reasons.append(info.reason)
            elif detail.Unpack(bad):
                self.fields += [each.field for each in bad.field_violations]
            elif detail.Unpack(retry):
                self.retry_after = retry.retry_delay.ToTimedelta().total_seconds()


@dataclass
class A2A:
    """The facade, and how to call it."""

    opened: Door
    channel: grpc.aio.Channel
    token: str
    grpc_port: int
    served: A2ADoor
    version: str = "1.0"

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a call."""
        return {"Authorization": f"Bearer {self.token}", "A2A-Version": self.version}

    async def call(self, transport: str, name: str, request: Message, **more: str) -> Any:
        """Calls an operation; raises Failed."""
        got = [each async for each in self._events(transport, name, request, more)]
        assert len(got) == 1
        return got[0]

    async def stream(
        self, transport: str, name: str, request: Message
    ) -> AsyncIterator[pb.StreamResponse]:
        """Calls an operation that streams; raises Failed."""
        async for each in self._events(transport, name, request, {}):
            assert isinstance(each, pb.StreamResponse)
            yield each

    async def task(self, transport: str, request: pb.SendMessageRequest) -> pb.Task:
        """Sends a message, and returns the task."""
        answer: pb.SendMessageResponse = await self.call(transport, "SendMessage", request)
        assert answer.WhichOneof("payload") == "task"
        return answer.task

    async def get(self, task_id: str, transport: str = "jsonrpc") -> pb.Task:
        """Reads a task."""
        task: pb.Task = await self.call(transport, "GetTask", pb.GetTaskRequest(id=task_id))
        return task

    async def _events(
        self, transport: str, name: str, request: Message, more: Mapping[str, str]
    ) -> AsyncIterator[Message]:
        if transport == "grpc":
            events = self._grpc(name, request, more)
        elif transport == "rest":
            events = self._rest(name, request, more)
        else:
            events = self._json_rpc(name, request, more)
        async for each in events:
            yield each

    async def _grpc(
        self, name: str, request: Message, more: Mapping[str, str]
    ) -> AsyncIterator[Message]:
        path = f"/lf.a2a.v1.A2AService/{name}"
        metadata = tuple((key.lower(), value) for key, value in {**self.headers, **more}.items())
        read = _RESPONSES[name].FromString
        try:
            if BY_NAME[name].streams:
                streaming: Any = self.channel.unary_stream(path, response_deserializer=read)
                async for each in streaming(request.SerializeToString(), metadata=metadata):
                    yield each
            else:
                unary: Any = self.channel.unary_unary(path, response_deserializer=read)
                yield await unary(request.SerializeToString(), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise _of_grpc(error) from None

    async def _json_rpc(
        self, name: str, request: Message, more: Mapping[str, str]
    ) -> AsyncIterator[Message]:
        body = {
            "jsonrpc": "2.0",
            "id": 7,
            "method": name,
            "params": json_format.MessageToDict(request),
        }
        http = self.opened.http
        headers = {**self.headers, **more}
        async with http.stream("POST", "/a2a/jsonrpc", json=body, headers=headers) as response:
            async for fields in _bodies(response):
                if "error" in fields and "jsonrpc" in fields:
                    error = fields["error"]
                    raise _of_json(error["message"], "", error["data"], error["code"])
                if response.status_code != 200:
                    status = json_format.ParseDict(fields, status_pb2.Status())
                    raise Failed(status, response.status_code)
                assert (fields["jsonrpc"], fields["id"]) == ("2.0", 7)
                yield json_format.ParseDict(fields["result"], _RESPONSES[name]())

    async def _rest(
        self, name: str, request: Message, more: Mapping[str, str]
    ) -> AsyncIterator[Message]:
        operation = BY_NAME[name]
        fields = json_format.MessageToDict(request)
        path = operation.path
        for key in ("id", "task_id"):
            if f"{{{key}}}" in path:
                path = path.replace(f"{{{key}}}", fields.pop({"task_id": "taskId"}.get(key, key)))
        given: Any = {"json": fields} if operation.verb == "POST" else {"params": fields}
        http = self.opened.http
        headers = {**self.headers, **more}
        async with http.stream(operation.verb, f"/a2a{path}", headers=headers, **given) as response:
            async for found in _bodies(response):
                if "error" in found:
                    error = found["error"]
                    raise _of_json(
                        error["message"], error["status"], error["details"], error["code"]
                    )
                if response.status_code != 200:
                    status = json_format.ParseDict(found, status_pb2.Status())
                    raise Failed(status, response.status_code)
                yield json_format.ParseDict(found, _RESPONSES[name]())


async def _bodies(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    if response.headers["content-type"].startswith("text/event-stream"):
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))
        return
    yield json.loads(await response.aread())


def _of_json(message: str, status: str, details: Any, code: int) -> Failed:
    found = json_format.ParseDict({"message": message, "details": details}, status_pb2.Status())
    if status:
        found.code = code_pb2.Code.Value(status)
    return Failed(found, code)


def _of_grpc(error: grpc.aio.AioRpcError) -> Failed:
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            status.ParseFromString(value)
    assert status.code == error.code().value[0]
    return Failed(status, status.code)


@asynccontextmanager
async def a2a_door(
    target: str,
    policy: Policy = OWN,
    *,
    settings: Settings | None = None,
    described: str = "",
    limits: Limits | None = None,
    token: str = "",
) -> AsyncIterator[A2A]:
    """Opens the facade before the server at an address."""
    card = make_card(Addresses(URL, "agents.example.com:443"), described)
    served = A2ADoor(card, settings or Settings(), GrpcListen("127.0.0.1:0"))
    async with door(target, policy, limits, more=(served,)) as opened:
        while not served.grpc_port:  # it starts with the gateway
            await asyncio.sleep(0.01)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
                yield A2A(opened, channel, token or policy.token, served.grpc_port, served)
        finally:
            await served.stop()  # the server of the tests has to exit at once


def message(*parts: pb.Part | str, **fields: Any) -> pb.SendMessageRequest:
    """A message of a user."""
    made = [pb.Part(text=each) if isinstance(each, str) else each for each in parts]
    fields = {"message_id": "m", "role": pb.ROLE_USER, **fields}
    return pb.SendMessageRequest(message=pb.Message(parts=made, **fields))


def script(*steps: Any, **fields: Any) -> pb.SendMessageRequest:
    """A message for the scripted agent."""
    return message(json.dumps(list(steps)), **fields)
