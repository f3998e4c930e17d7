"""R10 to R20: cancel."""

from __future__ import annotations

import asyncio

from runlane.conformance.rules import Need, case, expect, hold
from runlane.conformance.world import STEP, World, covered, say, text_of
from runlane.harness.client import GatePoint
from runlane.types import CancelScope, FinishReason, Role, RunState, ToolResult, WhenBusy

S, P = RunState, GatePoint

TOOL_CALL = {"tool_call": {"id": "1", "name": "look", "arguments": {}}}


@case(10)
async def _all_of_them(world: World) -> None:
    """A cancel covers the active run and all that wait."""
    active = await world.blocked()
    waiting = [await world.accept(say(str(n))) for n in range(3)]
    receipt = await world.client.cancel(world.session)
    expect(
        "the receipt",
        covered(receipt),
        [(active.run_id, S.ACTIVE), *((handle.run_id, S.QUEUED) for handle in waiting)],
    )
    await world.ended(active, S.CANCELLED, "<g>")
    for handle in waiting:
        await world.ended(handle, S.CANCELLED, "")


@case(10)
async def _both_accepted(world: World) -> None:
    """A cancel covers each of two runs that are accepted and not active yet."""
    gate = await world.arm(P.BEFORE_ACTIVE)
    first, second = await world.accept(say("a")), await world.accept(say("b"))
    await world.at(gate, first)
    receipt = await world.client.cancel(world.session)
    expect("the receipt", covered(receipt), [(first.run_id, S.ACCEPTED), (second.run_id, S.QUEUED)])
    await gate.release()
    await world.ended(first, S.CANCELLED, "")
    await world.ended(second, S.CANCELLED, "")


@case(10)
async def _right_behind_the_commit(world: World) -> None:
    """A cancel that comes before the accept is answered covers it."""
    answer = await world.arm(P.ACCEPT_COMMITTED)
    active = await world.arm(P.BEFORE_ACTIVE)
    call = asyncio.create_task(world.accept(say("x")))
    await answer.reached(timeout=world.patience)
    await active.reached(timeout=world.patience)
    receipt = await world.client.cancel(world.session)
    expect("how many are covered", len(receipt.cancelled), 1)
    await answer.release()
    handle = await call
    expect("the receipt", covered(receipt), [(handle.run_id, S.ACCEPTED)])
    await active.release()
    await world.ended(handle, S.CANCELLED, "")


@case(11)
async def _the_next_one(world: World) -> None:
    """A run that is accepted after a cancel completes, though its agent has not returned yet."""
    first = await world.blocked(ignore_cancel=True)
    await world.client.cancel(world.session)
    second = await world.accept(say("x"))
    await world.open()
    await world.ended(first, S.CANCELLED, "<g>")
    await world.ended(second, S.COMPLETED, "x")


@case(11)
async def _after_an_entry(world: World) -> None:
    """A run that is accepted after a cancel on entry completes."""
    gate = await world.arm(P.BEFORE_ACTIVE)
    first = await world.accept(say("a"))
    await world.client.cancel(world.session)
    second = await world.accept(say("b"))
    await gate.release()
    await world.ended(first, S.CANCELLED, "")
    await world.ended(second, S.COMPLETED, "b")


@case(12)
async def _idle(world: World) -> None:
    """A cancel of an idle session has an empty receipt, and the next run completes."""
    await world.ended(await world.accept(say("a")), S.COMPLETED, "a")
    before = [await world.messages(), await world.runs()]
    for scope in (CancelScope.SESSION, CancelScope.ACTIVE, CancelScope.WAITING):
        receipt = await world.client.cancel(world.session, scope=scope)
        expect(f"the receipt of {scope}", covered(receipt), [])
        expect("the fence", receipt.fence_accept_seq, 1)
    expect("what is recorded", [await world.messages(), await world.runs()], before)
    await world.busy(expected=False)
    for text in "bc":
        await world.ended(await world.accept(say(text)), S.COMPLETED, text)


@case(12)
async def _before_the_first(world: World) -> None:
    """A cancel of a session that has never had a run does not poison its first one."""
    await world.client.create_session(world.session)
    receipt = await world.client.cancel(world.session)
    expect("the receipt", covered(receipt), [])
    await world.ended(await world.accept(say("x")), S.COMPLETED, "x")


@case(13)
async def _again(world: World) -> None:
    """The second cancel covers nothing, and the reason of the first one stands."""
    active = await world.blocked(ignore_cancel=True)
    queued = await world.accept(say("x"))
    first = await world.client.cancel(world.session, reason="first")
    second = await world.client.cancel(world.session, reason="second")
    expect("how many each covered", [len(first.cancelled), len(second.cancelled)], [2, 0])
    await world.open()
    for handle in (active, queued):
        expect("the reason", (await world.end(handle)).cancel_reason, "first")
        await world.ended(handle, S.CANCELLED)


@case(14)
async def _entry_writes_the_turn(world: World) -> None:
    """A run that is cancelled on entry has its prompt and an answer `canceled` in the transcript,
    and its agent is never called."""
    gate = await world.arm(P.BEFORE_ACTIVE)
    handle = await world.accept(say("x"))
    await world.at(gate, handle)
    await handle.cancel()
    complete = await world.end(handle)
    expect("how often it was started", [complete.attempt, complete.started_at], [0, None])
    turn = [(m.role, m.finish_reason, text_of(m)) for m in await world.turn(handle.run_id)]
    hold("the turn is a prompt and an answer", true=len(turn) == 2)
    expect("the roles", [turn[0][0], turn[1][0]], [Role.USER, Role.ASSISTANT])
    expect("the answer", list(turn[1][1:]), [FinishReason.CANCELED, ""])
    await gate.release()
    await world.is_now(handle, S.CANCELLED)


@case(14)
async def _queued_writes_the_turn(world: World) -> None:
    """A run that is cancelled in the queue has its turn as well, behind the active one."""
    active = await world.blocked()
    queued = await world.accept(say("x"))
    await queued.cancel()
    await world.ended(queued, S.CANCELLED, "")
    await world.open()
    await world.ended(active, S.COMPLETED, "<g>")
    order = [message.run_id for message in await world.messages()]
    expect("whose messages they are", order, [active.run_id] * 2 + [queued.run_id] * 2)


@case(15)
async def _before_a_word(world: World) -> None:
    """A run that is cancelled when it is active and has said nothing: one prompt, one answer."""
    gate = await world.arm(P.BEFORE_FIRST_MESSAGE)
    handle = await world.accept(say("x"))
    await world.at(gate, handle)
    receipt = await handle.cancel()
    expect("the receipt", covered(receipt), [(handle.run_id, S.ACTIVE)])
    await world.ended(handle, S.CANCELLED, "")
    roles = [message.role for message in await world.turn(handle.run_id)]
    expect("the roles", roles, [Role.USER, Role.ASSISTANT])


@case(16)
async def _text_so_far(world: World) -> None:
    """The text so far is kept, and an open tool call gets an error for a result."""
    handle = await world.accept(say("so far"), TOOL_CALL, *world.at_gate("g"))
    await world.heard(handle, "<g>")
    await handle.cancel()
    complete = await world.end(handle)
    expect("the state", complete.state, S.CANCELLED)
    turn = await world.turn(handle.run_id)
    said = "".join(text_of(message) for message in turn if message.role is Role.ASSISTANT)
    expect("what was kept", said, "so far<g>")
    results = [part for m in turn for part in m.parts if isinstance(part, ToolResult)]
    expect("the results of the call", [r.is_error for r in results], [True])
    nxt = await world.accept({"say": "history"})
    history = (await world.end(nxt)).text
    hold("the next turn sees what was said", true="so far" in history)


@case(17, Need.RESTARTS, Need.DURABLE, Need.CLOCK)
async def _shutdown(world: World) -> None:
    """What is active when the server goes down has its end written; new runs are refused."""
    active = await world.blocked()
    queued = await world.accept(say("x"))
    await world.drain()
    complete = await world.end(active)
    expect("how it ended", complete.finish_reason, FinishReason.INTERRUPTED)
    expect("what was kept", complete.text, "<g>")
    await world.ended(active, S.FAILED)
    await world.ended(queued, S.COMPLETED, "x")


@case(17, Need.RESTARTS, Need.DURABLE, Need.CLOCK)
async def _cancelled_at_shutdown(world: World) -> None:
    """A cancel that was answered stays in force when the server goes down before the end."""
    active = await world.blocked(ignore_cancel=True)
    await active.cancel()
    await world.drain()
    await world.ended(active, S.CANCELLED, "<g>")


@case(18)
async def _one_run(world: World) -> None:
    """With a run id the cancel covers that run, wherever it is."""
    active = await world.blocked()
    first, second = await world.accept(say("a")), await world.accept(say("b"))
    receipt = await world.client.cancel(run_id=first.run_id)
    expect("the receipt", covered(receipt), [(first.run_id, S.QUEUED)])
    receipt = await world.client.cancel(world.session, run_id=active.run_id)
    expect("the receipt", covered(receipt), [(active.run_id, S.ACTIVE)])
    await world.ended(first, S.CANCELLED, "")
    await world.ended(active, S.CANCELLED, "<g>")
    await world.ended(second, S.COMPLETED, "b")


@case(18)
async def _active_only(world: World) -> None:
    """ACTIVE covers the active run, and the queue lives on."""
    active, queued = await world.blocked(), await world.accept(say("b"))
    receipt = await world.client.cancel(world.session, scope=CancelScope.ACTIVE)
    expect("the receipt", covered(receipt), [(active.run_id, S.ACTIVE)])
    await world.ended(active, S.CANCELLED, "<g>")
    await world.ended(queued, S.COMPLETED, "b")


@case(18)
async def _waiting_only(world: World) -> None:
    """WAITING covers the queue, and the active run lives on."""
    active, queued = await world.blocked(), await world.accept(say("b"))
    receipt = await world.client.cancel(world.session, scope=CancelScope.WAITING)
    expect("the receipt", covered(receipt), [(queued.run_id, S.QUEUED)])
    await world.open()
    await world.ended(queued, S.CANCELLED, "")
    await world.ended(active, S.COMPLETED, "<g>")


@case(18)
async def _cancel_all(world: World) -> None:
    """CancelAll covers all sessions, with a receipt for each that had work."""
    sessions = [f"{world.session} {n}" for n in range(3)]
    handles = [await world.blocked(f"g{n}", session=name) for n, name in enumerate(sessions)]
    idle = f"{world.session} idle"
    await world.end(await world.accept(say("x"), session=idle))
    receipts = {receipt.session_id: covered(receipt) for receipt in await world.client.cancel_all()}
    for name, handle in zip(sessions, handles, strict=True):
        expect(f"the receipt of {name}", receipts.get(name), [(handle.run_id, S.ACTIVE)])
        await world.ended(handle, S.CANCELLED)
    hold("an idle session is not named", true=idle not in receipts)


@case(19)
async def _cancel_first(world: World) -> None:
    """A cancel that comes when the agent has returned, and before that is written, wins."""
    gate = await world.arm(P.BEFORE_FINISH)
    handle = await world.accept(say("x"))
    await world.at(gate, handle)
    receipt = await handle.cancel()
    expect("the receipt", covered(receipt), [(handle.run_id, S.ACTIVE)])
    await gate.release()
    await world.ended(handle, S.CANCELLED, "x")


@case(19)
async def _completion_first(world: World) -> None:
    """A cancel that comes after the end is written covers nothing."""
    handle = await world.accept(say("x"))
    await world.ended(handle, S.COMPLETED, "x")
    expect("the receipt", covered(await handle.cancel()), [])
    await world.ended(handle, S.COMPLETED, "x")


@case(19)
async def _all_agree(world: World) -> None:
    """At whatever instant it comes: receipt, run, transcript and RunComplete agree."""
    for _ in range(50):
        handle = await world.accept(say("x"))
        receipt = await handle.cancel()
        state = S.CANCELLED if receipt.cancelled else S.COMPLETED
        await world.ended(handle, state)
        await world.is_now(handle, state)


@case(20)
async def _receipt(world: World) -> None:
    """The receipt has the runs in accept order, each with its state, and the last accept_seq."""
    gate = await world.arm(P.BEFORE_STEP)
    active = await world.accept(say("<g>"), STEP, *world.at_gate("h"))
    await world.at(gate, active)
    folded = await world.accept(say("f"), when_busy=WhenBusy.FOLD)
    await gate.release()
    await world.heard(active, "<h>")
    queued = await world.accept(say("q"))
    receipt = await world.client.cancel(world.session, reason="why")
    expect(
        "the receipt",
        [(r.session_id, r.run_id, r.accept_seq, r.state_when_cancelled) for r in receipt.cancelled],
        [
            (world.session, active.run_id, 1, S.ACTIVE),
            (world.session, folded.run_id, 2, S.FOLDED),
            (world.session, queued.run_id, 3, S.QUEUED),
        ],
    )
    expect("the fence", receipt.fence_accept_seq, 3)
    for handle in (active, folded, queued):
        complete = await world.end(handle)
        expect("the end", [complete.state, complete.cancel_reason], [S.CANCELLED, "why"])
