"""The cases of R10 to R20: cancel."""

from __future__ import annotations

import asyncio

from runlane.conformance.context import STEP, CaseContext, covered_runs, say
from runlane.conformance.rules import Need, case, expect, expect_that
from runlane.harness.client import GatePoint
from runlane.types import CancelScope, FinishReason, Role, RunState, ToolResult, WhenBusy

S, P = RunState, GatePoint

TOOL_CALL = {"tool_call": {"id": "1", "name": "look", "arguments": {}}}


@case(10)
async def _active_and_waiting(ctx: CaseContext) -> None:
    """A cancel covers the active run and all waiting runs."""
    active = await ctx.accept_blocked()
    waiting = [await ctx.accept(say(str(n))) for n in range(3)]
    receipt = await ctx.client.cancel(ctx.session)
    expect(
        "receipt",
        covered_runs(receipt),
        [(active.run_id, S.ACTIVE), *((handle.run_id, S.QUEUED) for handle in waiting)],
    )
    await ctx.expect_end(active, S.CANCELLED, "<g>")
    for handle in waiting:
        await ctx.expect_end(handle, S.CANCELLED, "")


@case(10)
async def _both_not_active(ctx: CaseContext) -> None:
    """A cancel covers two accepted runs that are not yet active."""
    gate = await ctx.arm(P.BEFORE_ACTIVE)
    first, second = await ctx.accept(say("a")), await ctx.accept(say("b"))
    await ctx.expect_arrivals(gate, first)
    receipt = await ctx.client.cancel(ctx.session)
    expect(
        "receipt", covered_runs(receipt), [(first.run_id, S.ACCEPTED), (second.run_id, S.QUEUED)]
    )
    await gate.release()
    await ctx.expect_end(first, S.CANCELLED, "")
    await ctx.expect_end(second, S.CANCELLED, "")


@case(10)
async def _before_accept_returns(ctx: CaseContext) -> None:
    """A cancel covers a run whose accept is committed but has not yet returned."""
    answer = await ctx.arm(P.ACCEPT_COMMITTED)
    active = await ctx.arm(P.BEFORE_ACTIVE)
    call = asyncio.create_task(ctx.accept(say("x")))
    await answer.reached(timeout=ctx.timeout)
    await active.reached(timeout=ctx.timeout)
    receipt = await ctx.client.cancel(ctx.session)
    expect("number of covered runs", len(receipt.cancelled), 1)
    await answer.release()
    handle = await call
    expect("receipt", covered_runs(receipt), [(handle.run_id, S.ACCEPTED)])
    await active.release()
    await ctx.expect_end(handle, S.CANCELLED, "")


@case(11)
async def _run_after_cancel(ctx: CaseContext) -> None:
    """A run accepted after a cancel completes, even if the cancelled agent has not returned."""
    first = await ctx.accept_blocked(ignore_cancel=True)
    await ctx.client.cancel(ctx.session)
    second = await ctx.accept(say("x"))
    await ctx.open_gate()
    await ctx.expect_end(first, S.CANCELLED, "<g>")
    await ctx.expect_end(second, S.COMPLETED, "x")


@case(11)
async def _run_after_cancel_on_entry(ctx: CaseContext) -> None:
    """A run accepted after a cancel on entry completes."""
    gate = await ctx.arm(P.BEFORE_ACTIVE)
    first = await ctx.accept(say("a"))
    await ctx.client.cancel(ctx.session)
    second = await ctx.accept(say("b"))
    await gate.release()
    await ctx.expect_end(first, S.CANCELLED, "")
    await ctx.expect_end(second, S.COMPLETED, "b")


@case(12)
async def _idle(ctx: CaseContext) -> None:
    """A cancel of an idle session returns an empty receipt; later runs complete."""
    await ctx.expect_end(await ctx.accept(say("a")), S.COMPLETED, "a")
    before = [await ctx.list_messages(), await ctx.list_runs()]
    for scope in (CancelScope.SESSION, CancelScope.ACTIVE, CancelScope.WAITING):
        receipt = await ctx.client.cancel(ctx.session, scope=scope)
        expect(f"receipt for scope {scope}", covered_runs(receipt), [])
        expect("fence", receipt.fence_accept_seq, 1)
    expect("messages and runs", [await ctx.list_messages(), await ctx.list_runs()], before)
    await ctx.expect_busy(busy=False)
    for text in "bc":
        await ctx.expect_end(await ctx.accept(say(text)), S.COMPLETED, text)


@case(12)
async def _session_without_runs(ctx: CaseContext) -> None:
    """A cancel of a session without runs does not affect its first run."""
    await ctx.client.create_session(ctx.session)
    receipt = await ctx.client.cancel(ctx.session)
    expect("receipt", covered_runs(receipt), [])
    await ctx.expect_end(await ctx.accept(say("x")), S.COMPLETED, "x")


@case(13)
async def _repeated(ctx: CaseContext) -> None:
    """A second cancel covers nothing; the reason of the first one stays."""
    active = await ctx.accept_blocked(ignore_cancel=True)
    queued = await ctx.accept(say("x"))
    first = await ctx.client.cancel(ctx.session, reason="first")
    second = await ctx.client.cancel(ctx.session, reason="second")
    expect(
        "number of covered runs per cancel", [len(first.cancelled), len(second.cancelled)], [2, 0]
    )
    await ctx.open_gate()
    for handle in (active, queued):
        expect("cancel_reason", (await ctx.wait_for_end(handle)).cancel_reason, "first")
        await ctx.expect_end(handle, S.CANCELLED)


@case(14)
async def _entry_writes_the_turn(ctx: CaseContext) -> None:
    """A run cancelled on entry has a prompt and a cancelled answer; its agent is not called."""
    gate = await ctx.arm(P.BEFORE_ACTIVE)
    handle = await ctx.accept(say("x"))
    await ctx.expect_arrivals(gate, handle)
    await handle.cancel()
    complete = await ctx.wait_for_end(handle)
    expect("attempt and started_at", [complete.attempt, complete.started_at], [0, None])
    turn = [(m.role, m.finish_reason, m.text) for m in await ctx.turn(handle.run_id)]
    expect("number of messages", len(turn), 2)
    expect("roles", [turn[0][0], turn[1][0]], [Role.USER, Role.ASSISTANT])
    expect("finish reason and text of the answer", list(turn[1][1:]), [FinishReason.CANCELED, ""])
    await gate.release()
    await ctx.expect_state(handle, S.CANCELLED)


@case(14)
async def _queued_writes_the_turn(ctx: CaseContext) -> None:
    """A run cancelled in the queue has its turn after the active one."""
    active = await ctx.accept_blocked()
    queued = await ctx.accept(say("x"))
    await queued.cancel()
    await ctx.expect_end(queued, S.CANCELLED, "")
    await ctx.open_gate()
    await ctx.expect_end(active, S.COMPLETED, "<g>")
    order = [message.run_id for message in await ctx.list_messages()]
    expect("runs of the messages", order, [active.run_id] * 2 + [queued.run_id] * 2)


@case(15)
async def _before_first_message(ctx: CaseContext) -> None:
    """A run cancelled before its first output has one prompt and one answer."""
    gate = await ctx.arm(P.BEFORE_FIRST_MESSAGE)
    handle = await ctx.accept(say("x"))
    await ctx.expect_arrivals(gate, handle)
    receipt = await handle.cancel()
    expect("receipt", covered_runs(receipt), [(handle.run_id, S.ACTIVE)])
    await ctx.expect_end(handle, S.CANCELLED, "")
    roles = [message.role for message in await ctx.turn(handle.run_id)]
    expect("roles", roles, [Role.USER, Role.ASSISTANT])


@case(16)
async def _text_so_far(ctx: CaseContext) -> None:
    """The text so far is kept, and an open tool call gets an error result."""
    handle = await ctx.accept(say("so far"), TOOL_CALL, *ctx.gate_steps("g"))
    await ctx.wait_for_text(handle, "<g>")
    await handle.cancel()
    complete = await ctx.wait_for_end(handle)
    expect("state", complete.state, S.CANCELLED)
    turn = await ctx.turn(handle.run_id)
    text = "".join(message.text for message in turn if message.role is Role.ASSISTANT)
    expect("kept text", text, "so far<g>")
    results = [part for m in turn for part in m.parts if isinstance(part, ToolResult)]
    expect("is_error of the tool results", [r.is_error for r in results], [True])
    next_run = await ctx.accept({"say": "history"})
    history = (await ctx.wait_for_end(next_run)).text
    expect_that("the next turn has the text in its history", true="so far" in history)


@case(17, Need.RESTARTS, Need.DURABLE, Need.CLOCK)
async def _shutdown(ctx: CaseContext) -> None:
    """A shutdown writes the end of the active run and rejects new runs."""
    active = await ctx.accept_blocked()
    queued = await ctx.accept(say("x"))
    await ctx.drain()
    complete = await ctx.wait_for_end(active)
    expect("finish reason", complete.finish_reason, FinishReason.INTERRUPTED)
    expect("kept text", complete.text, "<g>")
    await ctx.expect_end(active, S.FAILED)
    await ctx.expect_end(queued, S.COMPLETED, "x")


@case(17, Need.RESTARTS, Need.DURABLE, Need.CLOCK)
async def _cancelled_at_shutdown(ctx: CaseContext) -> None:
    """A cancel stays in force if the server shuts down before the end of the run."""
    active = await ctx.accept_blocked(ignore_cancel=True)
    await active.cancel()
    await ctx.drain()
    await ctx.expect_end(active, S.CANCELLED, "<g>")


@case(18)
async def _one_run(ctx: CaseContext) -> None:
    """A cancel with a run id covers only this run, waiting or active."""
    active = await ctx.accept_blocked()
    first, second = await ctx.accept(say("a")), await ctx.accept(say("b"))
    receipt = await ctx.client.cancel(run_id=first.run_id)
    expect("receipt", covered_runs(receipt), [(first.run_id, S.QUEUED)])
    receipt = await ctx.client.cancel(ctx.session, run_id=active.run_id)
    expect("receipt", covered_runs(receipt), [(active.run_id, S.ACTIVE)])
    await ctx.expect_end(first, S.CANCELLED, "")
    await ctx.expect_end(active, S.CANCELLED, "<g>")
    await ctx.expect_end(second, S.COMPLETED, "b")


@case(18)
async def _active_only(ctx: CaseContext) -> None:
    """Scope ACTIVE covers the active run; waiting runs are kept."""
    active, queued = await ctx.accept_blocked(), await ctx.accept(say("b"))
    receipt = await ctx.client.cancel(ctx.session, scope=CancelScope.ACTIVE)
    expect("receipt", covered_runs(receipt), [(active.run_id, S.ACTIVE)])
    await ctx.expect_end(active, S.CANCELLED, "<g>")
    await ctx.expect_end(queued, S.COMPLETED, "b")


@case(18)
async def _waiting_only(ctx: CaseContext) -> None:
    """Scope WAITING covers the waiting runs; the active run continues."""
    active, queued = await ctx.accept_blocked(), await ctx.accept(say("b"))
    receipt = await ctx.client.cancel(ctx.session, scope=CancelScope.WAITING)
    expect("receipt", covered_runs(receipt), [(queued.run_id, S.QUEUED)])
    await ctx.open_gate()
    await ctx.expect_end(queued, S.CANCELLED, "")
    await ctx.expect_end(active, S.COMPLETED, "<g>")


@case(18)
async def _cancel_all(ctx: CaseContext) -> None:
    """CancelAll covers all sessions and returns a receipt for each busy one."""
    sessions = [f"{ctx.session} {n}" for n in range(3)]
    handles = [await ctx.accept_blocked(f"g{n}", session=name) for n, name in enumerate(sessions)]
    idle = f"{ctx.session} idle"
    await ctx.wait_for_end(await ctx.accept(say("x"), session=idle))
    receipts = {
        receipt.session_id: covered_runs(receipt) for receipt in await ctx.client.cancel_all()
    }
    for name, handle in zip(sessions, handles, strict=True):
        expect(f"receipt of {name}", receipts.get(name), [(handle.run_id, S.ACTIVE)])
        await ctx.expect_end(handle, S.CANCELLED)
    expect_that("an idle session has no receipt", true=idle not in receipts)


@case(19)
async def _cancel_first(ctx: CaseContext) -> None:
    """A cancel wins if the agent has returned but its end is not committed."""
    gate = await ctx.arm(P.BEFORE_FINISH)
    handle = await ctx.accept(say("x"))
    await ctx.expect_arrivals(gate, handle)
    receipt = await handle.cancel()
    expect("receipt", covered_runs(receipt), [(handle.run_id, S.ACTIVE)])
    await gate.release()
    await ctx.expect_end(handle, S.CANCELLED, "x")


@case(19)
async def _completion_first(ctx: CaseContext) -> None:
    """A cancel after the committed end covers nothing."""
    handle = await ctx.accept(say("x"))
    await ctx.expect_end(handle, S.COMPLETED, "x")
    expect("receipt", covered_runs(await handle.cancel()), [])
    await ctx.expect_end(handle, S.COMPLETED, "x")


@case(19)
async def _all_agree(ctx: CaseContext) -> None:
    """Receipt, run, transcript and RunComplete agree, whenever the cancel arrives."""
    for _ in range(50):
        handle = await ctx.accept(say("x"))
        receipt = await handle.cancel()
        state = S.CANCELLED if receipt.cancelled else S.COMPLETED
        await ctx.expect_end(handle, state)
        await ctx.expect_state(handle, state)


@case(20)
async def _receipt(ctx: CaseContext) -> None:
    """The receipt has the runs in accept order, their states, and the last accept_seq."""
    gate = await ctx.arm(P.BEFORE_STEP)
    active = await ctx.accept(say("<g>"), STEP, *ctx.gate_steps("h"))
    await ctx.expect_arrivals(gate, active)
    folded = await ctx.accept(say("f"), when_busy=WhenBusy.FOLD)
    await gate.release()
    await ctx.wait_for_text(active, "<h>")
    queued = await ctx.accept(say("q"))
    receipt = await ctx.client.cancel(ctx.session, reason="why")
    expect(
        "receipt",
        [(r.session_id, r.run_id, r.accept_seq, r.state_when_cancelled) for r in receipt.cancelled],
        [
            (ctx.session, active.run_id, 1, S.ACTIVE),
            (ctx.session, folded.run_id, 2, S.FOLDED),
            (ctx.session, queued.run_id, 3, S.QUEUED),
        ],
    )
    expect("fence", receipt.fence_accept_seq, 3)
    for handle in (active, folded, queued):
        complete = await ctx.wait_for_end(handle)
        expect(
            "state and cancel_reason",
            [complete.state, complete.cancel_reason],
            [S.CANCELLED, "why"],
        )
