"""The cases of R26 to R28: fold and queue."""

from __future__ import annotations

from collections.abc import Awaitable

from runlane.conformance.cases.accept import expect_rejection
from runlane.conformance.context import STEP, CaseContext, covered_runs, say
from runlane.conformance.rules import case, expect, expect_that
from runlane.harness.client import GatePoint
from runlane.types import Role, RunState, WhenBusy

S, P = RunState, GatePoint
FOLD = WhenBusy.FOLD


@case(26)
async def _joins(ctx: CaseContext) -> None:
    """Waiting FOLD runs join at the next step, in accept order, and share the end."""
    gate = await ctx.arm(P.BEFORE_STEP)
    host = await ctx.accept(say("a"), STEP, say("b"))
    await ctx.expect_arrivals(gate, host)
    texts = ["one", "two"]
    joining = [await ctx.client.run_accepted(ctx.session, text, when_busy=FOLD) for text in texts]
    await gate.release()
    end = await ctx.wait_for_end(host)
    expect("text of the agent", end.text, "[folded: one][folded: two]b")
    for handle in joining:
        own = await ctx.wait_for_end(handle)
        expect("folded_into", own.folded_into, host.run_id)
        expect("state and message_id", [own.state, own.message_id], [end.state, end.message_id])
        await ctx.expect_turn(own)
    prompts = [(m.run_id, m.role) for m in await ctx.list_messages() if m.role is Role.USER]
    expect("prompts", prompts, [(h.run_id, Role.USER) for h in (host, *joining)])


@case(26)
async def _cancelled(ctx: CaseContext) -> None:
    """A run cancelled before the step is not folded."""
    gate = await ctx.arm(P.BEFORE_STEP)
    host = await ctx.accept(say("a"), STEP, say("b"))
    await ctx.expect_arrivals(gate, host)
    first = await ctx.client.run_accepted(ctx.session, "one", when_busy=FOLD)
    second = await ctx.client.run_accepted(ctx.session, "two", when_busy=FOLD)
    receipt = await first.cancel()
    expect("receipt", covered_runs(receipt), [(first.run_id, S.QUEUED)])
    await gate.release()
    end = await ctx.wait_for_end(host)
    expect("text of the agent", end.text, "[folded: two]b")
    await ctx.expect_end(first, S.CANCELLED, "")
    expect("folded_into", (await ctx.wait_for_end(first)).folded_into, None)
    expect("folded_into", (await ctx.wait_for_end(second)).folded_into, host.run_id)


@case(26)
async def _cancelled_at_step(ctx: CaseContext) -> None:
    """A cancel of the session at the step cancels all runs and folds none."""
    gate = await ctx.arm(P.BEFORE_STEP)
    host = await ctx.accept(say("a"), STEP, say("b"))
    await ctx.expect_arrivals(gate, host)
    waiting = await ctx.client.run_accepted(ctx.session, "one", when_busy=FOLD)
    await ctx.client.cancel(ctx.session)
    await gate.release()
    await ctx.expect_end(host, S.CANCELLED, "a")
    await ctx.expect_end(waiting, S.CANCELLED, "")


@case(26)
async def _own_turn(ctx: CaseContext) -> None:
    """A FOLD run gets its own turn if the agent has no further step."""
    host = await ctx.accept_blocked()
    waiting = await ctx.client.run_accepted(ctx.session, "one", when_busy=FOLD)
    await ctx.open_gate()
    await ctx.expect_end(host, S.COMPLETED, "<g>")
    own = await ctx.wait_for_end(waiting)
    expect("folded_into and text", [own.folded_into, own.text], [None, "one"])
    await ctx.expect_turn(own)


@case(27)
async def _queue(ctx: CaseContext) -> None:
    """A QUEUE run is never folded."""
    gate = await ctx.arm(P.BEFORE_STEP)
    host = await ctx.accept(STEP, say("b"))
    await ctx.expect_arrivals(gate, host)
    queued = await ctx.client.run_accepted(ctx.session, "one")
    await gate.release()
    await ctx.expect_end(host, S.COMPLETED, "b")
    await ctx.expect_end(queued, S.COMPLETED, "one")


@case(27)
async def _reject(ctx: CaseContext) -> None:
    """REJECT is SESSION_BUSY on a session with work, and runs on an idle one."""
    gate = await ctx.arm(P.BEFORE_ACTIVE)
    first = await ctx.accept(*ctx.gate_steps("g"))
    await expect_rejection(ctx.accept(say("x"), when_busy=WhenBusy.REJECT), "SESSION_BUSY")
    await gate.release()
    await ctx.wait_for_text(first, "<g>")
    await expect_rejection(ctx.accept(say("x"), when_busy=WhenBusy.REJECT), "SESSION_BUSY")
    await ctx.open_gate()
    await ctx.wait_for_end(first)
    await ctx.expect_end(await ctx.accept(say("x"), when_busy=WhenBusy.REJECT), S.COMPLETED, "x")


@case(27)
async def _interrupt(ctx: CaseContext) -> None:
    """INTERRUPT cancels the active run, keeps the queue, and goes to its head."""
    active = await ctx.accept_blocked()
    queued = await ctx.accept(say("q"))
    urgent = await ctx.accept(say("i"), when_busy=WhenBusy.INTERRUPT)
    await ctx.expect_end(active, S.CANCELLED, "<g>")
    first, second = await ctx.wait_for_end(urgent), await ctx.wait_for_end(queued)
    expect("texts", [first.text, second.text], ["i", "q"])
    expect_that(
        "the INTERRUPT run executes first",
        true=second.started_at is not None and first.ended_at <= second.started_at,
    )


@case(27)
async def _expected_active(ctx: CaseContext) -> None:
    """A run that expects another active run is refused, and nothing of it is stored."""
    active = await ctx.accept_blocked()

    def submit(run_id: str, expected: str) -> Awaitable[object]:
        return ctx.client.run_accepted(
            ctx.session,
            "i",
            run_id=run_id,
            when_busy=WhenBusy.INTERRUPT,
            expected_active_run_id=expected,
        )

    refused, accepted = f"{ctx.session} refused", f"{ctx.session} accepted"
    await expect_rejection(submit(refused, refused), "ACTIVE_RUN_CHANGED")
    await ctx.expect_state(active, S.ACTIVE)
    await expect_rejection(ctx.client.get_run(refused), "RUN_NOT_FOUND")
    await submit(accepted, active.run_id)
    await ctx.expect_end(active, S.CANCELLED, "<g>")
    # A repeated accept is answered, though another run is active now.
    await submit(accepted, active.run_id)


@case(28)
async def _cancel_after_end(ctx: CaseContext) -> None:
    """A cancel of an ended run does not affect later runs."""
    first = await ctx.accept(say("a"))
    await ctx.expect_end(first, S.COMPLETED, "a")
    second = await ctx.accept_blocked()
    expect("receipt", covered_runs(await first.cancel()), [])
    await ctx.expect_state(second, S.ACTIVE)
    await ctx.open_gate()
    await ctx.expect_end(second, S.COMPLETED, "<g>")


@case(28)
async def _cancel_before_end(ctx: CaseContext) -> None:
    """A cancel just before the end of a run does not affect the next run."""
    gate = await ctx.arm(P.BEFORE_FINISH)
    first = await ctx.accept(say("a"))
    await ctx.expect_arrivals(gate, first)
    await ctx.client.cancel(ctx.session)
    second = await ctx.accept(say("b"))
    await gate.release()
    await ctx.expect_end(first, S.CANCELLED)
    await ctx.expect_end(second, S.COMPLETED, "b")
    third = await ctx.accept(say("c"))
    await ctx.expect_end(third, S.COMPLETED, "c")
