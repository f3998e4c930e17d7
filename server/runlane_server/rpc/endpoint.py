"""The gRPC server: our services, health, reflection, and the ways in."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
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
    run_service_pb2,
    run_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)
from runlane_server.access.door import Door
from runlane_server.cluster.relay import Relay
from runlane_server.core.errors import StartError
from runlane_server.core.observer import NO_OBSERVER, Observer
from runlane_server.engine.coordinator import Coordinator
from runlane_server.harness.harness import Harness
from runlane_server.net.addresses import split_address
from runlane_server.rpc.calls import Calls
from runlane_server.rpc.guard import Guard
from runlane_server.rpc.harness import HarnessService
from runlane_server.rpc.runs import RunService
from runlane_server.rpc.sessions import SessionService
from runlane_server.rpc.tls import ServerTls

log = structlog.get_logger()

MAX_CALLS = 4_096
"""How many calls a connection may have at a time; each idle subscription takes about 26 KB."""

MAX_METADATA = 16 << 10
"""Bytes of metadata that a call may bring along: tokens of others may be of several KiB."""

OPTIONS = (
    ("grpc.max_concurrent_streams", MAX_CALLS),
    # Between the two gRPC would refuse some calls at random.
    ("grpc.max_metadata_size", MAX_METADATA),
    ("grpc.absolute_max_metadata_size", MAX_METADATA),
    # Who connects and says nothing is cut off; by itself gRPC would wait for two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A peer that is gone is found out within 30 s. The timeout of the ping has to be set as well:
    # keepalive_timeout alone took 61 s where 3 were asked for.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.min_time_between_pings_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients ping every 20 s, also without a call; below that they would be told too_many_pings.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)

LOOK_PAUSE = 0.1
"""Seconds between two looks whether gRPC's server still runs."""

BROKEN_GRACE = 5.0
"""Seconds that calls have to end which one was serving that broke down."""

BIND_TRIES = 50

HANDLERS_TIMEOUT = 5.0
"""Seconds that handlers have to return once their calls are over."""

_SERVICES = (
    run_service_pb2.DESCRIPTOR.services_by_name["RunService"].full_name,
    session_service_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
)

_HARNESS = harness_service_pb2.DESCRIPTOR.services_by_name["HarnessService"].full_name


class Endpoint:
    """Serves a coordinator over gRPC. It is made on the event loop that serves.

    With `shares_port` it can listen where other processes of the same user do. Without `tls`
    nothing is encrypted. A `harness` can be got hold of over the wire.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        door: Door,
        progress_interval: float,
        shares_port: bool = False,
        relay: Relay | None = None,
        observer: Observer = NO_OBSERVER,
        tls: ServerTls | None = None,
        harness: Harness | None = None,
    ) -> None:
        self.calls = Calls()
        self._shares_port = shares_port
        self._tls = tls
        self._door = door
        self._observer = observer
        self._runs = RunService(coordinator, progress_interval=progress_interval, relay=relay)
        self._sessions = SessionService(coordinator)
        self._harness = None if harness is None else HarnessService(harness)
        self._services = _SERVICES if harness is None else (*_SERVICES, _HARNESS)
        self._health = _Health(self._services)
        self._bound: list[str] = []
        self._broken: set[asyncio.Task[None]] = set()
        self._server = self._make()

    def _make(self) -> grpc.aio.Server:
        """A server with all services, that has no port yet."""
        # By default a port that is in use is an error, not a port to share.
        options = (("grpc.so_reuseport", int(self._shares_port)), *OPTIONS)
        server = grpc.aio.server(options=options)
        # It has what the generated code asks of a server.
        guard = cast("grpc.aio.Server", Guard(server, self.calls, self._door, self._observer))
        run_service_pb2_grpc.add_RunServiceServicer_to_server(self._runs, guard)
        session_service_pb2_grpc.add_SessionServiceServicer_to_server(self._sessions, guard)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, guard)
        if self._harness is not None:
            harness_service_pb2_grpc.add_HarnessServiceServicer_to_server(self._harness, guard)
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(names), guard
        )
        return server

    def bind(self, address: str, *, alone: bool = False) -> str:
        """Takes an address of `split_address`; returns it with the port that was bound.

        With `alone` the port is not to be shared, also if others are. Raises StartError.
        """
        host, port = split_address(address)
        if alone and self._shares_port and (why := _obstacle(host, port)):
            raise StartError(f"cannot listen on {address}: {why}")
        if port is None and _answers(host):
            raise StartError(f"cannot listen on {address}: address already in use")
        try:
            bound = self._add_port(address)
        except RuntimeError as error:
            # gRPC does not say why.
            why = _obstacle(host, port) or "it could not be bound"
            raise StartError(f"cannot listen on {address}: {why}") from error
        self._bound.append(address if port is None else f"{host}:{bound}")
        return self._bound[-1]

    def _add_port(self, address: str) -> int:
        if self._tls is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, self._tls.credentials())

    async def start(self) -> None:
        """Begins to serve."""
        for service in self._services:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def keep_serving(self) -> Never:
        """Serves anew whenever gRPC's server has broken down, until it is cancelled.

        grpc.aio ends its server for a call whose path is not UTF-8 (seen with 1.85), which anybody
        can send. Nothing else is touched by that: runs go on, and the calls under way have
        `BROKEN_GRACE` seconds more; subscriptions are resumed by their callers. Raises StartError
        if the addresses cannot be had again.
        """
        while True:
            await asyncio.sleep(LOOK_PAUSE)
            if self._is_running():
                continue
            log.error("gRPC's server broke down; serving anew")
            broken, self._server = self._server, self._make()
            task = asyncio.create_task(_put_away(broken))
            self._broken.add(task)
            task.add_done_callback(self._broken.discard)
            await self._bind_again()
            await self._server.start()

    def _is_running(self) -> bool:
        # What would tell (wait_for_termination) never returns after this kind of end.
        return bool(self._server._server.is_running())  # type: ignore[attr-defined] # noqa: SLF001

    async def _bind_again(self) -> None:
        for address in self._bound:
            for _ in range(BIND_TRIES):
                try:
                    self._add_port(address)
                    break
                except RuntimeError:
                    # The one that broke is about to let go of it.
                    await asyncio.sleep(LOOK_PAUSE)
            else:
                raise StartError(f"cannot listen on {address} again")

    async def retire(self) -> None:
        """Tells balancers to go elsewhere: NOT_SERVING, for good. All calls are served still."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> bool:
        """Ends serving. Calls have `grace` seconds, then they are cancelled.

        Returns whether all handlers have returned, for which it waits `HANDLERS_TIMEOUT` seconds.
        """
        await self._server.stop(grace)
        for task in self._broken:
            task.cancel()
        return await self.calls.finished(HANDLERS_TIMEOUT)


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """Health of the services, with the call that the library leaves out."""

    def __init__(self, services: Sequence[str]) -> None:
        super().__init__()
        self._names = ("", *services)

    async def List(  # noqa: N802 - it is named for its rpc
        self, request: health_pb2.HealthListRequest, context: Any
    ) -> health_pb2.HealthListResponse:
        """The health of each."""
        response = health_pb2.HealthListResponse()
        for name in self._names:
            check = health_pb2.HealthCheckRequest(service=name)
            response.statuses[name].CopyFrom(await self.Check(check, context))
        return response


async def _put_away(broken: grpc.aio.Server) -> None:
    """Ends a server that broke down, and what it was serving. Its own try to do so has failed."""
    with contextlib.suppress(UnicodeDecodeError):
        await broken.stop(BROKEN_GRACE)


def _answers(path: str) -> bool:
    """Whether somebody listens on a socket in the file system: gRPC would just take it away."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(path)
        return True
    return False


def _obstacle(host: str, port: int | None) -> str | None:
    """Why an address cannot be bound, if it cannot."""
    try:
        if port is None:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(host)
        else:
            for family, kind, _, _, place in socket.getaddrinfo(
                host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            ):
                with socket.socket(family, kind) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(place)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None
