"""A stream of a worker whose messages a case sends and expects one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc.aio

from runlane.conformance.rules import expect, fail, time_limit
from runlane.errors import RunlaneError
from runlane.wire import Wire, is_cancelled_by_caller
from runlane.worker.v1 import worker_service_pb2 as pb
from runlane.worker.v1.worker_service_pb2_grpc import WorkerServiceStub

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class WorkerAgent:
    """The name of an agent that workers execute, and how to connect as one."""

    name: str
    connect: Callable[[], Wire]


class WorkerStream:
    """One call of `Work` on a connection of its own, which offers a slot for an agent.

    Every wait fails the case after `timeout` seconds.
    """

    def __init__(self, agent: WorkerAgent, timeout: float) -> None:
        self._wire = agent.connect()
        self._agent = agent.name
        self._timeout = timeout
        self._call: Any = None

    async def __aenter__(self) -> Self:
        self._call = WorkerServiceStub(self._wire.channel).Work(
            metadata=self._wire.metadata, wait_for_ready=True
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.drop()
        await self._wire.close()

    def drop(self) -> None:
        """Loses the connection."""
        self._call.cancel()

    # --- Up -------------------------------------------------------------------------------------

    async def send(self, **message: Any) -> None:
        """Sends a message. If the stream has ended, the next read reports it."""
        async with time_limit("the server to read a message", self._timeout):
            with suppress(grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
                await self._call.write(pb.WorkRequest(**message))

    async def offer(self, **changes: Any) -> None:
        """Offers the slot."""
        fields: dict[str, Any] = {
            "agents": [self._agent],
            "worker_id": "conformance",
            "protocol_version": PROTOCOL_VERSION,
            **changes,
        }
        await self.send(offer=pb.WorkRequest.Offer(**fields))

    async def emit(self, number: int, *texts: str) -> None:
        """Emits texts, the first with a number."""
        events = [pb.Event(text_delta=text) for text in texts]
        await self.send(emit=pb.WorkRequest.Emit(number=number, events=events))

    async def finish(self, number: int) -> None:
        """Ends the turn, whose last event has a number, and waits until its end is durable."""
        await self.send(finish=pb.WorkRequest.Finish(number=number))
        await self.expect_ended()

    async def hand_back(self) -> None:
        """Gives the turn or the offer back, and waits for the answer."""
        await self.send(hand_back=pb.WorkRequest.HandBack())
        await self.expect_ended()

    # --- Down -----------------------------------------------------------------------------------

    async def receive(self) -> tuple[str, Any]:
        """Returns the kind of the next message, and the message; no kind at the end of the stream.

        Raises RunlaneError.
        """
        try:
            async with time_limit("a message to the worker", self._timeout):
                response = await self._call.read()
        except (grpc.aio.AioRpcError, grpc.aio.BaseError) as error:
            raise self._wire.error(error) from error
        except asyncio.CancelledError as error:
            if is_cancelled_by_caller():
                raise
            raise self._wire.error(error) from error
        if response is grpc.aio.EOF:
            return "", None
        kind = response.WhichOneof("message")
        return kind, getattr(response, kind)

    async def expect(self, kind: str) -> Any:
        """Returns the next message, which must be of a kind."""
        found, message = await self.receive()
        expect("kind of the message to the worker", found or "the end of the stream", kind)
        return message

    async def expect_acked(self, number: int) -> None:
        """Waits until the event with a number is acknowledged."""
        while (acked := await self.expect("acked")).number < number:
            pass
        expect("acknowledged number", acked.number, number)

    async def expect_ended(self) -> None:
        """Waits until the end of the turn is acknowledged."""
        while not (await self.expect("acked")).ended:
            pass

    async def expect_refusal(self, reason: str) -> None:
        """Reads until the server refuses what was sent, and ends the stream for this reason."""
        try:
            while (await self.receive())[0]:
                pass
        except RunlaneError as error:
            expect("reason for the end of the stream", error.reason, reason)
        else:
            fail(f"the stream ended without the error {reason}")
