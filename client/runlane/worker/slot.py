"""One slot of a worker: a call of `Work`, opened again whenever it is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio

from runlane.errors import (
    AgentNotFound,
    InvalidArgument,
    PermissionDenied,
    RunlaneError,
    Unauthenticated,
    Unsupported,
)
from runlane.wire import Backoff, Wire, is_cancelled_by_caller
from runlane.worker.attempt import Attempt
from runlane.worker.threads import AgentFunction
from runlane.worker.v1 import worker_service_pb2 as pb
from runlane.worker.v1.worker_service_pb2_grpc import WorkerServiceStub

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 1

MISTAKES = (AgentNotFound, InvalidArgument, PermissionDenied, Unauthenticated, Unsupported)
"""Errors that a new connection does not help."""


class Slot:
    """Executes one run at a time. `wires` lead to nodes of the same store, tried in turn."""

    def __init__(
        self,
        wires: Sequence[Wire],
        agents: Mapping[str, AgentFunction],
        worker_id: str,
    ) -> None:
        self._wires = list(wires)
        self._agents = agents
        self._worker_id = worker_id
        self._attempt: Attempt | None = None
        self._has_offered = False
        self._has_withdrawn = False
        self._is_stopping = False
        self._was_served = False
        self._due = asyncio.Event()
        self._call: Any = None

    @property
    def attempt(self) -> Attempt | None:
        """The attempt that is executed, if any."""
        return self._attempt

    def stop(self) -> None:
        """Offers no more; `serve` returns once the attempt has ended."""
        self._is_stopping = True
        self._wake()

    def _wake(self) -> None:
        self._due.set()

    async def serve(self) -> None:
        """Serves until `stop`. Raises RunlaneError for a mistake that a retry does not help."""
        backoff = Backoff(self._wires[0].retry)
        while not (self._is_stopping and self._attempt is None):
            try:
                await self._connect(self._wires[0])
            except MISTAKES as error:
                if self._attempt is None and not self._is_stopping:
                    raise error from None
                log.error("attempt given up: %s", error)  # noqa: TRY400 - the text says it all
                await self._abandon()
            except RunlaneError as error:
                if self._was_served:
                    backoff.reset()
                self._wires.append(self._wires.pop(0))
                await asyncio.sleep(backoff.next(error))

    async def _abandon(self) -> None:
        """Gives up an attempt that the server does not want to hear of."""
        if self._attempt is not None:
            self._attempt.on_fenced()
            await self._attempt.returned()
            self._attempt = None

    async def _connect(self, wire: Wire) -> None:
        """Serves over one connection. Raises RunlaneError when it is lost."""
        self._has_offered = self._has_withdrawn = self._was_served = False
        if self._attempt is not None:
            self._attempt.disconnect()
        call = WorkerServiceStub(wire.channel).Work(metadata=wire.metadata)
        writing = asyncio.create_task(self._write(call))
        try:
            await self._read(call)
        except (grpc.aio.AioRpcError, grpc.aio.BaseError) as error:
            raise wire.error(error) from error
        except asyncio.CancelledError as error:
            if is_cancelled_by_caller():
                raise
            raise wire.error(error) from error
        finally:
            writing.cancel()
            await asyncio.wait({writing})
            call.cancel()

    # --- Up -----------------------------------------------------------------------------------

    async def _write(self, call: Any) -> None:
        """Writes until the slot stops or the connection is lost, which the reader reports."""
        with suppress(grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
            while True:
                self._due.clear()
                while (message := await self._next_message()) is not None:
                    await call.write(message)
                if self._is_stopping and self._attempt is None and not self._has_offered:
                    await call.done_writing()
                    return
                await self._due.wait()

    async def _next_message(self) -> pb.WorkRequest | None:
        attempt = self._attempt
        if attempt is not None and attempt.is_over:
            # The slot is free once the agent's code has returned.
            await attempt.returned()
            self._attempt = attempt = None
            self._has_offered = False
        if not self._has_offered:
            if attempt is None and self._is_stopping:
                return None
            self._has_offered = True
            offer = pb.WorkRequest.Offer(
                agents=list(self._agents),
                worker_id=self._worker_id,
                protocol_version=PROTOCOL_VERSION,
                resume=None if attempt is None else attempt.resume,
            )
            return pb.WorkRequest(offer=offer)
        if attempt is not None:
            return attempt.next_message()
        if self._is_stopping and not self._has_withdrawn:
            self._has_withdrawn = True
            return pb.WorkRequest(hand_back=pb.WorkRequest.HandBack())
        return None

    # --- Down ---------------------------------------------------------------------------------

    async def _read(self, call: Any) -> None:
        async for response in call:
            self._was_served = True
            self._take(response)

    def _take(self, response: pb.WorkResponse) -> None:
        kind = response.WhichOneof("message")
        if self._has_withdrawn:
            # A turn that came at the same time goes back.
            if kind == "acked" and response.acked.ended:
                self._has_offered = False
                self._wake()
            return
        if kind == "turn":
            turn = response.turn
            self._attempt = Attempt(turn, self._agents[turn.agent], self._wake)
            self._attempt.connect()
            self._wake()
        if self._attempt is not None:
            self._attempt.take(response)
