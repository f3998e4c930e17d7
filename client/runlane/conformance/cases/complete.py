"""The cases of R21 to R25: complete."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from runlane.conformance.cases.accept import expect_rejection
from runlane.conformance.context import STEP, CaseContext, say
from runlane.conformance.rules import Need, case, expect, expect_that, fail
from runlane.errors import CursorCompacted
from runlane.harness.client import GatePoint
from runlane.run_handle import RunHandle
from runlane.subscription import Subscription
from runlane.types import (
    Artifact,
    ArtifactKind,
    CancelScope,
    Custom,
    FinishReason,
    Progress,
    RunComplete,
    RunState,
    TextDelta,
    WhenBusy,
)

S, P = RunState, GatePoint


async def read_ends(ctx: CaseContext, cursor: str | None, count: int) -> Sequence[RunComplete]:
    """Reads the ends of this case's runs after a cursor, at least `count` of them.

    Reads until the end of one more run, so that unexpected ends are found too.
    """
    ends: list[RunComplete] = []
    async with ctx.client.subscribe_run_complete(cursor=cursor) as subscription:
        async with ctx.time_limit(f"{count} RunComplete events"):
            while len(_ends_of_case(ctx, ends)) < count:
                ends.append(await subscription.__anext__())
        # Events are in order, so all ends before the end of a later run have been read.
        last = await ctx.accept(say("last"), session=f"{ctx.session} last")
        async with ctx.time_limit("the RunComplete of a later run"):
            while ends[-1].run_id != last.run_id:
                ends.append(await subscription.__anext__())
    return _ends_of_case(ctx, ends[:-1])


def _ends_of_case(ctx: CaseContext, ends: Sequence[RunComplete]) -> list[RunComplete]:
    """Selects the ends of the case, without its helper sessions."""
    helpers = [f"{ctx.session} {what}" for what in ("opens", "more", "last")]
    return [
        end
        for end in ends
        if end.session_id.startswith(ctx.session) and end.session_id not in helpers
    ]


def expect_once_each(ends: Sequence[RunComplete], handles: Sequence[RunHandle]) -> None:
    """Checks that there is exactly one end per run, and no other."""
    counts = Counter(end.run_id for end in ends)
    expect("number of ends per run", counts, Counter({h.run_id: 1 for h in handles}))


@case(21)
async def _every_outcome(ctx: CaseContext) -> None:
    """One end per run: completed, failed, crashed, folded, cancelled active, queued or on entry."""
    done = await ctx.accept(say("x"))
    start = done.cursor
    failed = await ctx.accept({"fail": "no", "reason": "NO"})
    crashed = await ctx.accept({"crash": "boom"})
    await ctx.wait_for_end(crashed)
    active = await ctx.accept_blocked()
    queued = await ctx.accept(say("x"))
    await ctx.client.cancel(ctx.session, scope=CancelScope.WAITING)
    await ctx.client.cancel(ctx.session)
    await ctx.wait_for_end(active)
    gate = await ctx.arm(P.BEFORE_ACTIVE)
    entry = await ctx.accept(say("x"))
    await entry.cancel()
    await gate.release()
    step = await ctx.arm(P.BEFORE_STEP)
    host = await ctx.accept(STEP)
    await ctx.expect_arrivals(step, host)
    folded = await ctx.accept(say("f"), when_busy=WhenBusy.FOLD)
    await step.release()
    handles = [done, failed, crashed, active, queued, entry, host, folded]
    ends = await read_ends(ctx, start, len(handles))
    expect_once_each(ends, handles)
    states = {end.run_id: end.state for end in ends}
    expected = [S.COMPLETED, S.FAILED, S.FAILED, *[S.CANCELLED] * 3, S.COMPLETED, S.COMPLETED]
    expect("results", [states[handle.run_id] for handle in handles], expected)


@case(21)
async def _dropped_from_the_queue(ctx: CaseContext) -> None:
    """A run dropped from the queue ends immediately, while the active run continues."""
    active = await ctx.accept_blocked()
    queued = await ctx.accept(say("x"))
    await ctx.client.cancel(ctx.session, scope=CancelScope.WAITING)
    expect_once_each(await read_ends(ctx, queued.cursor, 1), [queued])
    await ctx.expect_state(active, S.ACTIVE)
    await ctx.open_gate()
    await ctx.wait_for_end(active)


@case(21)
async def _cancelled_on_entry(ctx: CaseContext) -> None:
    """A run cancelled on entry ends immediately, and only once."""
    gate = await ctx.arm(P.BEFORE_ACTIVE)
    handle = await ctx.accept(say("x"))
    await ctx.expect_arrivals(gate, handle)
    await ctx.client.cancel(ctx.session)
    expect_once_each(await read_ends(ctx, handle.cursor, 1), [handle])
    await gate.release()
    next_run = await ctx.accept(say("x"))
    expect_once_each(await read_ends(ctx, handle.cursor, 2), [handle, next_run])


@case(21, Need.CLOCK)
async def _timeout(ctx: CaseContext) -> None:
    """A run that exceeds its timeout ends with the finish reason timeout."""
    handle = await ctx.accept_blocked(timeout=3600)
    await ctx.harness.advance_clock(3600)
    complete = await ctx.wait_for_end(handle)
    expect("finish reason", complete.finish_reason, FinishReason.TIMEOUT)
    expect_once_each(await read_ends(ctx, handle.cursor, 1), [handle])


@case(21, Need.RESTARTS, Need.DURABLE)
async def _crash(ctx: CaseContext) -> None:
    """Runs that were active, queued or about to end at a crash have one end each."""
    gate = await ctx.arm(P.BEFORE_FINISH, session=f"{ctx.session} b")
    active, queued = await ctx.accept_blocked(), await ctx.accept(say("x"))
    ending = await ctx.accept(say("x"), session=f"{ctx.session} b")
    await ctx.expect_arrivals(gate, ending)
    retried = await ctx.accept_blocked("again", session=f"{ctx.session} c", max_attempts=2)
    await ctx.crash()
    await gate.release()
    await ctx.wait_for_text(retried, "<again>", attempt=2)
    await ctx.open_gate("again")
    handles = [active, queued, ending, retried]
    ends = await read_ends(ctx, active.cursor, len(handles))
    expect_once_each(ends, handles)
    finish_reasons = {end.run_id: end.finish_reason for end in ends}
    stop, lost = FinishReason.STOP, FinishReason.INTERRUPTED
    reasons = [finish_reasons[handle.run_id] for handle in handles]
    expect("finish reasons", reasons, [lost, stop, lost, stop])
    for end in ends:
        await ctx.expect_turn(end)


@case(22)
async def _transcript_first(ctx: CaseContext) -> None:
    """The transcript has the answer when the RunComplete arrives, and not before the end."""
    gate = await ctx.arm(P.BEFORE_FINISH)
    handle = await ctx.accept(say("x"))
    await ctx.expect_arrivals(gate, handle)
    expect("number of messages of an active run", len(await ctx.turn(handle.run_id)), 1)
    async with ctx.client.subscribe_run_complete(cursor=handle.cursor) as subscription:
        await gate.release()
        async with ctx.time_limit("the RunComplete"):
            async for complete in subscription:
                if complete.run_id == handle.run_id:
                    await ctx.expect_turn(complete)
                    break


@case(22, Need.RESTARTS, Need.DURABLE)
async def _survives_crash(ctx: CaseContext) -> None:
    """A delivered RunComplete survives a crash right after it."""
    handle = await ctx.accept(say("x"))
    (before,) = await read_ends(ctx, handle.cursor, 1)
    await ctx.crash()
    expect("RunComplete after the crash", (await read_ends(ctx, handle.cursor, 1))[0], before)
    await ctx.expect_turn(before)


@case(23)
async def _all_fields(ctx: CaseContext) -> None:
    """A RunComplete has ids, accept_seq, text, finish reason, error, usage and times."""
    usage = {"usage": {"input_tokens": 3, "output_tokens": 4}}
    handle = await ctx.accept(say("x"), usage, {"finish": "length"})
    (end,) = await read_ends(ctx, handle.cursor, 1)
    fields = [end.session_id, end.run_id, end.accept_seq, end.text, end.attempt, end.error]
    expect("fields", fields, [ctx.session, handle.run_id, 1, "x", 1, None])
    expect("finish reason", end.finish_reason, FinishReason.LENGTH)
    tokens = end.usage and (end.usage.input_tokens, end.usage.output_tokens)
    expect("input and output tokens", tokens, (3, 4))
    times = [end.accepted_at, end.started_at or end.ended_at, end.ended_at]
    expect("accepted_at, started_at, ended_at", times, sorted(times))
    await ctx.expect_turn(end)
    failed = await ctx.wait_for_end(await ctx.accept({"fail": "no milk", "reason": "NO_MILK"}))
    error = failed.error
    expect("error", error and (error.reason, error.message), ("NO_MILK", "no milk"))
    cancelled = await ctx.accept_blocked()
    await cancelled.cancel("enough")
    end = await ctx.wait_for_end(cancelled)
    expect("cancelled and cancel_reason", [end.cancelled, end.cancel_reason], [True, "enough"])


@case(22)
async def _artifact(ctx: CaseContext) -> None:
    """An artifact in pieces is one part of the transcript."""
    first = {"artifact": {"id": "a", "name": "log", "text": "1", "last": False}}
    rest = {"artifact": {"id": "a", "text": "2", "append": True}}
    end = await ctx.wait_for_end(await ctx.accept(first, say("x"), rest))
    await ctx.expect_turn(end)
    parts = [part for message in await ctx.turn(end.run_id) for part in message.parts]
    artifacts = [part for part in parts if isinstance(part, Artifact)]
    whole = Artifact("a", "log", "text/plain", ArtifactKind.TEXT, "12")
    expect("artifacts in the transcript", artifacts, [whole])


@case(23)
async def _result(ctx: CaseContext) -> None:
    """A RunComplete has the structured result, as does the run."""
    handle = await ctx.accept({"result": 1}, say("x"), {"result": {"n": [2]}})
    (end,) = await read_ends(ctx, handle.cursor, 1)
    expect("result of the RunComplete", end.result, '{"n":[2]}')
    stored = (await ctx.client.get_run(end.run_id)).run_complete
    expect("run_complete of the run", stored, end)
    failed = await ctx.wait_for_end(await ctx.accept({"result": 1}, {"fail": "no"}))
    expect("result of a failed run", failed.result, None)


@case(24)
async def _independent_waits(ctx: CaseContext) -> None:
    """A failed run ends only the wait for this run."""
    other = await ctx.accept_blocked("o", session=f"{ctx.session} other")
    waiting = asyncio.create_task(ctx.wait_for_end(other))
    # Calls arrive in order, so the server has received the wait by the second iteration.
    for _ in range(3):
        failing, following = await ctx.accept({"fail": "no"}), await ctx.accept(say("x"))
        states = [
            end.state
            for end in await asyncio.gather(ctx.wait_for_end(failing), ctx.wait_for_end(following))
        ]
        expect("results", states, [S.FAILED, S.COMPLETED])
    expect_that("the wait for the run of another session continues", true=not waiting.done())
    await ctx.expect_state(other, S.ACTIVE)
    await ctx.open_gate("o")
    expect("state", (await waiting).state, S.COMPLETED)


@case(25)
async def _late_subscriber(ctx: CaseContext) -> None:
    """A late subscriber with a cursor gets every later end, once and in order."""
    handles = [await ctx.accept(say(str(n))) for n in range(10)]
    await ctx.wait_for_end(handles[-1])
    ends = await read_ends(ctx, handles[0].cursor, 10)
    expect("texts in order", [end.text for end in ends], [str(n) for n in range(10)])
    subscription = ctx.client.subscribe_run_complete(
        cursor=handles[0].cursor, session_ids=[ctx.session]
    )
    seen = await _take(ctx, subscription, 4)
    resumed = ctx.client.subscribe_run_complete(
        cursor=subscription.cursor, session_ids=[ctx.session]
    )
    seen += await _take(ctx, resumed, 6)
    expect("ends before and after the resume", seen, list(ends))


async def _take(ctx: CaseContext, subscription: Subscription, count: int) -> list[RunComplete]:
    async with subscription, ctx.time_limit(f"{count} RunComplete events"):
        return [await subscription.__anext__() for _ in range(count)]


@case(25)
async def _late_events(ctx: CaseContext) -> None:
    """A late subscriber gets each artifact and custom event, once and in order."""
    piece = {"artifact": {"id": "a", "text": "1"}}
    handle = await ctx.accept({"custom": {"type": "t", "json": 1}}, piece, say("x"))
    await ctx.wait_for_end(handle)
    seen = [event.body async for event in handle.events()][2:-1]
    artifact = Artifact("a", "", "text/plain", ArtifactKind.TEXT, "1")
    expect("events", seen, [Custom("t", "1"), artifact, TextDelta("x")])


@case(25)
async def _progress(ctx: CaseContext) -> None:
    """The cursor of a progress mark comes after all earlier events."""
    handle = await ctx.accept(say("x"))
    await ctx.wait_for_end(handle)
    async with ctx.client.subscribe_run_complete() as subscription:
        mark = await subscription.next_item()
        expect_that("a subscription starts with a progress mark", true=isinstance(mark, Progress))
        cursor = subscription.cursor
    next_run = await ctx.accept(say("y"))
    expect_once_each(await read_ends(ctx, cursor, 1), [next_run])


@case(25)
async def _foreign_cursor(ctx: CaseContext) -> None:
    """A cursor not issued by this store is CURSOR_INVALID."""
    handle = await ctx.accept(say("x"))
    await ctx.wait_for_end(handle)
    for cursor in ("nonsense", (handle.cursor or "")[:-2], f"{handle.cursor}A"):
        subscription = ctx.client.subscribe_run_complete(cursor=cursor)
        await expect_rejection(subscription.__anext__(), "CURSOR_INVALID")
        await subscription.aclose()


@case(25, Need.RESTARTS, Need.DURABLE)
async def _resume_after_crash(ctx: CaseContext) -> None:
    """A subscription that resumes after a crash misses and repeats nothing."""
    handles = [await ctx.accept(say(str(n))) for n in range(3)]
    cursor = handles[0].cursor
    sessions = [ctx.session]
    async with ctx.client.subscribe_run_complete(
        cursor=cursor, session_ids=sessions
    ) as subscription:
        async with ctx.time_limit("the first three RunComplete events"):
            seen = [await subscription.__anext__() for _ in range(3)]
        await ctx.crash()
        handles += [await ctx.accept(say(str(n))) for n in range(3, 6)]
        async with ctx.time_limit("the later RunComplete events"):
            seen += [await subscription.__anext__() for _ in range(3)]
    expect_once_each(seen, handles)
    expect_once_each(await read_ends(ctx, cursor, 6), handles)


@case(25, Need.CLOCK, Need.RETENTION)
async def _compacted(ctx: CaseContext) -> None:
    """A cursor whose events were removed is CURSOR_COMPACTED, with the oldest valid one."""
    handle = await ctx.accept(say("x"))
    await ctx.wait_for_end(handle)
    await ctx.harness.advance_clock(ctx.server.event_retention + timedelta(hours=1))
    newer = await ctx.accept(say("y"))
    await ctx.wait_for_end(newer)
    oldest = ""
    async with ctx.time_limit("the removal of old events"):
        while not oldest:
            subscription = ctx.client.subscribe_run_complete(cursor=handle.cursor)
            try:
                await subscription.next_item()
            except CursorCompacted as error:
                oldest = error.oldest_cursor or fail("CURSOR_COMPACTED has no oldest_cursor")
            finally:
                await subscription.aclose()
    expect_once_each(await read_ends(ctx, oldest, 1), [newer])
