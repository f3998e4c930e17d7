"""R7 to R9: order."""

from __future__ import annotations

from itertools import pairwise

from runlane.conformance.rules import Need, broken, case, expect, hold
from runlane.conformance.world import World, say
from runlane.harness.client import GatePoint
from runlane.types import RunState

S, P = RunState, GatePoint


@case(7)
async def _one_at_a_time(world: World) -> None:
    """Each run starts when the one before it has ended."""
    gate = await world.arm(P.BEFORE_FINISH)
    handles = [await world.accept(say(str(n))) for n in range(5)]
    await world.at(gate, handles[0])
    states = [run.state for run in await world.runs()]
    expect("the states", states, [S.ACTIVE, *[S.QUEUED] * 4])
    await gate.release()
    ends = [await world.end(handle) for handle in handles]
    for earlier, later in pairwise(ends):
        hold(
            f"run {later.accept_seq} started when run {earlier.accept_seq} had ended",
            true=later.started_at is not None and earlier.ended_at <= later.started_at,
        )


@case(7)
async def _sessions_do_not_wait(world: World) -> None:
    """Sessions do not wait for each other."""
    await world.blocked()
    handle = await world.accept(say("x"), session=f"{world.session} other")
    await world.ended(handle, S.COMPLETED, "x")
    await world.open()


@case(8)
async def _busy_before_it_is_active(world: World) -> None:
    """A session whose run is not active yet is busy, and not idle to a REJECT."""
    gate = await world.arm(P.BEFORE_ACTIVE)
    handle = await world.accept(say("x"))
    await world.at(gate, handle)
    session = await world.client.get_session(world.session)
    expect("busy, and how many wait", [session.busy, session.waiting_runs], [True, 1])
    await gate.release()
    await world.ended(handle, S.COMPLETED, "x")


@case(8)
async def _busy_at_the_handoff(world: World) -> None:
    """Between the end of a run and the start of the next one the session is busy."""
    first = await world.blocked()
    gate = await world.arm(P.HANDOFF)
    second = await world.accept(say("x"))
    await world.open()
    await world.at(gate, second)
    await world.is_now(first, S.COMPLETED)
    session = await world.client.get_session(world.session)
    expect("busy, and how many wait", [session.busy, session.waiting_runs], [True, 1])
    await gate.release()
    await world.ended(second, S.COMPLETED, "x")
    await world.busy(expected=False)


@case(8)
async def _never_idle(world: World) -> None:
    """A session with a queue is never seen idle while it works it off."""
    handles = [await world.accept(say(str(n))) for n in range(20)]
    looks = 0
    while (session := await world.client.get_session(world.session)).busy:
        looks += 1
        if not (session.active_run_id or session.waiting_runs):
            broken("the session is busy and has neither an active run nor a waiting one")
    for run in await world.runs():
        hold(f"after {looks} looks an idle session has no work", true=run.state is S.COMPLETED)
    await world.end(handles[-1])


@case(8)
async def _cancel_at_the_handoff(world: World) -> None:
    """A cancel at the handoff covers the run that was to come next."""
    await world.blocked()
    gate = await world.arm(P.HANDOFF)
    second, third = await world.accept(say("b")), await world.accept(say("c"))
    await world.open()
    await world.at(gate, second)
    receipt = await world.client.cancel(world.session)
    expect(
        "the receipt",
        [(run.run_id, run.state_when_cancelled) for run in receipt.cancelled],
        [(second.run_id, S.ACCEPTED), (third.run_id, S.QUEUED)],
    )
    await gate.release()
    await world.ended(second, S.CANCELLED, "")
    await world.ended(third, S.CANCELLED, "")


@case(8)
async def _cancel_behind_the_handoff(world: World) -> None:
    """A run that became active by the handoff is stopped by a cancel."""
    await world.blocked("first")
    second = await world.accept(*world.at_gate("second"))
    await world.open("first")
    await world.heard(second, "<second>")
    receipt = await second.cancel()
    expect("how many a cancel covers", len(receipt.cancelled), 1)
    await world.ended(second, S.CANCELLED, "<second>")


@case(9)
async def _busy_until_it_returns(world: World) -> None:
    """After a cancel the session is busy until the agent's code has returned."""
    first = await world.blocked(ignore_cancel=True)
    second = await world.accept(say("x"))
    await first.cancel()
    await world.is_now(first, S.CANCELLING)
    await world.is_now(second, S.QUEUED)
    await world.busy(expected=True)
    await world.open()
    await world.ended(first, S.CANCELLED, "<g>")
    await world.ended(second, S.COMPLETED, "x")


@case(9, Need.CLOCK)
async def _fenced_off(world: World) -> None:
    """An agent that does not return within the grace is fenced off: what it says is ignored."""
    first = await world.accept(*world.at_gate("g", ignore_cancel=True), say("too late"))
    await world.heard(first, "<g>")
    second = await world.accept(say("x"))
    await first.cancel()
    await world.is_now(first, S.CANCELLING)
    await world.harness.advance_clock(world.server.cancel_grace)
    await world.ended(first, S.CANCELLED, "<g>")
    await world.open()
    await world.ended(second, S.COMPLETED, "x")
    await world.ended(first, S.CANCELLED, "<g>")
