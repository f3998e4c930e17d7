"""Other nodes, called with our own client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import grpc

import runlane
from runlane.targets import is_local
from runlane_server.access.door import PEER_KEY, PEER_TENANT
from runlane_server.cluster.relay import RunLost
from runlane.places import is_local
from runlane_server.access.control import PEER_KEY, PEER_TENANT
from runlane_server.cluster.relay import RelayBroken
from runlane_server.core import model

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_BODIES: Mapping[type[Any], Callable[[Any], model.EventBody]] = MappingProxyType(
    {
        runlane.Accepted: lambda told: model.Accepted(told.accept_seq),
        runlane.Started: lambda told: model.Started(told.attempt),
        runlane.TextDelta: lambda told: model.TextDelta(told.text),
        runlane.ReasoningDelta: lambda told: model.ReasoningDelta(told.text),
        runlane.ToolCall: lambda told: model.ToolCall(
            told.tool_call_id, told.name, told.arguments_json
        ),
        runlane.ToolResult: lambda told: model.ToolResult(
            told.tool_call_id, told.name, told.content, told.is_error
        ),
        runlane.Folded: lambda told: model.Folded(told.run_id, told.into_run_id),
    }
)
"""What makes ours of what the client tells. The end of a run is not among them: it is read from
the store, with all that belongs to it."""


class Peers:
    """See `relay.Peers`. `peer_key` is what only the nodes of one store know.

    It is shown over TLS, if there are `credentials`; they are made anew for each connection. Else
    it leaves this machine only if it may go by `plaintext`.

    There is a connection for each node that is followed, and each tenant that follows; as long as
    that lasts.
    """

    def __init__(
        self,
        peer_key: str,
        *,
        credentials: Callable[[], grpc.ChannelCredentials] | None = None,
        plaintext: bool = False,
    ) -> None:
        self._peer_key = peer_key
        self._credentials = credentials
        self._plaintext = plaintext
        self._clients: dict[tuple[str, str], runlane.Client] = {}
        self._users: dict[tuple[str, str], int] = {}

    async def follow(
        self, address: str, key: model.RunKey, after: int, on_lost: Callable[[], None]
    ) -> AsyncGenerator[model.RunEvent | None, None]:
        """The events of a run after an index, from the node at an address; None for its end."""
        async with self._client(address, key.tenant) as client:
            events = client.subscribe_run(
                key.run_id, after_index=after, on_lost=lambda _: on_lost()
            )
            try:
                async with events:
                    async for event in events:
                        yield _event(key.run_id, event)
            except runlane.RunlaneError as error:
                raise RelayBroken(error.message) from error

    async def close(self) -> None:
        """Closes all connections."""
        for client in self._clients.values():
            await client.close()

    def _connect(self, address: str, tenant: str) -> runlane.Client:
        if self._credentials is None and not (self._plaintext or is_local(address)):
            raise RelayBroken(f"without TLS the way to {address} is not safe")
        try:
            credentials = None if self._credentials is None else self._credentials()
        except OSError as error:
            raise RelayBroken(f"{error.filename}: {error.strerror}") from error
        shown = {PEER_KEY: self._peer_key, PEER_TENANT: tenant.encode().hex()}
        return runlane.Client(address, credentials=credentials, metadata=shown)

    @asynccontextmanager
    async def _client(self, address: str, tenant: str) -> AsyncIterator[runlane.Client]:
        whose = address, tenant
        if whose not in self._clients:
            self._clients[whose] = self._connect(address, tenant)
        self._users[whose] = self._users.get(whose, 0) + 1
        try:
            yield self._clients[whose]
        finally:
            self._users[whose] -= 1
            if not self._users[whose]:
                del self._users[whose]
                await self._clients.pop(whose).close()


def _event(run_id: str, told: runlane.RunEvent) -> model.RunEvent | None:
    if isinstance(told.body, runlane.RunComplete):
        return None
    at = (told.time - _EPOCH) // timedelta(microseconds=1)
    return model.RunEvent(run_id, told.index, at, _BODIES[type(told.body)](told.body))
