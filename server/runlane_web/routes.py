"""The routes: which HTTP request calls which rpc.

The patterns are those of `google.api.http` (https://google.aip.dev/127). They stand here and not in
the protos, so that clients in other languages need no Google API package; `proto/http.yaml`,
written from this table, has them in the form that other gateways read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from urllib.parse import unquote

from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2  # type: ignore[import-untyped]

from runlane.v1 import (
    agent_service_pb2,
    run_service_pb2,
    session_service_pb2,
    webhook_service_pb2,
)
from runlane_web.errors import Refused, invalid

MAX_BODY = 64 << 10
"""Maximum size in bytes of a body that has no other limit."""

_MAX_BODIES: Mapping[str, int] = MappingProxyType(
    {
        "RunAccepted": 4 << 20,
        "UpdateRun": 4 << 20,
        "SubscribeRunComplete": 512 << 10,
        "AnswerInput": 512 << 10,
        "CreateSession": 512 << 10,
        "UpdateSession": 512 << 10,
    }
)
"""Maximum size in bytes of the body of a rpc, close to that of its message at the server."""

_VARIABLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Route:
    """An HTTP method and a path for one rpc.

    Attributes:
        verb: The HTTP method.
        path: The pattern, such as `/v1/runs/{run_id}:wait`; variables are fields of the request.
        rpc: The descriptor of the rpc.
        body: True if the other fields come from the body, else from the query.
        event_id: For a stream, the field of a response that is the id of its event.
        resume: For a stream, the field of the request that takes the id of the last event.
        endless: True for a stream that has no end of its own and sends progress marks meanwhile.
    """

    verb: str
    path: str
    rpc: MethodDescriptor
    body: bool = False
    event_id: str = ""
    resume: str = ""
    endless: bool = False

    @property
    def method(self) -> str:
        """The full name of the rpc as gRPC writes it, such as `/runlane.v1.RunService/GetRun`."""
        return f"/{self.rpc.containing_service.full_name}/{self.rpc.name}"

    @property
    def max_body(self) -> int:
        """Maximum size of a body in bytes."""
        return _MAX_BODIES.get(self.rpc.name, MAX_BODY)

    @property
    def streams(self) -> bool:
        """True if the rpc answers with a stream."""
        return self.rpc.server_streaming

    @property
    def variables(self) -> tuple[str, ...]:
        """The fields of the request that stand in the path."""
        return tuple(_VARIABLE.findall(self.path))

    @cached_property
    def request(self) -> type[Message]:
        """The class of the request."""
        return _message_class(self.rpc.input_type)

    @cached_property
    def response(self) -> type[Message]:
        """The class of a response."""
        return _message_class(self.rpc.output_type)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        literal = re.escape(self.path).replace(r"\{", "{").replace(r"\}", "}")
        return re.compile(_VARIABLE.sub(r"(?P<\1>[^/]+?)", literal))

    def match(self, raw_path: str) -> Mapping[str, str] | None:
        """Returns the fields in a path that is still percent-encoded; None if it is another.

        Raises:
            Refused: A field in the path is not UTF-8.
        """
        found = self._pattern.fullmatch(raw_path)
        if found is None:
            return None
        return {name: _unquote(name, value) for name, value in found.groupdict().items()}


def _unquote(name: str, text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise invalid(name, "is not UTF-8") from None


def _message_class(descriptor: Descriptor) -> type[Message]:
    return GetMessageClass(descriptor)


_RUNS = run_service_pb2.DESCRIPTOR.services_by_name["RunService"]
_AGENTS = agent_service_pb2.DESCRIPTOR.services_by_name["AgentService"]
_WEBHOOKS = webhook_service_pb2.DESCRIPTOR.services_by_name["WebhookService"]
_SESSIONS = session_service_pb2.DESCRIPTOR.services_by_name["SessionService"]


def _run(verb: str, path: str, rpc: str, **more: bool | str) -> Route:
    return Route(verb, path, _RUNS.methods_by_name[rpc], **more)  # type: ignore[arg-type]


def _session(verb: str, path: str, rpc: str, **more: bool | str) -> Route:
    return Route(verb, path, _SESSIONS.methods_by_name[rpc], **more)  # type: ignore[arg-type]


def _webhook(verb: str, path: str, rpc: str, **more: bool | str) -> Route:
    return Route(verb, path, _WEBHOOKS.methods_by_name[rpc], **more)  # type: ignore[arg-type]


ROUTES: tuple[Route, ...] = (
    # A path with a verb stands before the path that would take the verb for a part of an id.
    _run("POST", "/v1/runs:cancelAll", "CancelAll", body=True),
    _run(
        "GET",
        "/v1/runs:subscribe",
        "SubscribeRunComplete",
        event_id="cursor",
        resume="cursor",
        endless=True,
    ),
    # More ids than an address can hold.
    _run(
        "POST",
        "/v1/runs:subscribe",
        "SubscribeRunComplete",
        body=True,
        event_id="cursor",
        resume="cursor",
        endless=True,
    ),
    _run("POST", "/v1/runs", "RunAccepted", body=True),
    _run("GET", "/v1/runs", "ListRuns"),
    _run("POST", "/v1/sessions/{session_id}:cancel", "Cancel", body=True),
    _run("POST", "/v1/runs/{run_id}:cancel", "Cancel", body=True),
    _run("GET", "/v1/runs/{run_id}:wait", "WaitRun"),
    _run(
        "GET",
        "/v1/runs/{run_id}/events",
        "SubscribeRun",
        event_id="event.index",
        resume="after_index",
    ),
    _run("GET", "/v1/runs/{run_id}", "GetRun"),
    _run("PATCH", "/v1/runs/{run_id}", "UpdateRun", body=True),
    _run("POST", "/v1/sessions/{session_id}/runs", "RunAccepted", body=True),
    _run("GET", "/v1/sessions/{session_id}/runs", "ListRuns"),
    _run("GET", "/v1/input-requests", "ListInputRequests"),
    _run("POST", "/v1/input-requests/{input_request_id}:answer", "AnswerInput", body=True),
    _session(
        "GET",
        "/v1/sessions/{session_ids}/events",
        "SubscribeSession",
        event_id="cursor",
        resume="cursors",
        endless=True,
    ),
    _session("GET", "/v1/sessions/{session_id}/messages", "ListMessages"),
    _session("POST", "/v1/sessions", "CreateSession", body=True),
    _session("GET", "/v1/sessions", "ListSessions"),
    _session("GET", "/v1/sessions/{session_id}", "GetSession"),
    _session("POST", "/v1/sessions/{session_id}:fork", "ForkSession", body=True),
    _session("PATCH", "/v1/sessions/{session_id}", "UpdateSession", body=True),
    _session("DELETE", "/v1/sessions/{session_id}", "DeleteSession"),
    _webhook("POST", "/v1/webhooks", "CreateWebhook", body=True),
    _webhook("GET", "/v1/webhooks", "ListWebhooks"),
    _webhook("POST", "/v1/webhooks/{webhook_id}:redeliver", "RedeliverWebhook", body=True),
    _webhook("POST", "/v1/webhooks/{webhook_id}:rotateSecret", "RotateWebhookSecret", body=True),
    _webhook("GET", "/v1/webhooks/{webhook_id}", "GetWebhook"),
    _webhook("PATCH", "/v1/webhooks/{webhook_id}", "UpdateWebhook", body=True),
    _webhook("DELETE", "/v1/webhooks/{webhook_id}", "DeleteWebhook"),
    Route("GET", "/v1/agents", _AGENTS.methods_by_name["ListAgents"]),
)
"""Every route. The first that matches is taken; the first of an rpc is its canonical one."""

GET_RUN = next(route for route in ROUTES if route.rpc.name == "GetRun")
LIST_AGENTS = next(route for route in ROUTES if route.rpc.name == "ListAgents")


@dataclass(frozen=True, slots=True)
class Found:
    """The target of a path: a route, with the fields that stand in the path."""

    route: Route
    fields: Mapping[str, str]


def find(verb: str, raw_path: str, routes: Iterable[Route] = ROUTES) -> Found:
    """Finds the route of a request.

    Args:
        verb: The HTTP method.
        raw_path: The path as sent, percent-encoded, so that an encoded `/` or `:` is part of an id.
        routes: The routes to look at.

    Raises:
        Refused: There is no such path, or it takes another method.
    """
    allowed: set[str] = set()
    for route in routes:
        fields = route.match(raw_path)
        if fields is None:
            continue
        if route.verb == verb:
            return Found(route, fields)
        allowed.add(route.verb)
    raise not_allowed(verb, ", ".join(sorted(allowed))) if allowed else _not_found()


def not_allowed(verb: str, allowed: str) -> Refused:
    """The error of a path that takes other methods."""
    shown = verb if verb.isalpha() else "this method"
    return Refused(
        code_pb2.UNIMPLEMENTED,
        "METHOD_NOT_ALLOWED",
        f"method: {shown} is not served here; this path takes {allowed}",
        field="method",
        http=405,
        headers={"Allow": allowed},
    )


def _not_found() -> Refused:
    return Refused(
        code_pb2.NOT_FOUND,
        "PATH_NOT_FOUND",
        "path: is not served here; /openapi.json lists the paths",
        field="path",
    )
