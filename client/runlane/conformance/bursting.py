"""R29 and R30: what holds for the whole of a server."""

from __future__ import annotations

import asyncio

from runlane.conformance.rules import Need, case, expect
from runlane.conformance.world import World, covered, say
from runlane.harness.client import Gate, GatePoint
from runlane.types import RunState

S, P = RunState, GatePoint


@case(29)
async def _burst(world: World) -> None:
    """Of many accepts at once on an idle session one run becomes active, the others wait."""
    gate = await world.arm(P.BEFORE_FINISH)
    handles = await asyncio.gather(*(world.accept(say(str(n))) for n in range(20)))
    await gate.reached(timeout=world.patience)
    states = [run.state for run in await world.runs()]
    expect("the states", states, [S.ACTIVE, *[S.QUEUED] * 19])
    arrivals = await gate.reached(timeout=world.patience)
    expect("how many agents are at work", len(arrivals), 1)
    await gate.release()
    for handle in handles:
        await world.ended(handle, S.COMPLETED)


async def _unready(world: World) -> Gate:
    """Starts the server anew, and keeps its agent from getting ready."""
    gate = await world.arm(P.BEFORE_AGENT_READY)
    await world.crash()
    await gate.reached(timeout=world.patience)
    return gate


@case(30, Need.RESTARTS)
async def _wait(world: World) -> None:
    """Until the agent is ready runs wait; then they complete, though the first caller has gone."""
    gate = await _unready(world)
    held = await world.arm(P.ACCEPT_COMMITTED)
    first = asyncio.create_task(world.accept(say("a"), run_id=f"{world.session} r"))
    await held.reached(timeout=world.patience)
    first.cancel()
    await asyncio.wait({first})
    await held.release()
    second = await world.accept(say("b"))
    handles = [await world.client.attach(f"{world.session} r"), second]
    expect("the states", [await world.state(h) for h in handles], [S.ACCEPTED, S.QUEUED])
    await gate.release()
    await world.ended(handles[0], S.COMPLETED, "a")
    await world.ended(handles[1], S.COMPLETED, "b")


@case(30, Need.RESTARTS)
async def _cancelled(world: World) -> None:
    """A cancel covers runs that wait for the agent."""
    gate = await _unready(world)
    first, second = await world.accept(say("a")), await world.accept(say("b"))
    receipt = await world.client.cancel(world.session)
    expect("the receipt", covered(receipt), [(first.run_id, S.ACCEPTED), (second.run_id, S.QUEUED)])
    await world.ended(first, S.CANCELLED, "")
    await world.ended(second, S.CANCELLED, "")
    third = await world.accept(say("c"))
    await gate.release()
    await world.ended(third, S.COMPLETED, "c")


@case(30, Need.RESTARTS, Need.CLOCK)
async def _never(world: World) -> None:
    """If the agent never gets ready they end failed, each with its RunComplete."""
    gate = await _unready(world)
    handles = [await world.accept(say(text)) for text in "ab"]
    await world.harness.advance_clock(world.server.ready_timeout)
    for handle in handles:
        complete = await world.end(handle)
        expect("the state", complete.state, S.FAILED)
        expect("the reason", complete.error and complete.error.reason, "AGENT_NOT_READY")
        await world.check_turn(complete)
    await gate.release()
    later = await world.accept(say("c"))
    # The agent is tried again after a pause.
    await world.harness.advance_clock(60)
    await world.ended(later, S.COMPLETED, "c")
