"""The cases of R46 and R47: waiting runs are edited, sent now and moved."""

from __future__ import annotations

from typing import Any

from runlane.conformance.cases.accept import expect_rejection
from runlane.conformance.context import STEP, CaseContext, covered_runs, say, script
from runlane.conformance.rules import Need, case, expect
from runlane.harness.client import GatePoint
from runlane.run_handle import RunHandle
from runlane.types import CancelScope, RunState, Updated, WhenBusy

S = RunState


async def queue_of(ctx: CaseContext, count: int) -> tuple[RunHandle, list[RunHandle]]:
    """An active run at a gate, and runs that wait behind it; each outputs its number."""
    active = await ctx.accept_blocked()
    return active, [await ctx.accept(say(f"{n}")) for n in range(count)]


async def started(ctx: CaseContext, handles: list[RunHandle]) -> list[str]:
    """Opens the gate, and waits for the ends; returns the texts in the order of the starts."""
    await ctx.open_gate()
    ends = [await ctx.wait_for_end(handle) for handle in handles]
    ends.sort(key=lambda end: (end.started_at is not None, end.started_at))
    return [end.text for end in ends]


async def expect_unchanged(ctx: CaseContext, handle: RunHandle, **changes: Any) -> None:
    """Checks that a repeated update returns the run as it is."""
    before = await ctx.client.get_run(handle.run_id)
    again = await ctx.client.update_run(handle.run_id, **changes)
    expect("revision after a repeated update", again.revision, before.revision)
    expect("run after a repeated update", again.run_id, before.run_id)


@case(46)
async def _edited(ctx: CaseContext) -> None:
    """A waiting run that is edited executes its new prompt, and its followers see the edit."""
    _, [waiting] = await queue_of(ctx, 1)
    new = script(say("new"))
    run = await ctx.client.update_run(waiting.run_id, prompt=new, metadata={"k": "v"})
    expect("revision", run.revision, 1)
    expect("prompt and labels", [run.prompt_excerpt, dict(run.metadata)], [new, {"k": "v"}])
    await ctx.open_gate()
    await ctx.expect_end(waiting, S.COMPLETED, "new")
    bodies = [event.body async for event in waiting.events()]
    told = [(body.revision, body.prompt_excerpt) for body in bodies if isinstance(body, Updated)]
    expect("updates in the events of the run", told, [(1, new)])


@case(46)
async def _left_the_queue(ctx: CaseContext) -> None:
    """A run that has left the queue is refused with its state, and nothing of it changes."""
    active, [waiting] = await queue_of(ctx, 1)
    late = ctx.client.update_run(active.run_id, prompt=script(say("late")))
    refused = await expect_rejection(late, "ALREADY_STARTED")
    named = {"run_id": active.run_id, "state": "active", "active_run_id": active.run_id}
    expect("metadata of the error", refused.metadata, named)
    await ctx.open_gate()
    await ctx.expect_end(active, S.COMPLETED, "<g>")
    await ctx.wait_for_end(waiting)
    await expect_rejection(ctx.client.update_run(waiting.run_id, first=True), "ALREADY_STARTED")


@case(46)
async def _old_revision(ctx: CaseContext) -> None:
    """An update of an old revision is refused, and changes nothing."""
    _, [waiting, last] = await queue_of(ctx, 2)
    await ctx.client.update_run(waiting.run_id, prompt=script(say("one")), revision=0)
    late = ctx.client.update_run(waiting.run_id, prompt=script(say("two")), last=True, revision=0)
    await expect_rejection(late, "EDIT_CONFLICT")
    expect("order of the starts", await started(ctx, [waiting, last]), ["one", "1"])


@case(46)
async def _repeated(ctx: CaseContext) -> None:
    """A repeated update changes nothing, also when the run has started."""
    changes: dict[str, Any] = {
        "prompt": script(say("<new>"), *ctx.gate_steps("h")),
        "update_id": "u",
    }
    _, [waiting] = await queue_of(ctx, 1)
    await ctx.client.update_run(waiting.run_id, **changes)
    await expect_unchanged(ctx, waiting, **changes)
    await ctx.open_gate()
    await ctx.wait_for_text(waiting, "<h>")
    await expect_unchanged(ctx, waiting, **changes)
    await ctx.open_gate("h")
    await ctx.expect_end(waiting, S.COMPLETED, "<new><h>")
    await expect_unchanged(ctx, waiting, **changes)


@case(46)
async def _sent_now(ctx: CaseContext) -> None:
    """A waiting run that is to INTERRUPT cancels the active run and goes next."""
    active, [first, second] = await queue_of(ctx, 2)
    await ctx.client.update_run(second.run_id, when_busy=WhenBusy.INTERRUPT)
    await ctx.expect_end(active, S.CANCELLED, "<g>")
    expect("order of the starts", await started(ctx, [first, second]), ["1", "0"])


@case(46)
async def _folded(ctx: CaseContext) -> None:
    """A waiting run that is to FOLD joins the active turn at its next step."""
    gate = await ctx.arm(GatePoint.BEFORE_STEP)
    host = await ctx.accept(say("a"), STEP, say("b"))
    await ctx.expect_arrivals(gate, host)
    waiting = await ctx.client.run_accepted(ctx.session, "one")
    await ctx.client.update_run(waiting.run_id, when_busy=WhenBusy.FOLD)
    await gate.release()
    expect("text of the agent", (await ctx.wait_for_end(host)).text, "[folded: one]b")
    expect("folded_into", (await ctx.wait_for_end(waiting)).folded_into, host.run_id)


@case(46)
async def _empty(ctx: CaseContext) -> None:
    """An update to an empty prompt is refused, and nothing else of it is done."""
    _, [waiting, last] = await queue_of(ctx, 2)
    await expect_rejection(
        ctx.client.update_run(waiting.run_id, prompt=" ", last=True), "EMPTY_PROMPT"
    )
    expect("order of the starts", await started(ctx, [waiting, last]), ["0", "1"])


@case(46, Need.RESTARTS, Need.DURABLE)
async def _durable(ctx: CaseContext) -> None:
    """An edit and a move survive a crash of the server."""
    active, [first, second] = await queue_of(ctx, 2)
    await ctx.client.update_run(second.run_id, prompt=script(say("new")), first=True)
    await ctx.crash()
    await ctx.wait_for_end(active)
    ends = [await ctx.wait_for_end(handle) for handle in (first, second)]
    ends.sort(key=lambda end: (end.started_at is not None, end.started_at))
    expect("order of the starts", [end.text for end in ends], ["new", "0"])


@case(47)
async def _moved(ctx: CaseContext) -> None:
    """Moved runs start in the order of the queue, and keep their accept_seq."""
    _, handles = await queue_of(ctx, 4)
    ids = [handle.run_id for handle in handles]
    await ctx.client.update_run(ids[3], first=True)
    await ctx.client.update_run(ids[0], last=True)
    await ctx.client.update_run(ids[1], after=ids[2])
    await ctx.client.update_run(ids[0], before=ids[1])
    expect("order of the starts", await started(ctx, handles), ["3", "2", "0", "1"])
    seqs = [(await ctx.wait_for_end(handle)).accept_seq for handle in handles]
    expect("accept_seq", seqs, [handle.run.accept_seq for handle in handles])


@case(47)
async def _receipt(ctx: CaseContext) -> None:
    """A cancel lists moved runs in accept order, with the fence of the last accept."""
    _, handles = await queue_of(ctx, 3)
    await ctx.client.update_run(handles[2].run_id, first=True)
    receipt = await ctx.client.cancel(ctx.session, scope=CancelScope.WAITING)
    expect("receipt", covered_runs(receipt), [(handle.run_id, S.QUEUED) for handle in handles])
    expect("fence", receipt.fence_accept_seq, handles[2].run.accept_seq)
    await ctx.open_gate()


@case(47)
async def _to_a_run_that_does_not_wait(ctx: CaseContext) -> None:
    """A move to a run that does not wait in the same queue is refused, and moves nothing."""
    active, [first, second] = await queue_of(ctx, 2)
    for anchor in (active.run_id, f"{ctx.session} unknown"):
        moved = ctx.client.update_run(second.run_id, before=anchor)
        await expect_rejection(moved, "ANCHOR_NOT_WAITING")
    moved = ctx.client.update_run(second.run_id, before=second.run_id)
    await expect_rejection(moved, "INVALID_ARGUMENT")
    expect("order of the starts", await started(ctx, [first, second]), ["0", "1"])
