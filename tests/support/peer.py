"""A scripted server: a real grpc.aio server on a real port, which responds correctly or wrongly."""

# ruff: noqa: N802 - a method is named for its rpc
from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import StatusCode

from runlane import Client, RetryPolicy
from runlane.v1 import (
    agent_service_pb2_grpc,
    run_pb2,
    run_service_pb2,
    run_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

QUICK = RetryPolicy(attempts=4, initial=0.001, maximum=0.01)
"""So that tests do not wait for pauses that they are not about."""


@dataclass(frozen=True)
class Refuse:
    """A step: the call ends with this status."""

    code: StatusCode
    reason: str = ""
    message: str = "no"
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[tuple[str, str], ...] = ()
    retry_after: timedelta | None = None
    domain: str = "runlane"

    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        """The trailing metadata, as a server makes it."""
        details: list[Message] = []
        if self.reason:
            details.append(
                error_details_pb2.ErrorInfo(
                    reason=self.reason, domain=self.domain, metadata=self.metadata
                )
            )
        if self.violations:
            found = [
                error_details_pb2.BadRequest.FieldViolation(field=name, description=text)
                for name, text in self.violations
            ]
            details.append(error_details_pb2.BadRequest(field_violations=found))
        if self.retry_after is not None:
            delay = Duration()
            delay.FromTimedelta(self.retry_after)
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        if not details:
            return ()
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        return (("grpc-status-details-bin", status.SerializeToString()),)


class Hang:
    """A step: nothing happens any more until the caller leaves."""


HANG = Hang()
LOST = Refuse(StatusCode.UNAVAILABLE, message="connection reset")

Step: TypeAlias = Message | Refuse | Hang
Script: TypeAlias = Sequence[Step]


class Peer(
    run_service_pb2_grpc.RunServiceServicer,
    session_service_pb2_grpc.SessionServiceServicer,
    agent_service_pb2_grpc.AgentServiceServicer,
):
    """`scripts` has the steps of each call of an rpc, one after the other; `requests` what came;
    `came` is set for each rpc when it was called.

    A call without a script hangs. `left` is set when a caller left a stream, or a call that hung.
    """

    def __init__(self) -> None:
        self.scripts: dict[str, list[Script]] = {}
        self.requests: dict[str, list[Any]] = {}
        self.came: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.left = asyncio.Event()
        self.hanging = asyncio.Event()
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def target(self) -> str:
        """Where it is."""
        return f"127.0.0.1:{self.port}"

    def client(self, timeout: float = 10.0, retry: RetryPolicy = QUICK) -> Client:
        """A client of it."""
        return Client(self.target, timeout=timeout, retry=retry)

    async def start(self) -> None:
        """Serves, on the port it had before."""
        self._server = grpc.aio.server()
        run_service_pb2_grpc.add_RunServiceServicer_to_server(self, self._server)
        session_service_pb2_grpc.add_SessionServiceServicer_to_server(self, self._server)
        agent_service_pb2_grpc.add_AgentServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Breaks all connections off."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def _play(self, rpc: str, request: Any, context: Context) -> Any:
        self.requests.setdefault(rpc, []).append(request)
        self.came[rpc].set()
        scripts = self.scripts.get(rpc)
        for step in scripts.pop(0) if scripts else (HANG,):
            match step:
                case Hang():
                    self.hanging.set()
                    try:
                        await asyncio.Event().wait()
                    finally:
                        self.left.set()
                case Refuse():
                    await context.abort(step.code, step.message, step.trailers())
                case _ if rpc.startswith("Subscribe"):
                    try:
                        await context.write(step)
                    except BaseException:
                        self.left.set()
                        raise
                case _:
                    return step
        return None

    async def RunAccepted(self, request: Any, context: Context) -> Any:
        return await self._play("RunAccepted", request, context)

    async def UpdateRun(self, request: Any, context: Context) -> Any:
        return await self._play("UpdateRun", request, context)

    async def Cancel(self, request: Any, context: Context) -> Any:
        return await self._play("Cancel", request, context)

    async def CancelAll(self, request: Any, context: Context) -> Any:
        return await self._play("CancelAll", request, context)

    async def SubscribeRunComplete(self, request: Any, context: Context) -> None:  # type: ignore[override]
        await self._play("SubscribeRunComplete", request, context)

    async def SubscribeRun(self, request: Any, context: Context) -> None:  # type: ignore[override]
        await self._play("SubscribeRun", request, context)

    async def WaitRun(self, request: Any, context: Context) -> Any:
        return await self._play("WaitRun", request, context)

    async def GetRun(self, request: Any, context: Context) -> Any:
        return await self._play("GetRun", request, context)

    async def ListRuns(self, request: Any, context: Context) -> Any:
        return await self._play("ListRuns", request, context)

    async def ListInputRequests(self, request: Any, context: Context) -> Any:
        return await self._play("ListInputRequests", request, context)

    async def AnswerInput(self, request: Any, context: Context) -> Any:
        return await self._play("AnswerInput", request, context)

    async def ListAgents(self, request: Any, context: Context) -> Any:
        return await self._play("ListAgents", request, context)

    async def CreateSession(self, request: Any, context: Context) -> Any:
        return await self._play("CreateSession", request, context)

    async def GetSession(self, request: Any, context: Context) -> Any:
        return await self._play("GetSession", request, context)

    async def ListSessions(self, request: Any, context: Context) -> Any:
        return await self._play("ListSessions", request, context)

    async def UpdateSession(self, request: Any, context: Context) -> Any:
        return await self._play("UpdateSession", request, context)

    async def ForkSession(self, request: Any, context: Context) -> Any:
        return await self._play("ForkSession", request, context)

    async def DeleteSession(self, request: Any, context: Context) -> Any:
        return await self._play("DeleteSession", request, context)

    async def ListMessages(self, request: Any, context: Context) -> Any:
        return await self._play("ListMessages", request, context)

    async def SubscribeSession(self, request: Any, context: Context) -> None:  # type: ignore[override]
        await self._play("SubscribeSession", request, context)


@asynccontextmanager
async def serving() -> AsyncIterator[Peer]:
    """A peer that serves."""
    peer = Peer()
    await peer.start()
    try:
        yield peer
    finally:
        await peer.stop()


# --- What it says --------------------------------------------------------------------------------


def complete(
    run_id: str,
    state: run_pb2.RunState.ValueType = run_pb2.RUN_STATE_COMPLETED,
    *,
    text: str = "done",
    ended: int = 2,
) -> run_pb2.RunComplete:
    """The end of a run, `ended` seconds after the epoch."""
    failed = state == run_pb2.RUN_STATE_FAILED
    return run_pb2.RunComplete(
        session_id="s",
        run_id=run_id,
        accept_seq=1,
        state=state,
        cancelled=state == run_pb2.RUN_STATE_CANCELLED,
        finish_reason=run_pb2.FINISH_REASON_STOP,
        error=run_pb2.RunError(reason="AGENT_ERROR", message="it broke") if failed else None,
        text=text,
        accepted_at=Timestamp(seconds=1),
        ended_at=Timestamp(seconds=ended),
    )


def run(run_id: str, state: run_pb2.RunState.ValueType = run_pb2.RUN_STATE_ACTIVE) -> run_pb2.Run:
    """A run; with its end in a terminal state."""
    terminal = state >= run_pb2.RUN_STATE_COMPLETED
    return run_pb2.Run(
        session_id="s",
        run_id=run_id,
        accept_seq=1,
        state=state,
        accepted_at=Timestamp(seconds=1),
        run_complete=complete(run_id, state) if terminal else None,
    )


def ended(cursor: str, run_id: str, ended: int = 2) -> run_service_pb2.SubscribeRunCompleteResponse:
    """A terminal event in a subscription."""
    return run_service_pb2.SubscribeRunCompleteResponse(
        cursor=cursor, run_complete=complete(run_id, ended=ended)
    )


def mark(cursor: str) -> run_service_pb2.SubscribeRunCompleteResponse:
    """A progress mark in a subscription."""
    progress = run_service_pb2.SubscribeRunCompleteResponse.Progress(time=Timestamp(seconds=3))
    return run_service_pb2.SubscribeRunCompleteResponse(cursor=cursor, progress=progress)


def event(index: int, **body: Any) -> run_service_pb2.SubscribeRunResponse:
    """An event of a run; without a body, one of a kind that the client does not know."""
    return run_service_pb2.SubscribeRunResponse(
        event=run_pb2.RunEvent(index=index, time=Timestamp(seconds=4), **body)
    )


def says(index: int, text: str) -> run_service_pb2.SubscribeRunResponse:
    """A piece of the answer."""
    return event(index, text_delta=run_pb2.RunEvent.TextDelta(text=text))


def accepted(run_id: str = "r") -> run_service_pb2.RunAcceptedResponse:
    """A run that was accepted."""
    return run_service_pb2.RunAcceptedResponse(run=run(run_id), cursor="before")


def waited(
    run_id: str, state: run_pb2.RunState.ValueType = run_pb2.RUN_STATE_COMPLETED
) -> run_service_pb2.WaitRunResponse:
    """A run that was waited for."""
    return run_service_pb2.WaitRunResponse(run=run(run_id, state))


def deleted() -> session_service_pb2.DeleteSessionResponse:
    """A session that is gone."""
    return session_service_pb2.DeleteSessionResponse()
