"""The cases of R34, and of the offers of workers: what they send is stored once, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runlane.conformance.cases.workers import (
    S,
    accept,
    next_turn,
    offered,
    resume,
    texts_by_attempt,
    turn_of,
)
from runlane.conformance.context import CaseContext
from runlane.conformance.rules import Need, case, expect
from runlane.types import TextDelta
from runlane.worker.v1 import worker_service_pb2 as pb

INVALID = "INVALID_ARGUMENT"


# --- Offers ---------------------------------------------------------------------------------------


@case(31, Need.WORKER)
async def _unknown_agent(ctx: CaseContext) -> None:
    """An offer for an agent that workers do not execute is refused with AGENT_NOT_FOUND."""
    (own,) = [it.name for it in await ctx.client.list_agents() if it.is_default]
    for name in ("no-such-agent", own):
        stream = await ctx.open_worker()
        await stream.offer(agents=[name])
        await stream.expect_refusal("AGENT_NOT_FOUND")


@case(32, Need.WORKER)
async def _waits_for_an_offer(ctx: CaseContext) -> None:
    """A run waits for a worker, and each offer takes one run; two workers may have one id."""
    sessions = [f"{ctx.session} {n}" for n in range(3)]
    handles = [await accept(ctx, session=session) for session in sessions]
    expect("states", [await ctx.state(it) for it in handles], [S.ACCEPTED] * 3)
    await ctx.client.cancel(sessions[2])
    await ctx.expect_end(handles[2], S.CANCELLED, "")
    streams = [await offered(ctx) for _ in range(2)]
    turns = [await stream.expect("turn") for stream in streams]
    expected = sorted(handle.run_id for handle in handles[:2])
    expect("runs of the turns", sorted(turn.run_id for turn in turns), expected)
    for stream in streams:
        await stream.finish(0)
    for handle in handles[:2]:
        await ctx.expect_end(handle, S.COMPLETED, "")


# --- R34: numbers ---------------------------------------------------------------------------------


@case(34, Need.WORKER, Need.RESTARTS, Need.DURABLE)
async def _durable(ctx: CaseContext) -> None:
    """Acknowledged events are in the store, and survive a crash."""
    handle = await accept(ctx)
    stream, turn = await turn_of(ctx, handle)
    for number in range(1, 11):
        await stream.emit(number, f"{number} ")
        await stream.expect_acked(number)
    await ctx.crash()
    back = await resume(ctx, turn, 10)
    await back.finish(10)
    await ctx.expect_end(handle, S.COMPLETED, "1 2 3 4 5 6 7 8 9 10 ")


@case(34, Need.WORKER)
async def _repeated(ctx: CaseContext) -> None:
    """An event that is repeated is stored once, and every event is one event of the run."""
    handle = await accept(ctx)
    stream, turn = await turn_of(ctx, handle)
    await stream.emit(1, "a", "b")
    await stream.emit(2, "b", "c")
    await stream.emit(1, "a")
    await stream.expect_acked(3)
    stream.drop()
    back = await resume(ctx, turn, 3)
    await back.emit(3, "c", "d")
    await back.expect_acked(4)
    await back.finish(4)
    await ctx.expect_end(handle, S.COMPLETED, "abcd")
    texts = [e.body.text async for e in handle.events() if isinstance(e.body, TextDelta)]
    expect("texts", texts, ["a", "b", "c", "d"])


def _texts(number: int, *texts: str) -> Mapping[str, Any]:
    events = [pb.Event(text_delta=text) for text in texts]
    return {"emit": pb.WorkRequest.Emit(number=number, events=events)}


_MISTAKES: Mapping[str, Mapping[str, Any]] = {
    "a gap": _texts(3, "x"),
    "no number": _texts(0, "x"),
    "no event": _texts(1),
    "an empty text": _texts(1, ""),
    "an oversized event": _texts(1, "x" * ((1 << 16) + 1)),
    "too many events": _texts(1, *["x"] * 1001),
    "an end with a wrong number": {"finish": pb.WorkRequest.Finish(number=7)},
    "no message": {},
}


@case(34, Need.WORKER)
async def _mistakes(ctx: CaseContext) -> None:
    """Wrong output ends the stream with INVALID_ARGUMENT, stores nothing, and ends no attempt."""
    offer = pb.WorkRequest.Offer(agents=[ctx.served_agent.name], protocol_version=1)
    for message in (*_MISTAKES.values(), {"offer": offer}):
        handle = await accept(ctx)
        stream, turn = await turn_of(ctx, handle)
        await stream.send(**message)
        await stream.expect_refusal(INVALID)
        stream = await resume(ctx, turn, 0)
        await stream.emit(1, "right")
        await stream.finish(1)
        await ctx.expect_end(handle, S.COMPLETED, "right")
        expect("text of each attempt", await texts_by_attempt(handle), ["right"])


@case(34, Need.WORKER)
async def _after_the_end(ctx: CaseContext) -> None:
    """Output that a worker sends after the end of its turn is not stored; after its next
    offer it is a mistake."""
    handle = await accept(ctx)
    stream, _ = await turn_of(ctx, handle)
    await stream.emit(1, "a")
    await stream.send(finish=pb.WorkRequest.Finish(number=1))
    await stream.expect_ended()
    await stream.emit(2, "late")
    await stream.offer()
    await stream.emit(2, "late")
    await stream.expect_refusal(INVALID)
    await ctx.expect_end(handle, S.COMPLETED, "a")


@case(34, Need.WORKER)
async def _without_a_turn(ctx: CaseContext) -> None:
    """Output and ends without a turn are refused, and the offer is gone."""
    for message in (_texts(1, "x"), {"finish": pb.WorkRequest.Finish()}):
        for offers in (False, True):
            stream = await (offered(ctx) if offers else ctx.open_worker())
            await stream.send(**message)
            await stream.expect_refusal(INVALID)
    handle = await accept(ctx)
    await ctx.expect_state(handle, S.ACCEPTED)
    stream = await offered(ctx)
    await next_turn(stream, handle)
    await stream.finish(0)
    await ctx.expect_end(handle, S.COMPLETED, "")


@case(34, Need.WORKER)
async def _other_version(ctx: CaseContext) -> None:
    """A worker of another version of the protocol is refused with UNSUPPORTED."""
    for version in (0, 2):
        stream = await ctx.open_worker()
        await stream.offer(protocol_version=version)
        await stream.expect_refusal("UNSUPPORTED")
