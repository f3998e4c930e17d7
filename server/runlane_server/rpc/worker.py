"""WorkerService: decode, call, encode."""

# ruff: noqa: N802 - a method is named for its rpc
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeAlias

import grpc
import structlog
from structlog.contextvars import bind_contextvars

from runlane.worker.v1 import worker_service_pb2 as pb
from runlane.worker.v1 import worker_service_pb2_grpc
from runlane_server.access.caller import CALLER, tenant
from runlane_server.agents.base import AgentError
from runlane_server.agents.worker.messages import Acked, Downstream
from runlane_server.agents.worker.slot import Resumption, Slot
from runlane_server.agents.worker.workers import Workers
from runlane_server.core.errors import InvalidArgument, RunlaneError
from runlane_server.engine.coordinator import Coordinator
from runlane_server.rpc import worker_events, worker_messages

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

TakeOffer: TypeAlias = Callable[[Slot, pb.WorkRequest.Offer], Coroutine[Any, Any, None]]

log = structlog.get_logger()


class WorkerService(worker_service_pb2_grpc.WorkerServiceServicer):
    """Gives runs to workers."""

    def __init__(self, coordinator: Coordinator, workers: Workers) -> None:
        self._coordinator = coordinator
        self._workers = workers

    async def Work(
        self, requests: AsyncIterator[pb.WorkRequest], context: Context
    ) -> AsyncIterator[pb.WorkResponse]:
        """Serves a slot of a worker (R33 to R37)."""
        down = Downstream()
        slot = Slot(tenant(), down, CALLER.get().name)
        self._workers.connect(slot)
        try:
            async for response in serve_slot(requests, slot, down, self._take, self._workers):
                yield response
        finally:
            self._workers.disconnect(slot, revoked=getattr(context, "is_revoked", False))

    async def _take(self, slot: Slot, offer: pb.WorkRequest.Offer) -> None:
        worker_messages.check_offer(offer)
        self._workers.check(offer.agents, CALLER.get().agents)
        slot.begin_offer(offer.agents, offer.worker_id)
        if not offer.HasField("resume"):
            self._workers.offer(slot)
            return
        wanted = worker_messages.resumption(offer.resume, tenant())
        if await self._adopt(slot, wanted):
            await self._workers.resume_adopted(slot, wanted)
        else:
            slot.fence("the attempt is not the active one any more")

    async def _adopt(self, slot: Slot, wanted: Resumption) -> bool:
        # Before the attempt moves to this node: the token of an attempt opens no other tenant.
        return slot.serves(wanted.key.tenant) and await self._coordinator.adopt(
            wanted.key, wanted.attempt, wanted.fence, allowed_agents=CALLER.get().agents
        )


async def serve_slot(
    requests: AsyncIterator[pb.WorkRequest],
    slot: Slot,
    down: Downstream,
    take_offer: TakeOffer,
    workers: Workers,
) -> AsyncIterator[pb.WorkResponse]:
    """Passes the messages of a stream on in both directions, until it ends."""
    reading = asyncio.create_task(_read(requests, _Stream(slot, take_offer, workers), down))
    try:
        async for message in down.messages():
            for response in worker_messages.encode(message):
                yield response
    finally:
        reading.cancel()


async def _read(requests: AsyncIterator[pb.WorkRequest], stream: _Stream, down: Downstream) -> None:
    """Reads what the worker sends, until the stream ends."""
    try:
        async for request in requests:
            await stream.take(request)
            # Answers that the worker does not read must not fill the memory.
            await down.until_room()
    except InvalidArgument as error:
        stream.refuse()
        down.close(error)
    except RunlaneError as error:
        down.close(error)
    except grpc.aio.InternalError:
        down.close()  # the worker left while its message was read
    except Exception as error:
        log.exception("message of a worker failed")
        down.close(error)
    else:
        down.close()


class _Stream:
    """Passes the messages of a stream to its slot."""

    def __init__(self, slot: Slot, take_offer: TakeOffer, workers: Workers) -> None:
        self._workers = workers
        self._slot = slot
        self._take_offer = take_offer

    async def take(self, request: pb.WorkRequest) -> None:
        """Takes a message. Raises InvalidArgument; an AgentError fails the run."""
        try:
            await self._take(request)
        except AgentError as error:
            self._slot.refuse(request.WhichOneof("message") or "", error)

    async def _take(self, request: pb.WorkRequest) -> None:  # noqa: C901 - one per kind
        slot = self._slot
        match request.WhichOneof("message"):
            case "offer":
                bind_contextvars(worker_id=request.offer.worker_id)
                await self._take_offer(slot, request.offer)
            case "begun":
                slot.begin()
            case "emit":
                number, events = await worker_events.events(request.emit)
                await slot.emit(number, events)
            case "finish":
                finish = request.finish
                report, result = worker_events.finished(finish)
                await slot.finish(finish.number, report, result=result)
            case "fail":
                fail = request.fail
                report, error = worker_events.failure(fail)
                await slot.finish(fail.number, report, error)
            case "hand_back" if slot.is_offering or slot.is_paused:
                self._workers.withdraw(slot)
                slot.end_turn(Acked(0, ended=True))
            case "hand_back":
                await slot.hand_back()
            case "take_folded":
                await slot.take_folded(request.take_folded.number)
            case "get_history":
                await slot.send_history()
            case "ask":
                await slot.ask(worker_events.questions(request.ask), request.ask.checkpoint)
            case "find_step":
                await slot.find_step(worker_events.step_key(request.find_step))
            case _:
                raise InvalidArgument.of("message", "is missing, or of a newer protocol version")

    def refuse(self) -> None:
        """A message of the worker was a mistake."""
        self._workers.refuse(self._slot)
