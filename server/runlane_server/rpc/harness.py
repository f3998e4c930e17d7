"""HarnessService: decode, call, encode."""

# ruff: noqa: N802 - a method is named for its rpc
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration

from runlane.harness.v1 import harness_service_pb2 as pb
from runlane.harness.v1 import harness_service_pb2_grpc
from runlane_server.core.errors import Unsupported
from runlane_server.harness.gates import Arrival, Gate, Point
from runlane_server.harness.harness import Harness
from runlane_server.release import version_of_server
from runlane_server.rpc import convert
from runlane_server.rpc.checks import Checks

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

log = structlog.get_logger()

MAX_ARRIVALS = 10_000
MAX_ADVANCE_DAYS = 3650

_POINTS = {
    pb.GATE_POINT_BEFORE_AGENT_READY: Point.BEFORE_AGENT_READY,
    pb.GATE_POINT_ACCEPT_COMMITTED: Point.ACCEPT_COMMITTED,
    pb.GATE_POINT_BEFORE_ACTIVE: Point.BEFORE_ACTIVE,
    pb.GATE_POINT_HANDOFF: Point.HANDOFF,
    pb.GATE_POINT_BEFORE_FIRST_MESSAGE: Point.BEFORE_FIRST_MESSAGE,
    pb.GATE_POINT_BEFORE_STEP: Point.BEFORE_STEP,
    pb.GATE_POINT_BEFORE_FINISH: Point.BEFORE_FINISH,
}
_POINT_NUMBERS = {point: number for number, point in _POINTS.items()}


class HarnessService(harness_service_pb2_grpc.HarnessServiceServicer):
    """Lets a test control the server."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness

    async def GetServer(
        self, request: pb.GetServerRequest, context: Context
    ) -> pb.GetServerResponse:
        """Returns the settings of the server."""
        about, clock = self._harness.server, self._harness.clock
        return pb.GetServerResponse(
            version=version_of_server(),
            store=about.store,
            durable=about.durable,
            agent=about.agent,
            restarts=self._harness.process.can_restart,
            advances_clock=clock.can_advance,
            cancel_grace=_duration(about.limits.cancel_grace),
            ready_timeout=_duration(about.limits.ready_timeout),
            drain_timeout=_duration(about.drain_timeout),
            progress_interval=_duration(about.progress_interval),
            event_retention=_duration(about.event_retention),
            max_waiting_runs=about.limits.max_waiting_runs,
            max_active_runs=about.limits.max_active_runs,
            time=convert.timestamp(clock.micros()),
            instance=self._harness.instance,
        )

    async def ArmGate(self, request: pb.ArmGateRequest, context: Context) -> pb.ArmGateResponse:
        """Closes a gate."""
        checks = Checks()
        point = _POINTS.get(request.point)
        if point is None:
            checks.reject("point", f"{request.point} is not a point of a gate")
        checks.identifier("session_id", request.session_id)
        checks.identifier("run_id", request.run_id)
        if point is Point.BEFORE_AGENT_READY:
            for field in ("session_id", "run_id"):
                if getattr(request, field):
                    checks.reject(field, "must be empty at this point, which holds the agent")
        checks.finish()
        assert point is not None  # noqa: S101 - it was checked
        gate = self._harness.gates.arm(point, request.session_id, request.run_id)
        return pb.ArmGateResponse(gate_id=gate.spec.gate_id)

    async def AwaitGate(
        self, request: pb.AwaitGateRequest, context: Context
    ) -> pb.AwaitGateResponse:
        """Waits for runs to arrive at a gate."""
        checks = Checks()
        _gate_id(checks, request.gate_id)
        checks.between("arrivals", request.arrivals, 0, MAX_ARRIVALS)
        checks.finish()
        arrivals = await self._harness.gates.wait_for_arrivals(
            request.gate_id, request.arrivals or 1
        )
        return pb.AwaitGateResponse(arrivals=_arrivals(arrivals))

    async def ReleaseGate(
        self, request: pb.ReleaseGateRequest, context: Context
    ) -> pb.ReleaseGateResponse:
        """Removes a gate."""
        checks = Checks()
        _gate_id(checks, request.gate_id)
        checks.finish()
        self._harness.gates.release(request.gate_id)
        return pb.ReleaseGateResponse()

    async def ListGates(
        self, request: pb.ListGatesRequest, context: Context
    ) -> pb.ListGatesResponse:
        """Lists the gates."""
        return pb.ListGatesResponse(gates=map(_gate, self._harness.gates))

    async def AdvanceClock(
        self, request: pb.AdvanceClockRequest, context: Context
    ) -> pb.AdvanceClockResponse:
        """Moves the clock."""
        checks = Checks()
        by = checks.duration("by", request.by, zero=False, days=MAX_ADVANCE_DAYS)
        checks.finish()
        log.info("clock advanced", by_s=by / 1e6)
        await self._harness.clock.advance(by / 1e6)
        return pb.AdvanceClockResponse(time=convert.timestamp(self._harness.clock.micros()))

    async def Crash(self, request: pb.CrashRequest, context: Context) -> pb.CrashResponse:
        """Ends the process."""
        self._harness.process.crash(restart=request.restart)
        raise Unsupported("the process cannot be ended")

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Shuts the server down gracefully."""
        self._harness.process.drain(restart=request.restart)
        return pb.DrainResponse()


def _gate_id(checks: Checks, value: str) -> None:
    if not value:
        checks.reject("gate_id", "is missing")
    checks.identifier("gate_id", value)


def _gate(gate: Gate) -> pb.Gate:
    spec = gate.spec
    return pb.Gate(
        gate_id=spec.gate_id,
        point=_POINT_NUMBERS[spec.point],
        session_id=spec.session_id,
        run_id=spec.run_id,
        arrivals=_arrivals(gate.arrivals),
    )


def _arrivals(arrivals: Iterable[Arrival]) -> list[pb.Arrival]:
    return [pb.Arrival(session_id=each.session_id, run_id=each.run_id) for each in arrivals]


def _duration(seconds: float) -> Duration:
    return convert.duration(round(seconds * 1e6))
