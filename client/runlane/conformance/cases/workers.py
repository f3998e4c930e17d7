"""The cases of R33 and R35 to R37: who executes a run of a worker, and what a loss costs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeAlias

from runlane.conformance.context import CaseContext, covered_runs
from runlane.conformance.rules import Need, case, expect, expect_that
from runlane.conformance.worker_stream import WorkerStream
from runlane.errors import RunlaneError, is_transient
from runlane.run_handle import RunHandle
from runlane.types import RunState, Started, TextDelta, WhenBusy
from runlane.worker.v1 import worker_service_pb2 as pb

S = RunState

LONG = timedelta(hours=1)
"""Longer than the worker lease and the cancel grace of any server."""

GivenTurn: TypeAlias = pb.WorkResponse.Turn


# --- Staging --------------------------------------------------------------------------------------


async def accept(ctx: CaseContext, prompt: str = "hello", **options: Any) -> RunHandle:
    """Accepts a run of the agent that workers execute."""
    options = {"agent": ctx.served_agent.name, "allow_missing": True, **options}
    return await ctx.client.run_accepted(options.pop("session", ctx.session), prompt, **options)


async def offered(ctx: CaseContext) -> WorkerStream:
    """Connects as a worker that offers its slot."""
    stream = await ctx.open_worker()
    await stream.offer()
    return stream


async def next_turn(stream: WorkerStream, handle: RunHandle) -> GivenTurn:
    """Waits for the turn of a run on a stream with an offer. Ends those of other runs: cases that
    failed leave them behind."""
    while True:
        turn: GivenTurn = await stream.expect("turn")
        await stream.send(begun=pb.WorkRequest.Begun())
        if turn.run_id == handle.run_id:
            return turn
        await stream.send(fail=pb.WorkRequest.Fail(message="left behind by another case"))
        await stream.expect_ended()
        await stream.offer()


async def turn_of(ctx: CaseContext, handle: RunHandle) -> tuple[WorkerStream, GivenTurn]:
    """Connects as a worker, and takes the turn of a run."""
    stream = await offered(ctx)
    return stream, await next_turn(stream, handle)


def resume_of(turn: GivenTurn, **changes: Any) -> pb.WorkRequest.Resume:
    """How a worker continues a turn."""
    fields = {"run_id": turn.run_id, "attempt": turn.attempt, "fence": turn.fence}
    return pb.WorkRequest.Resume(**{**fields, **changes})


async def resume(ctx: CaseContext, turn: GivenTurn, stored: int) -> WorkerStream:
    """Connects as the worker of a turn, of which so many events are stored."""
    async with ctx.time_limit("the worker to continue its turn"):
        while True:
            stream = await ctx.open_worker()
            await stream.offer(resume=resume_of(turn))
            try:
                expect("stored events", (await stream.expect("acked")).number, stored)
            except RunlaneError as error:
                if not is_transient(error):
                    raise
            else:
                return stream


async def expect_fenced(ctx: CaseContext, turn: GivenTurn, **changes: Any) -> None:
    """Checks that nobody can continue a turn."""
    stream = await ctx.open_worker()
    await stream.offer(resume=resume_of(turn, **changes))
    await stream.expect("fenced")


async def advance_until(
    ctx: CaseContext, what: str, is_over: Callable[[], Awaitable[bool]]
) -> None:
    """Advances the clock until a limit of the server is over. Once may be too early: the server
    starts the limit when it notices that a connection is lost."""
    async with ctx.time_limit(what):
        while not await is_over():
            await ctx.harness.advance_clock(LONG)


async def lose(ctx: CaseContext, handle: RunHandle, attempt: int) -> None:
    """Lets the lease of a worker without a connection run out."""

    async def is_lost() -> bool:
        run = await ctx.client.get_run(handle.run_id)
        return run.state in {S.FAILED, S.ACCEPTED} or run.attempt > attempt

    await advance_until(ctx, "the attempt to be lost", is_lost)


async def texts_by_attempt(handle: RunHandle) -> list[str]:
    """The text of each attempt, as a subscriber sees it."""
    texts: list[str] = []
    async for event in handle.events():
        match event.body:
            case Started():
                texts.append("")
            case TextDelta(text):
                texts[-1] += text
    return texts


async def expect_interrupted(ctx: CaseContext, handle: RunHandle, text: str) -> None:
    """Checks that a run ended because its last attempt was lost, with the text that it had."""
    end = await ctx.wait_for_end(handle)
    found = (end.state, end.error.reason if end.error else "", end.text)
    expect("state, reason and text", found, (S.FAILED, "INTERRUPTED", text))
    await ctx.expect_turn(end)


# --- R33: one executor ----------------------------------------------------------------------------


@case(33, Need.WORKER)
async def _wrong_token(ctx: CaseContext) -> None:
    """A worker without the token of the attempt is fenced, and the right one goes on."""
    handle = await accept(ctx)
    stream, turn = await turn_of(ctx, handle)
    for wrong in ({"fence": "0" * 64}, {"attempt": 2}, {"run_id": f"{ctx.session} other"}):
        await expect_fenced(ctx, turn, **wrong)
    await stream.emit(1, "mine")
    await stream.expect_acked(1)
    await stream.finish(1)
    await ctx.expect_end(handle, S.COMPLETED, "mine")


@case(33, Need.WORKER)
async def _two_connections(ctx: CaseContext) -> None:
    """A worker that comes back on another connection is fenced on the one before."""
    handle = await accept(ctx)
    old, turn = await turn_of(ctx, handle)
    new = await resume(ctx, turn, 0)
    await old.expect("fenced")
    await old.emit(1, "old")
    await new.emit(1, "new")
    await new.expect_acked(1)
    await new.finish(1)
    await ctx.expect_end(handle, S.COMPLETED, "new")


@case(33, Need.WORKER, Need.CLOCK)
async def _next_attempt(ctx: CaseContext) -> None:
    """The worker of a lost attempt is fenced, and only the next attempt has output."""
    handle = await accept(ctx, max_attempts=2)
    first, lost = await turn_of(ctx, handle)
    await first.emit(1, "first")
    await first.expect_acked(1)
    first.drop()
    await lose(ctx, handle, 1)
    # Offered only now: the clock that advances would end the limit for beginning this turn too.
    second = await offered(ctx)
    turn = await next_turn(second, handle)
    expect("attempt", turn.attempt, 2)
    expect_that("each attempt has a token of its own", true=turn.fence != lost.fence)
    await expect_fenced(ctx, lost)
    await second.emit(1, "second")
    await second.finish(1)
    await ctx.expect_end(handle, S.COMPLETED, "second")
    expect("text of each attempt", await texts_by_attempt(handle), ["first", "second"])


@case(33, Need.WORKER, Need.CLOCK)
async def _ignored_cancel(ctx: CaseContext) -> None:
    """A worker that does not stop after a cancel is fenced, and its slot is of use again."""
    handle = await accept(ctx)
    stream, turn = await turn_of(ctx, handle)
    await ctx.client.cancel(ctx.session)
    await stream.expect("cancel")
    await ctx.expect_state(handle, S.CANCELLING)
    await ctx.harness.advance_clock(LONG)
    await stream.expect("fenced")
    await stream.emit(1, "too late")
    await ctx.expect_end(handle, S.CANCELLED, "")
    await expect_fenced(ctx, turn)
    again = await accept(ctx)
    await stream.offer()
    await next_turn(stream, again)
    await stream.finish(0)
    await ctx.expect_end(again, S.COMPLETED, "")


# --- R35: the lease -------------------------------------------------------------------------------


@case(35, Need.WORKER)
async def _back_in_time(ctx: CaseContext) -> None:
    """A worker that comes back within its lease continues the attempt."""
    handle = await accept(ctx, max_attempts=2)
    stream, turn = await turn_of(ctx, handle)
    await stream.emit(1, "a", "b")
    await stream.expect_acked(2)
    # More than once: a worker may be back before the server has noticed the loss.
    for number, text in enumerate("cde", start=3):
        stream.drop()
        stream = await resume(ctx, turn, number - 1)
        await ctx.expect_state(handle, S.ACTIVE)
        await stream.emit(number, text)
        await stream.expect_acked(number)
    await stream.finish(5)
    await ctx.expect_end(handle, S.COMPLETED, "abcde")
    expect("text of each attempt", await texts_by_attempt(handle), ["abcde"])


@case(35, Need.WORKER, Need.CLOCK)
async def _too_late(ctx: CaseContext) -> None:
    """A run whose last attempt is lost ends as INTERRUPTED with its text, and its worker is
    fenced."""
    handle = await accept(ctx)
    stream, turn = await turn_of(ctx, handle)
    await stream.emit(1, "half")
    await stream.expect_acked(1)
    stream.drop()
    await lose(ctx, handle, 1)
    await expect_interrupted(ctx, handle, "half")
    await expect_fenced(ctx, turn)


@case(35, Need.WORKER)
async def _lost_on_its_way(ctx: CaseContext) -> None:
    """A turn that is lost on its way to a worker starts elsewhere at once and loses no attempt."""
    handle = await accept(ctx)
    stream = await offered(ctx)
    await stream.expect("turn")
    other = await offered(ctx)
    stream.drop()
    expect("attempt", (await next_turn(other, handle)).attempt, 2)
    await other.finish(0)
    await ctx.expect_end(handle, S.COMPLETED, "")


# --- R36: restarts of the server ------------------------------------------------------------------


async def _continue_after(ctx: CaseContext, restart: Callable[[], Awaitable[None]]) -> None:
    handle = await accept(ctx)
    stream, turn = await turn_of(ctx, handle)
    await stream.emit(1, "a", "b")
    await stream.expect_acked(2)
    await restart()
    back = await resume(ctx, turn, 2)
    # The worker cannot know whether the server received it before.
    await back.emit(2, "b", "c")
    await back.expect_acked(3)
    await back.finish(3)
    await ctx.expect_end(handle, S.COMPLETED, "abc")
    expect("text of each attempt", await texts_by_attempt(handle), ["abc"])


@case(36, Need.WORKER, Need.RESTARTS, Need.DURABLE)
async def _crash(ctx: CaseContext) -> None:
    """After a crash of the server the worker continues the same attempt."""
    await _continue_after(ctx, ctx.crash)


@case(36, Need.WORKER, Need.RESTARTS, Need.DURABLE)
async def _drain(ctx: CaseContext) -> None:
    """After a graceful restart of the server the worker continues the same attempt."""
    await _continue_after(ctx, ctx.drain)


@case(36, Need.WORKER, Need.RESTARTS, Need.DURABLE)
async def _cancelled_before_its_return(ctx: CaseContext) -> None:
    """After a crash a cancel covers the run before its worker is back, which then learns of it."""
    handle = await accept(ctx)
    stream, turn = await turn_of(ctx, handle)
    await stream.emit(1, "a")
    await stream.expect_acked(1)
    await ctx.crash()
    receipt = await ctx.client.cancel(ctx.session)
    expect("covered runs", covered_runs(receipt), [(handle.run_id, S.ACTIVE)])
    back = await resume(ctx, turn, 1)
    await back.expect("cancel")
    await back.finish(1)
    await ctx.expect_end(handle, S.CANCELLED, "a")


@case(36, Need.WORKER, Need.RESTARTS, Need.DURABLE)
async def _folded(ctx: CaseContext) -> None:
    """A prompt that joined the turn is sent again after a crash."""
    handle = await accept(ctx)
    stream, turn = await turn_of(ctx, handle)
    joins = await accept(ctx, "more", when_busy=WhenBusy.FOLD)
    await stream.send(take_folded=pb.WorkRequest.TakeFolded(number=1))
    found = [one.run_id for one in (await stream.expect("folded")).prompts]
    expect("runs that join the turn", found, [joins.run_id])
    await ctx.crash()
    back = await resume(ctx, turn, 0)
    again = (await back.expect("folded")).prompts
    expect("prompts sent again", [it.prompt for it in again], ["more"])
    await back.emit(1, "both")
    await back.finish(1)
    await ctx.expect_end(handle, S.COMPLETED, "both")
    expect("run that it joined", (await ctx.wait_for_end(joins)).folded_into, handle.run_id)


# --- R37: cancel and hand-back --------------------------------------------------------------------


@case(37, Need.WORKER)
async def _cancel(ctx: CaseContext) -> None:
    """A cancel reaches the worker, and the session is busy until it has stopped."""
    handle = await accept(ctx)
    stream, _ = await turn_of(ctx, handle)
    await stream.emit(1, "so far")
    await stream.expect_acked(1)
    receipt = await ctx.client.cancel(ctx.session)
    expect("covered runs", covered_runs(receipt), [(handle.run_id, S.ACTIVE)])
    await stream.expect("cancel")
    await ctx.expect_state(handle, S.CANCELLING)
    await ctx.expect_busy(busy=True)
    await stream.finish(1)
    await ctx.expect_end(handle, S.CANCELLED, "so far")
    await ctx.expect_busy(busy=False)


@case(37, Need.WORKER, Need.CLOCK)
async def _never_reads(ctx: CaseContext) -> None:
    """A worker that reads nothing delays no other session, and a cancel ends its run."""
    handle = await accept(ctx)
    silent = await offered(ctx)
    async with ctx.time_limit("the run to be active"):
        while await ctx.state(handle) is not S.ACTIVE:
            pass
    other = await accept(ctx, session=f"{ctx.session} other")
    stream, _ = await turn_of(ctx, other)
    await stream.finish(0)
    await ctx.expect_end(other, S.COMPLETED, "")
    await ctx.client.cancel(ctx.session)
    await ctx.harness.advance_clock(LONG)
    await ctx.expect_end(handle, S.CANCELLED, "")
    for kind in ("turn", "cancel", "fenced"):
        await silent.expect(kind)


@case(37, Need.WORKER)
async def _handed_back(ctx: CaseContext) -> None:
    """A run without output that is handed back starts elsewhere and loses no attempt."""
    handle = await accept(ctx)
    stream, given = await turn_of(ctx, handle)
    await stream.hand_back()
    other, turn = await turn_of(ctx, handle)
    expect("attempt", turn.attempt, 2)
    expect_that("it has a token of its own", true=turn.fence != given.fence)
    await expect_fenced(ctx, given)
    await other.finish(0)
    await ctx.expect_end(handle, S.COMPLETED, "")


@case(37, Need.WORKER)
async def _handed_back_with_output(ctx: CaseContext) -> None:
    """A run with output that is handed back has lost its attempt."""
    handle = await accept(ctx, max_attempts=2)
    for attempt, text in ((1, "first"), (2, "second")):
        stream, turn = await turn_of(ctx, handle)
        expect("attempt", turn.attempt, attempt)
        await stream.emit(1, text)
        await stream.expect_acked(1)
        await stream.hand_back()
    await expect_interrupted(ctx, handle, "second")


@case(37, Need.WORKER)
async def _offer_taken_back(ctx: CaseContext) -> None:
    """An offer that is taken back starts no run."""
    stream = await offered(ctx)
    await stream.hand_back()
    handle = await accept(ctx)
    await ctx.expect_state(handle, S.ACCEPTED)
    await stream.offer()
    await next_turn(stream, handle)
    await stream.finish(0)
    await ctx.expect_end(handle, S.COMPLETED, "")
