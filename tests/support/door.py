"""An HTTP door before a server, and requests of every rpc through it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2
from google.protobuf import json_format
from google.protobuf.message import Message

from runlane.metadata import MetadataSource
from runlane.wire import Wire
from runlane_web.entry import Door as OtherDoor
from runlane_web.gateway import Gateway, Limits
from runlane_web.guard import Policy
from runlane_web.routes import ROUTES, Route
from runlane_web.serving import Address, bind, make_server
from runlane_web.upstream import RETRY

OWN = Policy(token="own-token-of-the-gateway")  # noqa: S106 - of tests


@dataclass(frozen=True)
class Door:
    """A gateway that listens, and a client of it."""

    host: str
    port: int
    http: httpx2.AsyncClient

    async def ask(
        self, method: str, message: Message, token: str | None = None, route: Route | None = None
    ) -> httpx2.Response:
        """Calls an rpc over HTTP; of a stream it reads the first event."""
        route = route or canonical(method)
        request = self.request(route, message, token)
        response = await self.http.send(request, stream=route.streams)
        if route.streams and response.status_code == 200:
            await anext(response.aiter_lines())
            await response.aclose()
        elif route.streams:
            await response.aread()
        return response

    def request(self, route: Route, message: Message, token: str | None) -> httpx2.Request:
        """Makes the HTTP request for a message."""
        fields = json_format.MessageToDict(message, preserving_proto_field_name=True)
        path = route.path
        for name in route.variables:
            path = path.replace("{" + name + "}", quote(str(fields.pop(name, "")), safe=""))
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        if route.body:
            return self.http.build_request(route.verb, path, json=fields, headers=headers)
        return self.http.build_request(route.verb, path, params=fields, headers=headers)


def canonical(method: str) -> Route:
    """The first route of an rpc."""
    return next(route for route in ROUTES if route.method == method)


@asynccontextmanager
async def door(
    target: str,
    policy: Policy = OWN,
    limits: Limits | None = None,
    port: int = 0,
    more: Sequence[OtherDoor] = (),
) -> AsyncIterator[Door]:
    """Opens a door before the server at an address."""
    wire = Wire(
        target,
        credentials=None,
        metadata=MetadataSource({}),
        options=(),
        timeout=60.0,
        retry=RETRY,
    )
    address = Address(port=port)
    (bound,) = bind(address)
    server = make_server(Gateway(wire, policy, limits, more), address)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    host, port = bound.getsockname()[:2]
    headers = {"Authorization": f"Bearer {policy.token}"} if policy.token else {}
    try:
        async with httpx2.AsyncClient(
            base_url=f"http://{host}:{port}", headers=headers, timeout=20.0
        ) as http:
            yield Door(host, port, http)
    finally:
        server.should_exit = server.force_exit = True
        await serving


@dataclass(frozen=True)
class Event:
    """A server-sent event."""

    name: str
    id: str
    data: Mapping[str, Any]


async def events(response: httpx2.Response) -> AsyncIterator[Event]:
    """Reads the events of a stream."""
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield Event(fields["event"], fields.get("id", ""), json.loads(fields["data"]))
            fields = {}


def reason(response: httpx2.Response) -> str:
    """The reason of an error."""
    return str(response.json()["details"][0]["reason"])


def violation(response: httpx2.Response) -> tuple[str, str]:
    """The field and the problem of an error."""
    found = response.json()["details"][1]["fieldViolations"][0]
    return found["field"], found["description"]
