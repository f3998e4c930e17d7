"""The cases of R38 and R39: retries of attempts that the agent failed, and steps."""

from __future__ import annotations

from datetime import timedelta

from runlane.conformance.context import CaseContext, Step, covered_runs, say
from runlane.conformance.rules import Need, case, expect, expect_that
from runlane.run_handle import RunHandle
from runlane.types import (
    CancelScope,
    RunRetryPolicy,
    RunState,
    Started,
    TextDelta,
    WhenBusy,
)
from runlane.types import Step as Finished

S = RunState

HOUR = timedelta(hours=1)
AT_ONCE = RunRetryPolicy(3, initial_backoff=timedelta(0), after_output=True)
LATER = RunRetryPolicy(2, initial_backoff=HOUR, max_backoff=HOUR, after_output=True)


async def accept_backing_off(ctx: CaseContext) -> RunHandle:
    """Accepts a run; returns when its agent has failed and it waits for its next attempt."""
    steps = [say("a"), {"fail": "busy", "attempts": 1}, say("b")]
    handle = await ctx.accept(*steps, retry_policy=LATER)
    async with ctx.time_limit("the first attempt to fail"):
        while True:
            run = await ctx.client.get_run(handle.run_id)
            if (run.attempt, run.state) == (1, S.ACCEPTED):
                return handle


@case(38)
async def _begins_anew(ctx: CaseContext) -> None:
    """A failed attempt is repeated as the same run, and its output begins again."""
    steps = [say("a"), {"fail": "busy", "attempts": 2}, say("b")]
    handle = await ctx.accept(*steps, retry_policy=AT_ONCE)
    await ctx.expect_end(handle, S.COMPLETED, "ab")
    texts: list[str] = []
    async for event in handle.events():
        match event.body:
            case Started():
                texts.append("")
            case TextDelta(text):
                texts[-1] += text
    expect("text of each attempt", texts, ["a", "a", "ab"])


@case(38)
async def _only_as_the_policy_says(ctx: CaseContext) -> None:
    """A policy applies to its reasons and for its number of attempts."""
    policy = RunRetryPolicy(2, ("BUSY",), timedelta(0))
    for reason, attempts in (("BUSY", 2), ("OTHER", 1)):
        step = {"fail": "no", "reason": reason}
        end = await ctx.wait_for_end(await ctx.accept(step, retry_policy=policy))
        expect("state and attempts", [end.state, end.attempt], [S.FAILED, attempts])


@case(38, Need.CLOCK)
async def _keeps_its_place(ctx: CaseContext) -> None:
    """Nothing of its session starts before a run that waits for its next attempt."""
    first = await accept_backing_off(ctx)
    dropped = await ctx.accept(say("x"))
    await ctx.expect_busy(busy=True)
    receipt = await ctx.client.cancel(ctx.session, scope=CancelScope.WAITING)
    covered = [(dropped.run_id, S.QUEUED)]
    expect("runs covered by a cancel of the queue", covered_runs(receipt), covered)
    second = await ctx.accept(say("x"))
    await ctx.expect_state(second, S.QUEUED)
    await ctx.expect_state(first, S.ACCEPTED)
    await ctx.harness.advance_clock(HOUR)
    await ctx.expect_end(first, S.COMPLETED, "ab")
    await ctx.expect_end(second, S.COMPLETED, "x")
    starts = [(await ctx.client.get_run(each.run_id)).started_at for each in (first, second)]
    expect_that("the second run started later", true=starts == sorted(filter(None, starts)))


@case(38)
async def _cancelled_during_the_backoff(ctx: CaseContext) -> None:
    """A cancel ends a run that waits for its next attempt; its prompt is written once."""
    for scope in (CancelScope.SESSION, CancelScope.ACTIVE):
        handle = await accept_backing_off(ctx)
        receipt = await ctx.client.cancel(ctx.session, scope=scope)
        expect("covered runs", covered_runs(receipt), [(handle.run_id, S.ACCEPTED)])
        await ctx.expect_end(handle, S.CANCELLED, "")
        await ctx.expect_busy(busy=False)


@case(38)
async def _interrupted_during_the_backoff(ctx: CaseContext) -> None:
    """INTERRUPT cancels a run that waits for its next attempt."""
    handle = await accept_backing_off(ctx)
    urgent = await ctx.accept(say("x"), when_busy=WhenBusy.INTERRUPT)
    await ctx.expect_end(handle, S.CANCELLED)
    await ctx.expect_end(urgent, S.COMPLETED, "x")


@case(38, Need.RESTARTS, Need.DURABLE, Need.CLOCK, Need.STORE_CLOCK)
async def _survives_a_crash(ctx: CaseContext) -> None:
    """A backoff survives a crash of the server."""
    handle = await accept_backing_off(ctx)
    await ctx.crash()
    await ctx.expect_state(handle, S.ACCEPTED)
    await ctx.harness.advance_clock(HOUR)
    end = await ctx.wait_for_end(handle)
    expect_that("the second attempt completed", true=(end.state, end.attempt) == (S.COMPLETED, 2))


@case(39)
async def _step_is_done_once(ctx: CaseContext) -> None:
    """A step that an earlier attempt finished has its result, and a new one is done."""
    fail: Step = {"fail": "busy", "attempts": 1}
    steps: list[Step] = [{"once": "a"}, fail, {"once": "a"}, {"once": "b"}]
    handle = await ctx.accept(*steps, retry_policy=AT_ONCE)
    await ctx.expect_end(handle, S.COMPLETED, "112")
    seen = [e.body async for e in handle.events() if isinstance(e.body, Started | Finished)]
    expect("events", seen, [Started(1), Finished("a", "1"), Started(2), Finished("b", "2")])


@case(39, Need.RESTARTS, Need.DURABLE)
async def _step_survives_a_crash(ctx: CaseContext) -> None:
    """A step that the agent went on from is not repeated after a crash of the server."""
    steps = [{"once": "a"}, *ctx.gate_steps("g"), {"say": "attempt"}]
    handle = await ctx.accept(*steps, max_attempts=2)
    await ctx.wait_for_text(handle, "1<g>")
    await ctx.crash()
    await ctx.wait_for_text(handle, "1<g>", attempt=2)
    await ctx.open_gate()
    await ctx.expect_end(handle, S.COMPLETED, "1<g>2")
