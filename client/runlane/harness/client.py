"""The client of `runlane.harness.v1`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc

from runlane.convert import Seconds, seconds, to_duration, to_member
from runlane.errors import DeadlineExceeded, GateNotFound, RunlaneError, Unavailable
from runlane.harness.v1 import harness_service_pb2 as pb
from runlane.harness.v1.harness_service_pb2_grpc import HarnessServiceStub
from runlane.metadata import MetadataSource, check_token_target
from runlane.types import NO_LABELS
from runlane.wire import RetryPolicy, Wire

if TYPE_CHECKING:
    from runlane.harness.v1.harness_service_pb2_grpc import HarnessServiceAsyncStub

RESTART_POLL_SECONDS = 0.05
"""Seconds between two checks for a restarted server."""


class GatePoint(StrEnum):
    """A point where a run can be held."""

    BEFORE_AGENT_READY = "before_agent_ready"
    """Server start, before the agent becomes ready. This gate names no run; arm it before
    restarting the server with `crash` or `drain`."""
    ACCEPT_COMMITTED = "accept_committed"
    """The accept is committed and its response is held back. The run itself continues."""
    BEFORE_ACTIVE = "before_active"
    """The run is next in its session and about to become active."""
    HANDOFF = "handoff"
    """The previous run has ended and this run is about to become active in the same step."""
    BEFORE_FIRST_MESSAGE = "before_first_message"
    """The run is active and its agent has produced its first output, not yet published."""
    BEFORE_STEP = "before_step"
    """The agent is about to take the runs that wait to be folded."""
    BEFORE_FINISH = "before_finish"
    """The agent has returned or was stopped; the end of the run is not committed yet."""

    @property
    def number(self) -> pb.GatePoint.ValueType:
        """The value on the wire."""
        return pb.GatePoint.Value(f"GATE_POINT_{self.name}")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A run that arrived at a gate; both ids are empty at BEFORE_AGENT_READY."""

    session_id: str
    run_id: str


@dataclass(frozen=True, slots=True)
class ArmedGate:
    """An armed gate as listed by the server; an empty id matches every session or run."""

    gate_id: str
    point: GatePoint
    session_id: str
    run_id: str
    arrivals: Sequence[Arrival]


@dataclass(frozen=True, slots=True)
class Server:
    """The settings of a server.

    Attributes:
        version: The server version.
        instance: An id that changes at each start.
        store: `memory`, `sqlite` or `postgresql`.
        durable: True if accepted runs survive the server process.
        agent: The kind of agent, such as `scripted`.
        restarts: True if `crash` and `drain` can end and restart the process.
        advances_clock: True if `advance_clock` works.
        cancel_grace: Maximum time for an agent to return after a cancel.
        ready_timeout: Maximum time that runs wait for the agent to become ready before they fail.
        drain_timeout: Maximum time that a shutdown waits for active runs.
        progress_interval: Interval of progress marks on an idle subscription.
        event_retention: Retention period of terminal events; 0: no limit.
        max_waiting_runs: Maximum number of waiting runs per session.
        max_active_runs: Maximum number of active runs.
        time: The current time of the server's clock.
    """

    version: str
    instance: str
    store: str
    durable: bool
    agent: str
    restarts: bool
    advances_clock: bool
    cancel_grace: timedelta
    ready_timeout: timedelta
    drain_timeout: timedelta
    progress_interval: timedelta
    event_retention: timedelta
    max_waiting_runs: int
    max_active_runs: int
    time: datetime


class Harness:
    """Controls a server started with `--harness`; for one event loop.

    Calls raise `RunlaneError` or one of its subclasses. A server started without `--harness`
    returns UnexpectedStatus with the status UNIMPLEMENTED.

    Args:
        target: The server, as for `runlane.Client`.
        credentials: TLS credentials, as for `runlane.Client`.
        metadata: Sent with every call.
        token: The bearer token. A server with access control requires the role admin.
        timeout: Maximum duration of a call (seconds or a timedelta). Waiting at a gate has its own
            limit.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str] = NO_LABELS,
        token: str | None = None,
        timeout: Seconds = 10.0,
    ) -> None:
        if token is not None and credentials is None:
            check_token_target(target, "set credentials for TLS")
        self._wire = Wire(
            target,
            credentials=credentials,
            metadata=MetadataSource(metadata, token),
            options=(),
            timeout=seconds(timeout),
            retry=RetryPolicy(),
        )
        self._stub: HarnessServiceAsyncStub | None = None

    async def close(self) -> None:
        """Closes the connection; gates stay armed. Idempotent."""
        await self._wire.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def server(self) -> Server:
        """Returns the settings of the server."""
        response = await self._wire.call(self._calls.GetServer, pb.GetServerRequest())
        return Server(
            version=response.version,
            instance=response.instance,
            store=response.store,
            durable=response.durable,
            agent=response.agent,
            restarts=response.restarts,
            advances_clock=response.advances_clock,
            cancel_grace=response.cancel_grace.ToTimedelta(),
            ready_timeout=response.ready_timeout.ToTimedelta(),
            drain_timeout=response.drain_timeout.ToTimedelta(),
            progress_interval=response.progress_interval.ToTimedelta(),
            event_retention=response.event_retention.ToTimedelta(),
            max_waiting_runs=response.max_waiting_runs,
            max_active_runs=response.max_active_runs,
            time=response.time.ToDatetime(UTC),
        )

    async def arm(self, point: GatePoint, *, session_id: str = "", run_id: str = "") -> Gate:
        """Arms a gate: every matching run is held when it reaches the point.

        Without a session or run id the gate holds every run. It stays armed until it is released;
        as a context manager it is released on exit. Raises InvalidArgument, and ValueError if point
        is not a choice.
        """
        point = to_member("point", GatePoint, point)
        request = pb.ArmGateRequest(point=point.number, session_id=session_id, run_id=run_id)
        # A retry could leave behind a gate with an unknown id.
        response = await self._wire.call(self._calls.ArmGate, request, should_retry=_never)
        return Gate(response.gate_id, point, self)

    async def gates(self) -> Sequence[ArmedGate]:
        """Lists the armed gates, in the order in which they were armed."""
        response = await self._wire.call(self._calls.ListGates, pb.ListGatesRequest())
        return [
            ArmedGate(
                gate.gate_id,
                GatePoint[pb.GatePoint.Name(gate.point).removeprefix("GATE_POINT_")],
                gate.session_id,
                gate.run_id,
                _arrivals(gate.arrivals),
            )
            for gate in response.gates
        ]

    async def await_gate(
        self, gate_id: str, *, arrivals: int = 1, timeout: Seconds = 10.0
    ) -> Sequence[Arrival]:
        """Waits for a number of arrivals since the gate was armed; returns all arrivals so far.

        Raises DeadlineExceeded after `timeout` (seconds or a timedelta), and GateNotFound, also if
        the gate is released during the wait.
        """
        request = pb.AwaitGateRequest(gate_id=gate_id, arrivals=arrivals)
        response = await self._wire.call(self._calls.AwaitGate, request, timeout=seconds(timeout))
        return _arrivals(response.arrivals)

    async def release(self, gate_id: str) -> None:
        """Releases and removes a gate. Raises GateNotFound."""
        request = pb.ReleaseGateRequest(gate_id=gate_id)
        await self._wire.call(self._calls.ReleaseGate, request, should_retry=_never)

    async def advance_clock(self, by: Seconds) -> datetime:
        """Advances the server's clock; returns the new time.

        The server then does the work that is due: timeouts, grace periods, progress marks,
        retention. Raises Unsupported if the server does not control its event loop.

        Args:
            by: Seconds or a timedelta; more than 0 and at most 3650 days.
        """
        request = pb.AdvanceClockRequest(by=to_duration(by))
        response = await self._wire.call(self._calls.AdvanceClock, request, should_retry=_never)
        return response.time.ToDatetime(UTC)

    async def crash(self, *, restart: bool = True) -> None:
        """Kills the server process immediately, like SIGKILL, and restarts it.

        Returns when the process is gone. The server returns at the same address with its armed
        gates and its clock; clients retry meanwhile. Without `restart`, the process supervisor has
        to restart it. Raises Unsupported if the server does not control its process.
        """
        request = pb.CrashRequest(restart=restart)
        try:
            await self._wire.call(self._calls.Crash, request, should_retry=_never)
        except Unavailable as error:
            if error.reason:
                raise

    async def drain(self, *, restart: bool = True) -> None:
        """Shuts the server down gracefully, like SIGTERM, and restarts it.

        Returns immediately, while active runs have the drain timeout to finish; wait with
        `until_restarted`. Raises Unsupported if the server does not control its process.
        """
        request = pb.DrainRequest(restart=restart)
        await self._wire.call(self._calls.Drain, request, should_retry=_never)

    async def until_restarted(self, before: Server, *, timeout: Seconds = 30.0) -> Server:
        """Waits until the server has restarted since `before`; returns its settings.

        Raises DeadlineExceeded after `timeout` (seconds or a timedelta).
        """
        try:
            async with asyncio.timeout(seconds(timeout)):
                while True:
                    with suppress(Unavailable):
                        server = await self.server()
                        if server.instance != before.instance:
                            return server
                    await asyncio.sleep(RESTART_POLL_SECONDS)
        except TimeoutError:
            limit = seconds(timeout)
            raise DeadlineExceeded(
                f"{self._wire.target} did not restart within {limit:g} s"
            ) from None

    @property
    def _calls(self) -> HarnessServiceAsyncStub:
        channel = self._wire.channel
        if self._stub is None:
            self._stub = HarnessServiceStub(channel)
        return self._stub


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate armed by this harness; as a context manager it is released on exit.

    Attributes:
        gate_id: The id, for `Harness.await_gate` and `Harness.release`.
        point: The point where it holds runs.
    """

    gate_id: str
    point: GatePoint
    _harness: Harness = field(repr=False, compare=False)

    async def reached(self, arrivals: int = 1, *, timeout: Seconds = 10.0) -> Sequence[Arrival]:
        """Waits for a number of arrivals at this gate; see `Harness.await_gate`."""
        return await self._harness.await_gate(self.gate_id, arrivals=arrivals, timeout=timeout)

    async def release(self) -> None:
        """Releases the gate. Raises GateNotFound if it was released before."""
        await self._harness.release(self.gate_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(GateNotFound):
            await self.release()


def _arrivals(messages: Sequence[Any]) -> Sequence[Arrival]:
    return [Arrival(each.session_id, each.run_id) for each in messages]


def _never(_: RunlaneError) -> bool:
    return False
