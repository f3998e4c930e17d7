"""The operations: one table for all transports."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote

from a2a.server.context import ServerCallContext
from a2a.server.request_handlers.request_handler import RequestHandler
from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import MethodNotFoundError, TaskNotFoundError, VersionNotSupportedError
from a2a.utils.proto_utils import to_stream_response
from google.protobuf import empty_pb2, json_format
from google.protobuf.message import Message

from runlane_a2a.card import VERSION
from runlane_a2a.errors import refuse
from runlane_web.errors import shown
from runlane_web.routes import not_allowed

_VARIABLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Operation:
    """An operation of A2A.

    Attributes:
        name: Its name in gRPC and JSON-RPC.
        request: The class of its request.
        method: The method of the handler.
        verb: The HTTP method in REST.
        path: The path in REST; variables are fields of the request.
        streams: True if it answers with a stream.
    """

    name: str
    request: type[Message]
    method: str
    verb: str
    path: str
    streams: bool = False

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        literal = re.escape(self.path).replace(r"\{", "{").replace(r"\}", "}")
        return re.compile(_VARIABLE.sub(r"(?P<\1>[^/]+?)", literal))

    def match(self, path: str) -> Mapping[str, str] | None:
        """The fields in a percent-encoded path; None if it is another."""
        found = self._pattern.fullmatch(path)
        return found and {name: unquote(value) for name, value in found.groupdict().items()}

    async def call(
        self, handler: RequestHandler, request: Message, context: ServerCallContext
    ) -> Message:
        """Calls an operation that does not stream. Raises A2AError, RunlaneError."""
        method: Callable[..., Awaitable[Any]] = getattr(handler, self.method)
        result = await method(request, context)
        if self.name == "SendMessage":
            if isinstance(result, pb.Task):
                return pb.SendMessageResponse(task=result)
            return pb.SendMessageResponse(message=result)
        if result is None:
            if self.verb == "DELETE":
                return empty_pb2.Empty()
            raise TaskNotFoundError
        made: Message = result
        return made

    async def stream(
        self, handler: RequestHandler, request: Message, context: ServerCallContext
    ) -> AsyncGenerator[Message, None]:
        """Calls an operation that streams. Raises A2AError, RunlaneError."""
        method: Callable[..., AsyncGenerator[Any, None]] = getattr(handler, self.method)
        events = method(request, context)
        try:
            async for event in events:
                yield to_stream_response(event)
        finally:
            await events.aclose()


_PUSH = "/tasks/{task_id}/pushNotificationConfigs"

OPERATIONS: tuple[Operation, ...] = (
    Operation("SendMessage", pb.SendMessageRequest, "on_message_send", "POST", "/message:send"),
    Operation(
        "SendStreamingMessage",
        pb.SendMessageRequest,
        "on_message_send_stream",
        "POST",
        "/message:stream",
        streams=True,
    ),
    Operation("CancelTask", pb.CancelTaskRequest, "on_cancel_task", "POST", "/tasks/{id}:cancel"),
    Operation(
        "SubscribeToTask",
        pb.SubscribeToTaskRequest,
        "on_subscribe_to_task",
        "POST",
        "/tasks/{id}:subscribe",
        streams=True,
    ),
    Operation("GetTask", pb.GetTaskRequest, "on_get_task", "GET", "/tasks/{id}"),
    Operation("ListTasks", pb.ListTasksRequest, "on_list_tasks", "GET", "/tasks"),
    Operation(
        "CreateTaskPushNotificationConfig",
        pb.TaskPushNotificationConfig,
        "on_create_task_push_notification_config",
        "POST",
        _PUSH,
    ),
    Operation(
        "GetTaskPushNotificationConfig",
        pb.GetTaskPushNotificationConfigRequest,
        "on_get_task_push_notification_config",
        "GET",
        f"{_PUSH}/{{id}}",
    ),
    Operation(
        "ListTaskPushNotificationConfigs",
        pb.ListTaskPushNotificationConfigsRequest,
        "on_list_task_push_notification_configs",
        "GET",
        _PUSH,
    ),
    Operation(
        "DeleteTaskPushNotificationConfig",
        pb.DeleteTaskPushNotificationConfigRequest,
        "on_delete_task_push_notification_config",
        "DELETE",
        f"{_PUSH}/{{id}}",
    ),
    Operation(
        "GetExtendedAgentCard",
        pb.GetExtendedAgentCardRequest,
        "on_get_extended_agent_card",
        "GET",
        "/extendedAgentCard",
    ),
)

BY_NAME: Mapping[str, Operation] = {each.name: each for each in OPERATIONS}


def find(verb: str, path: str) -> tuple[Operation, Mapping[str, str]]:
    """Finds the operation of a REST request, and the fields in its path.

    Raises A2AError, Refused.
    """
    allowed: list[str] = []
    for operation in OPERATIONS:
        fields = operation.match(path)
        if fields is None:
            continue
        if verb == operation.verb or (verb, operation.name) == ("GET", "SubscribeToTask"):
            return operation, fields
        allowed.append(operation.verb)
    if not allowed:
        raise refuse(MethodNotFoundError, "is no path of A2A", field="path")
    raise not_allowed(verb, ", ".join(sorted(set(allowed))))


def check_version(version: str) -> None:
    """Checks the version that a caller speaks. Raises A2AError."""
    if ".".join(version.strip().split(".")[:2]) != VERSION:
        raise refuse(
            VersionNotSupportedError,
            f"is {shown(version, 16)}; this agent speaks {VERSION}",
            field="A2A-Version",
        )


def to_json(message: Message, request: Message) -> dict[str, Any]:
    """A result as JSON."""
    is_list = isinstance(message, pb.ListTasksResponse)
    made: dict[str, Any] = json_format.MessageToDict(
        message, always_print_fields_with_no_presence=is_list
    )
    if is_list and isinstance(request, pb.ListTasksRequest) and not request.include_artifacts:
        for task in made["tasks"]:
            task.pop("artifacts", None)
    return made
