"""The calls of `runlane.harness.v1`."""

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

from runlane.convert import Seconds, member, seconds, to_duration
from runlane.errors import DeadlineExceeded, GateNotFound, RunlaneError, Unavailable
from runlane.harness.v1 import harness_service_pb2 as pb
from runlane.harness.v1.harness_service_pb2_grpc import HarnessServiceStub
from runlane.tokens import Shown, check_stays_here
from runlane.types import NO_LABELS
from runlane.wire import RetryPolicy, Wire

if TYPE_CHECKING:
    from runlane.harness.v1.harness_service_pb2_grpc import HarnessServiceAsyncStub

LOOK_PAUSE = 0.05
"""Seconds between two looks whether a server was started anew."""


class GatePoint(StrEnum):
    """Where a run can be held."""

    BEFORE_AGENT_READY = "before_agent_ready"
    """The server starts, and its agent is not ready. Such a gate names no run, and is armed before
    the server is started anew by `crash` or `drain`."""
    ACCEPT_COMMITTED = "accept_committed"
    """The accept is committed, and its caller has no answer yet. The run itself goes on."""
    BEFORE_ACTIVE = "before_active"
    """The run is the next one of its session, and would become active."""
    HANDOFF = "handoff"
    """The run before it has ended, and this one would become active in the same step."""
    BEFORE_FIRST_MESSAGE = "before_first_message"
    """The run is active, and its agent has begun to say something, which is not told yet."""
    BEFORE_STEP = "before_step"
    """The agent is about to take the prompts that wait to be folded in."""
    BEFORE_FINISH = "before_finish"
    """The agent's code has returned, or was stopped, and the end is not committed yet."""

    @property
    def number(self) -> pb.GatePoint.ValueType:
        """Its value on the wire."""
        return pb.GatePoint.Value(f"GATE_POINT_{self.name}")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A run that came to a gate; both are empty where it is the agent that is held."""

    session_id: str
    run_id: str


@dataclass(frozen=True, slots=True)
class ArmedGate:
    """A gate as the server tells of it; an empty session or run stands for any."""

    gate_id: str
    point: GatePoint
    session_id: str
    run_id: str
    arrivals: Sequence[Arrival]


@dataclass(frozen=True, slots=True)
class Server:
    """How a server is set.

    Attributes:
        version: The release.
        instance: Another one after each start.
        store: `memory`, `sqlite` or `postgresql`.
        durable: Whether what it accepted outlives its process.
        agent: The kind of its agent, such as `scripted`.
        restarts: Whether its process can be ended and started anew.
        advances_clock: Whether its clock can be moved.
        cancel_grace: How long an agent has to return after a cancel.
        ready_timeout: How long runs wait for the agent to get ready before they fail.
        drain_timeout: How long a shutdown waits for the active runs.
        progress_interval: After how long an idle subscription gets a progress mark.
        event_retention: How long terminal events are kept; 0: without limit.
        max_waiting_runs: How many runs may wait in one session.
        max_active_runs: How many runs are active at a time.
        time: What its clock shows.
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
    """Has a hold of a server that was started with `--harness`, for one event loop.

    Every call raises `RunlaneError` or one of its subclasses; UnexpectedStatus with the status
    UNIMPLEMENTED is how a server answers that was started without it.

    Args:
        target: Where the server is, as `runlane.Client` takes it.
        credentials: For TLS, as `runlane.Client` takes them.
        token: Says who calls. Where the server knows its callers, it has to be an admin's.
        timeout: How long a call may take (seconds or a timedelta). Waiting at a gate has a limit of
            its own.
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
            check_stays_here(target, "give credentials for TLS")
        self._wire = Wire(
            target,
            credentials=credentials,
            shown=Shown(metadata, token),
            options=(),
            timeout=seconds(timeout),
            retry=RetryPolicy(),
        )
        self._stub: HarnessServiceAsyncStub | None = None

    async def close(self) -> None:
        """Closes the connection. Gates that are armed stay so. May be repeated."""
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
        """How the server is set."""
        told = await self._wire.call(self._calls.GetServer, pb.GetServerRequest())
        return Server(
            version=told.version,
            instance=told.instance,
            store=told.store,
            durable=told.durable,
            agent=told.agent,
            restarts=told.restarts,
            advances_clock=told.advances_clock,
            cancel_grace=told.cancel_grace.ToTimedelta(),
            ready_timeout=told.ready_timeout.ToTimedelta(),
            drain_timeout=told.drain_timeout.ToTimedelta(),
            progress_interval=told.progress_interval.ToTimedelta(),
            event_retention=told.event_retention.ToTimedelta(),
            max_waiting_runs=told.max_waiting_runs,
            max_active_runs=told.max_active_runs,
            time=told.time.ToDatetime(UTC),
        )

    async def arm(self, point: GatePoint, *, session_id: str = "", run_id: str = "") -> Gate:
        """Closes a gate: from now on every run that it means is held when it comes there.

        Without a session or a run it means any. It stays closed until it is released; used as a
        context manager it is released at the end. Raises InvalidArgument, and ValueError for a
        point that there is not.
        """
        point = member("point", GatePoint, point)
        request = pb.ArmGateRequest(point=point.number, session_id=session_id, run_id=run_id)
        # Repeated, it would leave a gate behind that nobody knows.
        armed = await self._wire.call(self._calls.ArmGate, request, repeat=_never)
        return Gate(armed.gate_id, point, self)

    async def gates(self) -> Sequence[ArmedGate]:
        """The gates that are armed, in the order in which they were."""
        told = await self._wire.call(self._calls.ListGates, pb.ListGatesRequest())
        return [
            ArmedGate(
                gate.gate_id,
                GatePoint[pb.GatePoint.Name(gate.point).removeprefix("GATE_POINT_")],
                gate.session_id,
                gate.run_id,
                _arrivals(gate.arrivals),
            )
            for gate in told.gates
        ]

    async def await_gate(
        self, gate_id: str, *, arrivals: int = 1, timeout: Seconds = 10.0
    ) -> Sequence[Arrival]:
        """Waits until so many runs have come to a gate since it was armed; returns all that have.

        Raises DeadlineExceeded after `timeout`, and GateNotFound also where the gate is released
        meanwhile.
        """
        request = pb.AwaitGateRequest(gate_id=gate_id, arrivals=arrivals)
        told = await self._wire.call(self._calls.AwaitGate, request, timeout=seconds(timeout))
        return _arrivals(told.arrivals)

    async def release(self, gate_id: str) -> None:
        """Removes a gate: what is held by it alone goes on. Raises GateNotFound."""
        request = pb.ReleaseGateRequest(gate_id=gate_id)
        await self._wire.call(self._calls.ReleaseGate, request, repeat=_never)

    async def advance_clock(self, by: Seconds) -> datetime:
        """Moves the server's clock forward (seconds or a timedelta; more than 0, at most 3650
        days); returns what it shows then.

        What is due by then is done next: timeouts, grace periods, progress marks, retention. Raises
        Unsupported where the server's event loop is not its own.
        """
        request = pb.AdvanceClockRequest(by=to_duration(by))
        told = await self._wire.call(self._calls.AdvanceClock, request, repeat=_never)
        return told.time.ToDatetime(UTC)

    async def crash(self, *, restart: bool = True) -> None:
        """Ends the server's process as SIGKILL does, and has it started anew at once.

        Returns when it is gone. It comes back at the same address, with its gates and its clock as
        they are; calls of clients wait for it. Without `restart` it is for others to start it.
        Raises Unsupported where the process is not the server's own.
        """
        request = pb.CrashRequest(restart=restart)
        try:
            await self._wire.call(self._calls.Crash, request, repeat=_never)
        except Unavailable as error:
            if error.reason:
                raise

    async def drain(self, *, restart: bool = True) -> None:
        """Has the server go down in good order, as SIGTERM does, and start anew after that.

        Returns at once: what is active has time to end. `until_restarted` waits for the rest.
        Raises Unsupported where the process is not the server's own.
        """
        request = pb.DrainRequest(restart=restart)
        await self._wire.call(self._calls.Drain, request, repeat=_never)

    async def until_restarted(self, before: Server, *, timeout: Seconds = 30.0) -> Server:
        """Waits until the server is another one than `before`, and serves; returns how it is set.

        Raises DeadlineExceeded after `timeout`.
        """
        try:
            async with asyncio.timeout(seconds(timeout)):
                while True:
                    with suppress(Unavailable):
                        server = await self.server()
                        if server.instance != before.instance:
                            return server
                    await asyncio.sleep(LOOK_PAUSE)
        except TimeoutError:
            limit = seconds(timeout)
            raise DeadlineExceeded(f"{self._wire.target} did not restart in {limit:g} s") from None

    @property
    def _calls(self) -> HarnessServiceAsyncStub:
        channel = self._wire.channel
        if self._stub is None:
            self._stub = HarnessServiceStub(channel)
        return self._stub


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate that this harness armed."""

    gate_id: str
    point: GatePoint
    _harness: Harness = field(repr=False, compare=False)

    async def reached(self, arrivals: int = 1, *, timeout: Seconds = 10.0) -> Sequence[Arrival]:
        """Waits until so many runs have come here; see `Harness.await_gate`."""
        return await self._harness.await_gate(self.gate_id, arrivals=arrivals, timeout=timeout)

    async def release(self) -> None:
        """Lets go what is held here. Raises GateNotFound if it was released before."""
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


def _arrivals(told: Sequence[Any]) -> Sequence[Arrival]:
    return [Arrival(each.session_id, each.run_id) for each in told]


def _never(_: RunlaneError) -> bool:
    return False
