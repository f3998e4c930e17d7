"""R26 to R28: fold and queue."""

from __future__ import annotations

from runlane.conformance.accepting import refused
from runlane.conformance.rules import case, expect, hold
from runlane.conformance.world import STEP, World, covered, say
from runlane.harness.client import GatePoint
from runlane.types import Role, RunState, WhenBusy

S, P = RunState, GatePoint
FOLD = WhenBusy.FOLD


@case(26)
async def _joins(world: World) -> None:
    """Runs that wait to be folded join at the step, in accept order, and share the end."""
    gate = await world.arm(P.BEFORE_STEP)
    host = await world.accept(say("a"), STEP, say("b"))
    await world.at(gate, host)
    texts = ["one", "two"]
    joining = [
        await world.client.run_accepted(world.session, text, when_busy=FOLD) for text in texts
    ]
    await gate.release()
    end = await world.end(host)
    expect("what the agent was given", end.text, "[folded: one][folded: two]b")
    for handle in joining:
        own = await world.end(handle)
        expect("whose turn it joined", own.folded_into, host.run_id)
        expect("the end they share", [own.state, own.message_id], [end.state, end.message_id])
        await world.check_turn(own)
    whose = [(m.run_id, m.role) for m in await world.messages() if m.role is Role.USER]
    expect("the prompts", whose, [(h.run_id, Role.USER) for h in (host, *joining)])


@case(26)
async def _cancelled(world: World) -> None:
    """A run that a cancel covered before the step is not folded in."""
    gate = await world.arm(P.BEFORE_STEP)
    host = await world.accept(say("a"), STEP, say("b"))
    await world.at(gate, host)
    first = await world.client.run_accepted(world.session, "one", when_busy=FOLD)
    second = await world.client.run_accepted(world.session, "two", when_busy=FOLD)
    receipt = await first.cancel()
    expect("the receipt", covered(receipt), [(first.run_id, S.QUEUED)])
    await gate.release()
    end = await world.end(host)
    expect("what the agent was given", end.text, "[folded: two]b")
    await world.ended(first, S.CANCELLED, "")
    expect("whose turn it joined", (await world.end(first)).folded_into, None)
    expect("whose turn it joined", (await world.end(second)).folded_into, host.run_id)


@case(26)
async def _cancelled_at_the_step(world: World) -> None:
    """A cancel of the session at the step: nothing is folded in any more, and all are cancelled."""
    gate = await world.arm(P.BEFORE_STEP)
    host = await world.accept(say("a"), STEP, say("b"))
    await world.at(gate, host)
    waiting = await world.client.run_accepted(world.session, "one", when_busy=FOLD)
    await world.client.cancel(world.session)
    await gate.release()
    await world.ended(host, S.CANCELLED, "a")
    await world.ended(waiting, S.CANCELLED, "")


@case(26)
async def _no_step(world: World) -> None:
    """On an agent without steps, or after the last one, it runs as a turn of its own."""
    host = await world.blocked()
    waiting = await world.client.run_accepted(world.session, "one", when_busy=FOLD)
    await world.open()
    await world.ended(host, S.COMPLETED, "<g>")
    own = await world.end(waiting)
    expect("a turn of its own", [own.folded_into, own.text], [None, "one"])
    await world.check_turn(own)


@case(27)
async def _queue(world: World) -> None:
    """A QUEUE run is never folded."""
    gate = await world.arm(P.BEFORE_STEP)
    host = await world.accept(STEP, say("b"))
    await world.at(gate, host)
    queued = await world.client.run_accepted(world.session, "one")
    await gate.release()
    await world.ended(host, S.COMPLETED, "b")
    await world.ended(queued, S.COMPLETED, "one")


@case(27)
async def _reject(world: World) -> None:
    """REJECT is SESSION_BUSY where there is work, waiting or active, and else it runs."""
    gate = await world.arm(P.BEFORE_ACTIVE)
    first = await world.accept(*world.at_gate("g"))
    await refused(world.accept(say("x"), when_busy=WhenBusy.REJECT), "SESSION_BUSY")
    await gate.release()
    await world.heard(first, "<g>")
    await refused(world.accept(say("x"), when_busy=WhenBusy.REJECT), "SESSION_BUSY")
    await world.open()
    await world.end(first)
    await world.ended(await world.accept(say("x"), when_busy=WhenBusy.REJECT), S.COMPLETED, "x")


@case(27)
async def _interrupt(world: World) -> None:
    """INTERRUPT cancels the active run, keeps the queue, and goes to its head."""
    active = await world.blocked()
    queued = await world.accept(say("q"))
    urgent = await world.accept(say("i"), when_busy=WhenBusy.INTERRUPT)
    await world.ended(active, S.CANCELLED, "<g>")
    first, second = await world.end(urgent), await world.end(queued)
    expect("how they ended", [first.text, second.text], ["i", "q"])
    hold(
        "the one that interrupts comes first",
        true=second.started_at is not None and first.ended_at <= second.started_at,
    )


@case(28)
async def _nothing_behind(world: World) -> None:
    """A cancel of a run that has ended touches no later one, and later ones complete."""
    first = await world.accept(say("a"))
    await world.ended(first, S.COMPLETED, "a")
    second = await world.blocked()
    expect("the receipt", covered(await first.cancel()), [])
    await world.is_now(second, S.ACTIVE)
    await world.open()
    await world.ended(second, S.COMPLETED, "<g>")


@case(28)
async def _cancelled_late(world: World) -> None:
    """A cancel at the very end of a run does not catch the next one."""
    gate = await world.arm(P.BEFORE_FINISH)
    first = await world.accept(say("a"))
    await world.at(gate, first)
    await world.client.cancel(world.session)
    second = await world.accept(say("b"))
    await gate.release()
    await world.ended(first, S.CANCELLED)
    await world.ended(second, S.COMPLETED, "b")
    third = await world.accept(say("c"))
    await world.ended(third, S.COMPLETED, "c")
