"""Calls to other nodes, made with the Runlane client."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any

import grpc

import runlane
from runlane.metadata import MetadataSource
from runlane.run_events import RunEvents
from runlane.wire import RetryPolicy, Wire
from runlane_server.access.node_keys import NodeKeys
from runlane_server.cluster.relay import RelayBroken
from runlane_server.core import model
from runlane_server.core.artifact import ArtifactKind, ArtifactPiece

CALL_SECONDS = 10.0
"""How long a lost connection may take to return."""

MOST_CALLS = 1_000
"""Calls on one connection. A server lets many more wait."""

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
        runlane.Artifact: lambda body: ArtifactPiece(
            body.artifact_id,
            body.name,
            body.mime_type,
            ArtifactKind(body.kind),
            body.content,
            body.append,
            body.last,
        ),
        runlane.Step: lambda body: model.StepResult(body.key, body.json),
        runlane.Custom: lambda body: model.CustomEvent(body.type, body.json),
        runlane.Folded: lambda body: model.Folded(body.run_id, body.into_run_id),
        runlane.InputRequested: lambda body: _requested(body.input_request),
        runlane.InputAnswered: lambda body: model.InputAnswered(body.input_request_id),
        runlane.InputWithdrawn: lambda body: model.InputWithdrawn(body.input_request_id),
        runlane.InputExpired: lambda body: model.InputExpired(body.input_request_id),
        runlane.Resumed: lambda body: model.Resumed(body.attempt),
        runlane.Updated: lambda body: model.Updated(
            body.revision, body.prompt_excerpt, model.WhenBusy(body.when_busy)
        ),
    }
)
"""Converts events of the client. The terminal event is missing: it is read from the store, with
all its fields."""


class Peers:
    """Implements `relay.Peers`. Each call is signed with the key of the nodes, which is never sent.

    `credentials` are created for each connection; without them the connection is not encrypted.

    The calls to a node share a connection, up to `MOST_CALLS` of them; it is open while it is used.
    """

    def __init__(
        self,
        node_keys: NodeKeys,
        *,
        credentials: Callable[[], grpc.ChannelCredentials] | None = None,
    ) -> None:
        self._node_keys = node_keys
        self._credentials = credentials
        self._wires: dict[tuple[str, int], Wire] = {}
        self._users: Counter[tuple[str, int]] = Counter()

    async def follow(
        self, address: str, key: model.RunKey, after: int, on_lost: Callable[[], None]
    ) -> AsyncGenerator[model.RunEvent | None, None]:
        """Yields the events of a run after an index, from one node; None at the end of the run."""
        sign = partial(self._node_keys.sign, address, key.tenant, key.run_id)
        async with self._wire(address) as wire:
            events = RunEvents(
                wire.with_token(sign),
                key.run_id,
                after_index=after,
                on_lost=lambda _: on_lost(),
            )
            try:
                async with events:
                    async for event in events:
                        yield _convert(key.run_id, event)
            except runlane.RunlaneError as error:
                raise RelayBroken(error.message) from error

    async def close(self) -> None:
        """Closes all connections."""
        for wire in self._wires.values():
            await wire.close()

    def _connect(self, address: str) -> Wire:
        try:
            credentials = None if self._credentials is None else self._credentials()
        except OSError as error:
            raise RelayBroken(f"{error.filename}: {error.strerror}") from error
        return Wire(
            address,
            credentials=credentials,
            metadata=MetadataSource({}),
            options=(),
            timeout=CALL_SECONDS,
            retry=RetryPolicy(),
        )

    @asynccontextmanager
    async def _wire(self, address: str) -> AsyncIterator[Wire]:
        numbers = ((address, n) for n in itertools.count())
        connection = next(it for it in numbers if self._users[it] < MOST_CALLS)
        if connection not in self._wires:
            self._wires[connection] = self._connect(address)
        self._users[connection] += 1
        try:
            yield self._wires[connection]
        finally:
            self._users[connection] -= 1
            if not self._users[connection]:
                del self._users[connection]
                await self._wires.pop(connection).close()


def _requested(asked: runlane.InputRequest) -> model.InputRequested:
    expires = asked.expires_at
    return model.InputRequested(
        asked.input_request_id,
        asked.key,
        asked.kind,
        asked.text,
        asked.tool_name,
        asked.arguments_json,
        json.dumps(asked.choices),
        asked.schema_json,
        0 if expires is None else (expires - _EPOCH) // timedelta(microseconds=1),
        asked.question_digest,
    )


def _convert(run_id: str, event: runlane.RunEvent) -> model.RunEvent | None:
    if isinstance(event.body, runlane.RunComplete):
        return None
    at = (event.time - _EPOCH) // timedelta(microseconds=1)
    return model.RunEvent(run_id, event.index, at, _BODIES[type(event.body)](event.body))
