"""The cases of R29 and R30: bursts, and agents that are not ready."""

from __future__ import annotations

import asyncio

from runlane.conformance.context import CaseContext, covered_runs, say
from runlane.conformance.rules import Need, case, expect
from runlane.harness.client import Gate, GatePoint
from runlane.types import RunState

S, P = RunState, GatePoint


@case(29)
async def _burst(ctx: CaseContext) -> None:
    """Of concurrent accepts on an idle session, one run becomes active and the others wait."""
    gate = await ctx.arm(P.BEFORE_FINISH)
    handles = await asyncio.gather(*(ctx.accept(say(str(n))) for n in range(20)))
    await gate.reached(timeout=ctx.timeout)
    # A server may decide the whole burst in one step, and start another run in the next one.
    handles.append(await ctx.accept(say("later")))
    states = [run.state for run in await ctx.list_runs()]
    expect("states", states, [S.ACTIVE, *[S.QUEUED] * 20])
    arrivals = await gate.reached(timeout=ctx.timeout)
    expect("number of running agents", len(arrivals), 1)
    await gate.release()
    for handle in handles:
        await ctx.expect_end(handle, S.COMPLETED)


async def _restart_unready(ctx: CaseContext) -> Gate:
    """Restarts the server and holds its agent before it becomes ready."""
    gate = await ctx.arm(P.BEFORE_AGENT_READY)
    await ctx.crash()
    await gate.reached(timeout=ctx.timeout)
    return gate


@case(30, Need.RESTARTS)
async def _wait(ctx: CaseContext) -> None:
    """Runs wait until the agent is ready, then complete, even if their caller disconnected."""
    gate = await _restart_unready(ctx)
    response_gate = await ctx.arm(P.ACCEPT_COMMITTED)
    first = asyncio.create_task(ctx.accept(say("a"), run_id=f"{ctx.session} r"))
    await response_gate.reached(timeout=ctx.timeout)
    first.cancel()
    await asyncio.wait({first})
    await response_gate.release()
    second = await ctx.accept(say("b"))
    handles = [await ctx.client.attach(f"{ctx.session} r"), second]
    expect("states", [await ctx.state(h) for h in handles], [S.ACCEPTED, S.QUEUED])
    await gate.release()
    await ctx.expect_end(handles[0], S.COMPLETED, "a")
    await ctx.expect_end(handles[1], S.COMPLETED, "b")


@case(30, Need.RESTARTS)
async def _cancelled(ctx: CaseContext) -> None:
    """A cancel covers runs that wait for the agent."""
    gate = await _restart_unready(ctx)
    first, second = await ctx.accept(say("a")), await ctx.accept(say("b"))
    receipt = await ctx.client.cancel(ctx.session)
    expect(
        "receipt", covered_runs(receipt), [(first.run_id, S.ACCEPTED), (second.run_id, S.QUEUED)]
    )
    await ctx.expect_end(first, S.CANCELLED, "")
    await ctx.expect_end(second, S.CANCELLED, "")
    third = await ctx.accept(say("c"))
    await gate.release()
    await ctx.expect_end(third, S.COMPLETED, "c")


@case(30, Need.RESTARTS, Need.CLOCK)
async def _never(ctx: CaseContext) -> None:
    """If the agent does not become ready in time, waiting runs fail with a RunComplete."""
    gate = await _restart_unready(ctx)
    handles = [await ctx.accept(say(text)) for text in "ab"]
    await ctx.harness.advance_clock(ctx.server.ready_timeout)
    for handle in handles:
        complete = await ctx.wait_for_end(handle)
        expect("state", complete.state, S.FAILED)
        expect("reason of the error", complete.error and complete.error.reason, "AGENT_NOT_READY")
        await ctx.expect_turn(complete)
    await gate.release()
    later = await ctx.accept(say("c"))
    # The server retries the agent after a backoff.
    await ctx.harness.advance_clock(60)
    await ctx.expect_end(later, S.COMPLETED, "c")
