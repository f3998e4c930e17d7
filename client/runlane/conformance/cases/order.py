"""The cases of R7 to R9: order."""

from __future__ import annotations

from itertools import pairwise

from runlane.conformance.context import CaseContext, say
from runlane.conformance.rules import Need, case, expect, expect_that, fail
from runlane.harness.client import GatePoint
from runlane.types import RunState

S, P = RunState, GatePoint


@case(7)
async def _one_at_a_time(ctx: CaseContext) -> None:
    """Each run starts after the previous one has ended."""
    gate = await ctx.arm(P.BEFORE_FINISH)
    handles = [await ctx.accept(say(str(n))) for n in range(5)]
    await ctx.expect_arrivals(gate, handles[0])
    states = [run.state for run in await ctx.list_runs()]
    expect("states", states, [S.ACTIVE, *[S.QUEUED] * 4])
    await gate.release()
    ends = [await ctx.wait_for_end(handle) for handle in handles]
    for earlier, later in pairwise(ends):
        expect_that(
            f"run {later.accept_seq} started after the end of run {earlier.accept_seq}",
            true=later.started_at is not None and earlier.ended_at <= later.started_at,
        )


@case(7)
async def _sessions_are_independent(ctx: CaseContext) -> None:
    """A busy session does not delay other sessions."""
    await ctx.accept_blocked()
    handle = await ctx.accept(say("x"), session=f"{ctx.session} other")
    await ctx.expect_end(handle, S.COMPLETED, "x")
    await ctx.open_gate()


@case(8)
async def _busy_before_active(ctx: CaseContext) -> None:
    """A session whose only run is not yet active is busy."""
    gate = await ctx.arm(P.BEFORE_ACTIVE)
    handle = await ctx.accept(say("x"))
    await ctx.expect_arrivals(gate, handle)
    session = await ctx.client.get_session(ctx.session)
    expect("busy and waiting_runs", [session.busy, session.waiting_runs], [True, 1])
    await gate.release()
    await ctx.expect_end(handle, S.COMPLETED, "x")


@case(8)
async def _busy_at_handoff(ctx: CaseContext) -> None:
    """A session is busy between the end of a run and the start of the next one."""
    first = await ctx.accept_blocked()
    gate = await ctx.arm(P.HANDOFF)
    second = await ctx.accept(say("x"))
    await ctx.open_gate()
    await ctx.expect_arrivals(gate, second)
    await ctx.expect_state(first, S.COMPLETED)
    session = await ctx.client.get_session(ctx.session)
    expect("busy and waiting_runs", [session.busy, session.waiting_runs], [True, 1])
    await gate.release()
    await ctx.expect_end(second, S.COMPLETED, "x")
    await ctx.expect_busy(busy=False)


@case(8)
async def _never_idle(ctx: CaseContext) -> None:
    """A session with waiting runs never appears idle."""
    handles = [await ctx.accept(say(str(n))) for n in range(20)]
    reads = 0
    while (session := await ctx.client.get_session(ctx.session)).busy:
        reads += 1
        if not (session.active_run_id or session.waiting_runs):
            fail("the session is busy but has neither an active nor a waiting run")
    for run in await ctx.list_runs():
        expect_that(
            f"run {run.run_id} has ended (after {reads} reads)", true=run.state is S.COMPLETED
        )
    await ctx.wait_for_end(handles[-1])


@case(8)
async def _cancel_at_handoff(ctx: CaseContext) -> None:
    """A cancel at the handoff covers the next run."""
    await ctx.accept_blocked()
    gate = await ctx.arm(P.HANDOFF)
    second, third = await ctx.accept(say("b")), await ctx.accept(say("c"))
    await ctx.open_gate()
    await ctx.expect_arrivals(gate, second)
    receipt = await ctx.client.cancel(ctx.session)
    expect(
        "receipt",
        [(run.run_id, run.state_when_cancelled) for run in receipt.cancelled],
        [(second.run_id, S.ACCEPTED), (third.run_id, S.QUEUED)],
    )
    await gate.release()
    await ctx.expect_end(second, S.CANCELLED, "")
    await ctx.expect_end(third, S.CANCELLED, "")


@case(8)
async def _cancel_after_handoff(ctx: CaseContext) -> None:
    """A cancel stops a run that became active by a handoff."""
    await ctx.accept_blocked("first")
    second = await ctx.accept(*ctx.gate_steps("second"))
    await ctx.open_gate("first")
    await ctx.wait_for_text(second, "<second>")
    receipt = await second.cancel()
    expect("number of covered runs", len(receipt.cancelled), 1)
    await ctx.expect_end(second, S.CANCELLED, "<second>")


@case(9)
async def _busy_until_return(ctx: CaseContext) -> None:
    """After a cancel, the session is busy until the agent has returned."""
    first = await ctx.accept_blocked(ignore_cancel=True)
    second = await ctx.accept(say("x"))
    await first.cancel()
    await ctx.expect_state(first, S.CANCELLING)
    await ctx.expect_state(second, S.QUEUED)
    await ctx.expect_busy(busy=True)
    await ctx.open_gate()
    await ctx.expect_end(first, S.CANCELLED, "<g>")
    await ctx.expect_end(second, S.COMPLETED, "x")


@case(9, Need.CLOCK)
async def _fenced_off(ctx: CaseContext) -> None:
    """An agent that exceeds the cancel grace period is fenced off; its output is ignored."""
    first = await ctx.accept(*ctx.gate_steps("g", ignore_cancel=True), say("too late"))
    await ctx.wait_for_text(first, "<g>")
    second = await ctx.accept(say("x"))
    await first.cancel()
    await ctx.expect_state(first, S.CANCELLING)
    await ctx.harness.advance_clock(ctx.server.cancel_grace)
    await ctx.expect_end(first, S.CANCELLED, "<g>")
    await ctx.open_gate()
    await ctx.expect_end(second, S.COMPLETED, "x")
    await ctx.expect_end(first, S.CANCELLED, "<g>")
