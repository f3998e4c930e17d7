"""The gRPC server: services, health, reflection, and listening addresses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never, cast

import grpc
import structlog
from grpc_health.v1 import (  # type: ignore[import-untyped]
    health,
    health_pb2,
    health_pb2_grpc,
)
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]
    reflection,
    reflection_pb2_grpc,
)

from runlane.harness.v1 import harness_service_pb2, harness_service_pb2_grpc
from runlane.v1 import (
    agent_service_pb2,
    agent_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
    webhook_service_pb2,
    webhook_service_pb2_grpc,
)
from runlane.worker.v1 import worker_service_pb2, worker_service_pb2_grpc
from runlane_server.access.control import AccessControl
from runlane_server.agents.worker.workers import Workers
from runlane_server.cluster.relay import Relay
from runlane_server.core.errors import StartError, start_error
from runlane_server.core.observer import NO_OBSERVER, Observer
from runlane_server.engine.coordinator import Coordinator
from runlane_server.harness.harness import Harness
from runlane_server.net.addresses import Address
from runlane_server.rpc.agents import AgentService
from runlane_server.rpc.connection_shares import ConnectionShares
from runlane_server.rpc.floods import Floods
from runlane_server.rpc.grpc_server import make_server
from runlane_server.rpc.harness import HarnessService
from runlane_server.rpc.inflight import InflightCalls
from runlane_server.rpc.middleware import Middleware
from runlane_server.rpc.requests import MAX_MESSAGE, WINDOW
from runlane_server.rpc.runs import RunService
from runlane_server.rpc.session_stream import SessionStreams
from runlane_server.rpc.sessions import SessionService
from runlane_server.rpc.tls import ServerTls
from runlane_server.rpc.webhooks import WebhookService
from runlane_server.rpc.worker import WorkerService
from runlane_server.webhooks.registry import Webhooks

log = structlog.get_logger()

MAX_CALLS = 4_096
"""Concurrent calls per connection; an idle subscription takes about 26 KB."""

MAX_CONNECTIONS = 20_000
"""Connections of one process, if it has at least twice as many descriptors."""

MAX_METADATA = 16 << 10
"""Bytes of metadata per call; tokens of other issuers may have several KiB."""

OPTIONS = (
    ("grpc.max_concurrent_streams", MAX_CALLS),
    # Both limits are equal: between them, gRPC refuses calls at random.
    ("grpc.max_metadata_size", MAX_METADATA),
    ("grpc.absolute_max_metadata_size", MAX_METADATA),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    # The window of a stream stays small until its message is read, and is not widened by estimates.
    ("grpc.http2.lookahead_bytes", WINDOW),
    ("grpc.http2.bdp_probe", 0),
    # Closes silent connections; by default gRPC waits for two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A connection without a call is closed; clients open another one with their next call.
    ("grpc.max_connection_idle_ms", 60_000),
    # A lost peer is detected within 30 s. The ping timeout is required too: with only
    # keepalive_timeout of 3 s, detection took 61 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.min_time_between_pings_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients ping every 20 s, also without a call; a longer interval here would answer
    # too_many_pings.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)

CHECK_SECONDS = 0.1
"""Seconds between two checks whether gRPC's server still runs."""

BROKEN_GRACE = 5.0
"""Seconds that the calls of a broken server have to end."""

BIND_TRIES = 50

HANDLERS_TIMEOUT = 5.0
"""Seconds that handlers have to return after their calls have ended."""

_SERVICES = (
    run_service_pb2.DESCRIPTOR.services_by_name["RunService"].full_name,
    session_service_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
    agent_service_pb2.DESCRIPTOR.services_by_name["AgentService"].full_name,
)

AGENT_HEALTH = "runlane.agent/"
"""Prefix of the name of an agent in the service name of a health check."""

HTTP_HEALTH = "runlane.http"
"""Service name of a health check for HTTP, with `--http`."""

_WORKER = worker_service_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name

_WEBHOOKS = webhook_service_pb2.DESCRIPTOR.services_by_name["WebhookService"].full_name

_HARNESS = harness_service_pb2.DESCRIPTOR.services_by_name["HarnessService"].full_name


def max_connections(listeners: int) -> int:
    """The connections that gRPC accepts at each listener.

    All listeners together get half of the descriptors of this process. The store, the programs of
    agents and the files with tokens and certificates need the others.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    all_ = MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)
    return max(1, all_ // listeners)


class Endpoint:
    """Serves a coordinator over gRPC. It must be created on the event loop that serves.

    With `shares_port` it can listen on a port together with other processes of the same user.
    Without `tls` connections are not encrypted. A `harness`, `workers` and `webhooks` are served
    as well. Unix sockets get `socket_mode`. `private` is a socket that only processes of this
    server reach. An address may have `max_per_address` connections; 0: half of all. With
    `requires_digest` approvals must name the digest of their question.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        access: AccessControl,
        progress_interval: float,
        shares_port: bool = False,
        relay: Relay | None = None,
        observer: Observer = NO_OBSERVER,
        tls: ServerTls | None = None,
        harness: Harness | None = None,
        workers: Workers | None = None,
        webhooks: Webhooks | None = None,
        socket_mode: int = 0o600,
        private: Address | None = None,
        max_per_address: int = 0,
        requires_digest: bool = False,
    ) -> None:
        self.calls = InflightCalls()
        self._shares_port = shares_port
        self._socket_mode = socket_mode
        self._private = private
        # A process that shares a port listens at one of its own too.
        listeners = 1 + shares_port + (private is not None)
        self._max_connections = max_connections(listeners)
        self.shares = ConnectionShares(max_per_address or max(1, self._max_connections // 2))
        self.floods = Floods()
        self._tls = tls
        self._access = access
        self._observer = observer
        self._runs = RunService(
            coordinator,
            progress_interval=progress_interval,
            relay=relay,
            requires_digest=requires_digest,
        )
        streams = SessionStreams(coordinator, progress_interval=progress_interval, relay=relay)
        self._sessions = SessionService(coordinator, streams)
        self._agents = AgentService(coordinator)
        self._coordinator = coordinator
        self._harness = None if harness is None else HarnessService(harness)
        self._services = _SERVICES if harness is None else (*_SERVICES, _HARNESS)
        self._workers = None if workers is None else WorkerService(coordinator, workers)
        if workers is not None:
            self._services = (*self._services, _WORKER)
        self._webhooks = None
        if webhooks is not None:
            self._webhooks = WebhookService(coordinator.store, webhooks)
            self._services = (*self._services, _WEBHOOKS)
        self._health = _Health(self._services)
        self._bound: list[Address] = []
        self._broken: set[asyncio.Task[None]] = set()
        self._pending: set[asyncio.Task[None]] = set()
        self._server = self._make()

    def _make(self) -> grpc.aio.Server:
        """Creates a server with all services, without a port."""
        # By default gRPC shares a port that is in use; here this must be requested.
        options = (
            ("grpc.so_reuseport", int(self._shares_port)),
            ("grpc.max_allowed_incoming_connections", self._max_connections),
            *OPTIONS,
        )
        server = make_server(options)
        # It has the methods that the generated code calls.
        middleware = cast(
            "grpc.aio.Server",
            Middleware(
                server,
                self.calls,
                self._access,
                self._observer,
                has_certificates=self._tls is not None and self._tls.requires_client_certificates,
            ),
        )
        run_service_pb2_grpc.add_RunServiceServicer_to_server(self._runs, middleware)
        session_service_pb2_grpc.add_SessionServiceServicer_to_server(self._sessions, middleware)
        agent_service_pb2_grpc.add_AgentServiceServicer_to_server(self._agents, middleware)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, middleware)
        if self._webhooks is not None:
            webhook_service_pb2_grpc.add_WebhookServiceServicer_to_server(
                self._webhooks, middleware
            )
        if self._workers is not None:
            worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(self._workers, middleware)
        if self._harness is not None:
            harness_service_pb2_grpc.add_HarnessServiceServicer_to_server(self._harness, middleware)
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(names), middleware
        )
        return server

    def bind(self, address: Address, *, alone: bool = False) -> Address:
        """Binds an address; returns it with the port that was bound.

        With `alone` this port is not shared, even if others are. Raises StartError.
        """
        if alone and self._shares_port and (obstacle := _obstacle(address)):
            raise _cannot_listen(address, obstacle)
        if address.is_unix and _answers(address.path):
            raise StartError(f"cannot listen on {address}: address already in use")
        try:
            bound = self._add_port(address)
        except RuntimeError as error:
            # gRPC does not say why.
            raise _cannot_listen(address, _obstacle(address)) from error
        self._bound.append(address if address.is_unix else address.with_port(bound))
        return self._bound[-1]

    def _add_port(self, address: Address) -> int:
        if not address.is_unix:
            return self._add_listener(address)
        # From its first instant others cannot connect. Other threads may create directories
        # meanwhile, so that the owner keeps all rights.
        umask = os.umask(0o077)
        try:
            bound = self._add_listener(address)
            Path(address.path).chmod(self._socket_mode)
        finally:
            os.umask(umask)
        return bound

    def _add_listener(self, address: Address) -> int:
        if self._tls is None or address == self._private:
            return self._server.add_insecure_port(str(address))
        return self._server.add_secure_port(str(address), self._tls.credentials())

    async def start(self) -> None:
        """Starts serving."""
        for service in self._services:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        for agent in self._coordinator.agents:
            await self._set_health(agent.name, is_ready=agent.is_ready)
        self._coordinator.on_agent_ready(self._on_agent_ready)
        await self._server.start()

    def _on_agent_ready(self, name: str) -> None:
        task = asyncio.create_task(self._set_health(name, is_ready=True))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _set_health(self, agent: str, *, is_ready: bool) -> None:
        """Sets the health of an agent. Its name is not in the rpc List, which needs no
        authentication."""
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if is_ready else states.NOT_SERVING
        await self._health.set(AGENT_HEALTH + agent, state)

    async def set_http_health(self, is_serving: bool) -> None:
        """Sets the health of HTTP, which a process beside this one serves."""
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if is_serving else states.NOT_SERVING
        await self._health.set(HTTP_HEALTH, state)

    async def keep_serving(self) -> Never:
        """Restarts gRPC's server whenever it has broken down, until cancelled.

        The main loop of grpc.aio ends after any unexpected error. Runs continue, open calls have
        `BROKEN_GRACE` seconds to end, and clients resume their subscriptions. Raises StartError if
        an address cannot be bound again.
        """
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if self._is_running():
                continue
            log.error("gRPC server broke down; restarting")
            broken, self._server = self._server, self._make()
            task = asyncio.create_task(_stop_broken(broken))
            self._broken.add(task)
            task.add_done_callback(self._broken.discard)
            await self._bind_again()
            await self._server.start()

    def _is_running(self) -> bool:
        # The public wait_for_termination never returns after this kind of end.
        return bool(self._server._server.is_running())  # type: ignore[attr-defined] # noqa: SLF001

    async def _bind_again(self) -> None:
        for address in self._bound:
            for _ in range(BIND_TRIES):
                try:
                    self._add_port(address)
                    break
                except RuntimeError:
                    # The broken server is about to release it.
                    await asyncio.sleep(CHECK_SECONDS)
            else:
                raise StartError(f"cannot listen on {address} again")

    async def keep_shares(self) -> Never:
        """Closes connections of addresses that have more than their share, until cancelled."""
        while True:
            ports = {bound.port for bound in self._bound if not bound.is_unix}
            await asyncio.sleep(await self.shares.look(ports))

    async def keep_floods_out(self) -> Never:
        """Closes connections that send a flood of frames without a call, until cancelled."""
        while True:
            ports = {bound.port for bound in self._bound if not bound.is_unix}
            await asyncio.sleep(await self.floods.look(ports, self._access.take_calling_ports()))

    async def mark_not_serving(self) -> None:
        """Sets health to NOT_SERVING permanently, for load balancers; calls are still served."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> bool:
        """Stops serving. Calls are cancelled after `grace` seconds.

        Returns whether all handlers have returned within `HANDLERS_TIMEOUT` seconds after that.
        """
        await self._server.stop(grace)
        for task in self._broken:
            task.cancel()
        return await self.calls.wait_idle(HANDLERS_TIMEOUT)


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """Health of the services, with the rpc List that the library lacks."""

    def __init__(self, services: Sequence[str]) -> None:
        super().__init__()
        self._names = ("", *services)

    async def List(  # noqa: N802 - it is named for its rpc
        self, request: health_pb2.HealthListRequest, context: Any
    ) -> health_pb2.HealthListResponse:
        """Returns the health of each service."""
        response = health_pb2.HealthListResponse()
        for name in self._names:
            check = health_pb2.HealthCheckRequest(service=name)
            response.statuses[name].CopyFrom(await self.Check(check, context))
        return response


async def _stop_broken(broken: grpc.aio.Server) -> None:
    """Stops a broken server and its calls. Its own attempt to stop has failed."""
    with contextlib.suppress(UnicodeDecodeError):
        await broken.stop(BROKEN_GRACE)


def _answers(path: str) -> bool:
    """Whether a process listens on a socket file. gRPC would delete the file without asking."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(path)
        return True
    return False


def _obstacle(address: Address) -> OSError | None:
    """Why an address cannot be bound, if it cannot."""
    try:
        for family, place in address.resolve():
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                if not address.is_unix:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
    except OSError as error:
        return error
    return None


def _cannot_listen(address: Address, obstacle: OSError | None) -> StartError:
    if obstacle is None:
        return StartError(f"cannot listen on {address}: it could not be bound")
    why = (obstacle.strerror or str(obstacle)).lower()
    return start_error(f"cannot listen on {address}: {why}", obstacle)
