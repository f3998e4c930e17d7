"""A real server in this process, and its decoded errors."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from runlane.v1 import run_service_pb2_grpc, session_service_pb2_grpc
from runlane_server.access.control import AccessControl
from runlane_server.access.node_keys import NodeKeys
from runlane_server.access.quotas import QuotaBook
from runlane_server.agents.base import Agent
from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.agents.scripted.latches import Latches
from runlane_server.cluster.peers import Peers
from runlane_server.cluster.relay import Relay
from runlane_server.config import Config
from runlane_server.core.limits import Limits
from runlane_server.engine.coordinator import Coordinator
from runlane_server.feed.feed import Feed
from runlane_server.harness.harness import Harness
from runlane_server.net.addresses import Address
from runlane_server.process.deliveries import NodeWebhooks
from runlane_server.rpc.endpoint import Endpoint
from runlane_server.rpc.tls import ServerTls
from runlane_server.store.base import Store
from runlane_server.store.open import StoreUrl, open_store
from runlane_server.webhooks.attempts import Counts


@dataclass
class Wire:
    """A server with a scripted agent, and stubs to call it."""

    coordinator: Coordinator
    store: Store
    endpoint: Endpoint
    latches: Latches
    channel: grpc.aio.Channel
    address: str
    relay: Relay | None

    @property
    def runs(self) -> run_service_pb2_grpc.RunServiceAsyncStub:
        return run_service_pb2_grpc.RunServiceStub(self.channel)

    @property
    def sessions(self) -> session_service_pb2_grpc.SessionServiceAsyncStub:
        return session_service_pb2_grpc.SessionServiceStub(self.channel)


over_any_store = [pytest.mark.stores("memory"), pytest.mark.usefixtures("served_store")]
"""Marks of a module whose servers use the store of the test."""


def default_store() -> Store:
    """Opens the store of the test."""
    return open_store(StoreUrl.parse(os.environ.get("RUNLANE_STORE", "memory:")))


@asynccontextmanager
async def serving(
    limits: Limits | None = None,
    *,
    store: Store | None = None,
    agent: Agent | None = None,
    progress_interval: float = 60.0,
    access: AccessControl | None = None,
    quotas: QuotaBook | None = None,
    tls: ServerTls | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    listen: str = "127.0.0.1:0",
    harness: Harness | None = None,
    max_per_address: int = 0,
) -> AsyncIterator[Wire]:
    """Serves while the context is open. With `tls` the channel uses `credentials`."""
    latches = Latches()
    async with store or default_store() as opened:
        coordinator = Coordinator(
            opened, agent or ScriptedAgent(latches), Feed(opened), limits, quotas=quotas
        )
        relay, node_keys = None, NodeKeys()
        if opened.cluster is not None:
            node_keys = NodeKeys(opened.cluster.node_keys)
            relay = Relay(opened.cluster, coordinator.feed, Peers(node_keys))
        access = access or AccessControl(node_keys=node_keys, quotas=quotas)
        endpoint = Endpoint(
            coordinator,
            access=access,
            progress_interval=progress_interval,
            relay=relay,
            tls=tls,
            harness=harness,
            webhooks=NodeWebhooks(Config(), coordinator, Counts()).registry,
            max_per_address=max_per_address,
        )
        address = str(endpoint.bind(Address.parse(listen)))
        access.node_keys.address = address
        await coordinator.start(address)
        if relay is not None:
            relay.start(address)
        await endpoint.start()
        try:
            async with _channel(address, credentials) as channel:
                yield Wire(coordinator, opened, endpoint, latches, channel, address, relay)
        finally:
            coordinator.feed.close()
            assert await endpoint.stop(0)
            await coordinator.stop()
            if relay is not None:
                await relay.close()


def _channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(address)
    return grpc.aio.secure_channel(address, credentials)


@dataclass
class RpcFailure:
    """A decoded error."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: Mapping[str, str]
    fields: list[str] = field(default_factory=list)
    quotas: list[tuple[str, str]] = field(default_factory=list)
    retry_after: float | None = None


async def refused(call: Awaitable[Any]) -> RpcFailure:
    """Returns the error of a call, which must fail."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return decode_error(error)
    raise AssertionError(f"the call succeeded: {answer}")


def decode_error(error: grpc.aio.AioRpcError) -> RpcFailure:
    """Decodes an error and its details, each of which may occur once."""
    trailing = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    info, bad, quota, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.QuotaFailure(),
        error_details_pb2.RetryInfo(),
    )
    unpacked = [any_.Unpack(kind) for any_ in status.details for kind in (info, bad, quota, retry)]
    assert unpacked.count(True) == len(status.details)
    assert info.domain == "runlane"
    return RpcFailure(
        error.code(),
        error.details() or "",
        info.reason,
        dict(info.metadata),
        [violation.field for violation in bad.field_violations],
        [(violation.subject, violation.description) for violation in quota.violations],
        retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
    )
