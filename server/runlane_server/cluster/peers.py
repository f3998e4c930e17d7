"""Calls to other nodes, made with the Runlane client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import grpc

import runlane
from runlane.targets import is_local
from runlane_server.access.control import PEER_KEY, PEER_TENANT
from runlane_server.cluster.relay import RelayBroken
from runlane_server.core import model

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_BODIES: Mapping[type[Any], Callable[[Any], model.EventBody]] = MappingProxyType(
    {
        runlane.Accepted: lambda body: model.Accepted(body.accept_seq),
        runlane.Started: lambda body: model.Started(body.attempt),
        runlane.TextDelta: lambda body: model.TextDelta(body.text),
        runlane.ReasoningDelta: lambda body: model.ReasoningDelta(body.text),
        runlane.ToolCall: lambda body: model.ToolCall(
            body.tool_call_id, body.name, body.arguments_json
        ),
        runlane.ToolResult: lambda body: model.ToolResult(
            body.tool_call_id, body.name, body.content, body.is_error
        ),
        runlane.Folded: lambda body: model.Folded(body.run_id, body.into_run_id),
    }
)
"""Converts events of the client. The terminal event is missing: it is read from the store, with
all its fields."""


class Peers:
    """Implements `relay.Peers`. `peer_key` is the secret that only the nodes of one store know.

    The key is sent over TLS if there are `credentials`, which are created for each connection.
    Without them it leaves this machine only if `plaintext` allows it.

    One connection per pair of followed node and following tenant is open while it is used.
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
        """Yields the events of a run after an index, from one node; None at the end of the run."""
        async with self._client(address, key.tenant) as client:
            events = client.subscribe_run(
                key.run_id, after_index=after, on_lost=lambda _: on_lost()
            )
            try:
                async with events:
                    async for event in events:
                        yield _convert(key.run_id, event)
            except runlane.RunlaneError as error:
                raise RelayBroken(error.message) from error

    async def close(self) -> None:
        """Closes all connections."""
        for client in self._clients.values():
            await client.close()

    def _connect(self, address: str, tenant: str) -> runlane.Client:
        if self._credentials is None and not (self._plaintext or is_local(address)):
            raise RelayBroken(f"connection to {address} requires TLS or --insecure-anywhere")
        try:
            credentials = None if self._credentials is None else self._credentials()
        except OSError as error:
            raise RelayBroken(f"{error.filename}: {error.strerror}") from error
        metadata = {PEER_KEY: self._peer_key, PEER_TENANT: tenant.encode().hex()}
        return runlane.Client(address, credentials=credentials, metadata=metadata)

    @asynccontextmanager
    async def _client(self, address: str, tenant: str) -> AsyncIterator[runlane.Client]:
        connection = address, tenant
        if connection not in self._clients:
            self._clients[connection] = self._connect(address, tenant)
        self._users[connection] = self._users.get(connection, 0) + 1
        try:
            yield self._clients[connection]
        finally:
            self._users[connection] -= 1
            if not self._users[connection]:
                del self._users[connection]
                await self._clients.pop(connection).close()


def _convert(run_id: str, event: runlane.RunEvent) -> model.RunEvent | None:
    if isinstance(event.body, runlane.RunComplete):
        return None
    at = (event.time - _EPOCH) // timedelta(microseconds=1)
    return model.RunEvent(run_id, event.index, at, _BODIES[type(event.body)](event.body))
