"""Other nodes, called with our own client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, TypeAlias

import grpc

import runlane
from runlane_server.core import model
from runlane_server.relay import RunLost

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_FROM_PEER = ("runlane-peer", "1")
"""Says that a node asks, which wants to know what happens where it asks and nowhere else."""

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


def is_from_peer(context: Context) -> bool:
    """Whether another node calls."""
    return _FROM_PEER in (context.invocation_metadata() or ())


class Peers:
    """See `relay.Peers`. A connection for each node that is followed, and as long as it is."""

    def __init__(self) -> None:
        self._clients: dict[str, runlane.Client] = {}
        self._users: dict[str, int] = {}

    async def follow(
        self, address: str, key: model.RunKey, after: int, on_lost: Callable[[], None]
    ) -> AsyncGenerator[model.RunEvent | None, None]:
        """The events of a run after an index, from the node at an address; None for its end."""
        async with self._client(address) as client:
            events = client.subscribe_run(
                key.run_id, after_index=after, on_lost=lambda _: on_lost()
            )
            try:
                async with events:
                    async for event in events:
                        yield _event(key.run_id, event)
            except runlane.RunlaneError as error:
                raise RunLost(error.message) from error

    async def close(self) -> None:
        """Closes all connections."""
        for client in self._clients.values():
            await client.close()

    @asynccontextmanager
    async def _client(self, address: str) -> AsyncIterator[runlane.Client]:
        if address not in self._clients:
            self._clients[address] = runlane.Client(address, metadata=dict([_FROM_PEER]))
        self._users[address] = self._users.get(address, 0) + 1
        try:
            yield self._clients[address]
        finally:
            self._users[address] -= 1
            if not self._users[address]:
                del self._users[address]
                await self._clients.pop(address).close()


def _event(run_id: str, told: runlane.RunEvent) -> model.RunEvent | None:
    if isinstance(told.body, runlane.RunComplete):
        return None
    at = (told.time - _EPOCH) // timedelta(microseconds=1)
    return model.RunEvent(run_id, told.index, at, _BODIES[type(told.body)](told.body))
