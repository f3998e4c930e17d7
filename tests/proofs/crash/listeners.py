"""Subscribers and followers that resume where they stopped.

They use the generated stubs, because the client would hide a duplicate.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from proofs.crash.history import FollowerRecord, SubscriberRecord
from proofs.crash.shared import SharedState
from runlane import RunComplete, RunHandle, convert
from runlane.v1 import run_service_pb2 as pb
from runlane.v1.run_service_pb2_grpc import RunServiceStub
from runlane.wire import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from runlane.v1.run_service_pb2_grpc import RunServiceAsyncStub

AnswerT = TypeVar("AnswerT")

LOST = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED})


def last_runs(sessions: tuple[str, ...]) -> dict[str, str]:
    """The last run of each session. A subscriber stops after it."""
    return {session_id: f"last of {session_id}" for session_id in sessions}


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[RunServiceAsyncStub]:
    """The stub of RunService over a connection of its own."""
    async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        yield RunServiceStub(channel)


async def listen(
    shared: SharedState,
    name: str,
    rng: random.Random,
    *,
    session_id: str = "",
    from_beginning: bool = False,
    handle: RunHandle | None = None,
) -> None:
    """Receives terminal events until the last runs have ended; disconnects now and then."""
    heard = SubscriberRecord(name, session_id, from_beginning)
    request = pb.SubscribeRunCompleteRequest(session_ids=[session_id] if session_id else [])
    if from_beginning:
        request.from_beginning = True
    if handle is not None:
        heard.after_accept_of, request.cursor = handle.run_id, handle.cursor or ""
    shared.history.subscribers.append(heard)
    last = last_runs(shared.sessions)
    left = {last[session_id]} if session_id else set(last.values())

    def take(answer: pb.SubscribeRunCompleteResponse) -> bool:
        if not request.cursor:
            heard.established = shared.tick()
        request.cursor = answer.cursor
        if answer.WhichOneof("event") == "run_complete":
            shared.tick()
            complete = convert.run_complete(answer.run_complete)
            heard.events.append(complete)
            left.discard(complete.run_id)
        return not left

    while left:
        await shared.up.wait()
        heard.resumed += 1
        await _read(
            shared, rng, lambda stub, stay: stub.SubscribeRunComplete(request, timeout=stay), take
        )


async def follow(shared: SharedState, run_id: str, rng: random.Random) -> None:
    """Follows a run to its end; disconnects now and then."""
    followed = FollowerRecord(run_id)
    shared.history.followers.append(followed)
    request = pb.SubscribeRunRequest(run_id=run_id)
    ended = False

    def take(answer: pb.SubscribeRunResponse) -> bool:
        nonlocal ended
        shared.tick()
        if answer.HasField("progress"):
            return False
        event = convert.run_event(answer.event)
        assert event is not None
        followed.events.append(event)
        request.after_index = event.index
        ended = isinstance(event.body, RunComplete)
        return ended

    while not ended:
        await shared.up.wait()
        followed.resumed += 1
        await _read(shared, rng, lambda stub, stay: stub.SubscribeRun(request, timeout=stay), take)


async def _read(
    shared: SharedState,
    rng: random.Random,
    subscribe: Callable[
        [RunServiceAsyncStub, float | None], grpc.aio.UnaryStreamCall[Any, AnswerT]
    ],
    take: Callable[[AnswerT], bool],
) -> None:
    """Reads the messages of one call until the last one, a lost connection, or a chosen stop."""
    enough = rng.choice((1, 3, 10, 1000, 1000))
    async with connected(shared.pick()) as stub:
        call = subscribe(stub, shared.stay)
        try:
            async for answer in call:
                enough -= 1
                if take(answer) or not enough:
                    return
        except grpc.aio.AioRpcError as error:
            stayed = shared.stay and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if error.code() not in LOST and not stayed:
                raise
            await shared.serving()
        finally:
            call.cancel()
