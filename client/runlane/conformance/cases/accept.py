"""The cases of R1 to R6: accept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress

from runlane.conformance.context import CaseContext, reason_of, say, script
from runlane.conformance.rules import Need, case, expect, fail
from runlane.convert import run as run_of
from runlane.errors import DeadlineExceeded, RunlaneError
from runlane.harness.client import GatePoint
from runlane.types import Attachment, RunState, WhenBusy
from runlane.v1 import run_service_pb2 as pb

S, P = RunState, GatePoint

UUID_VERSION_INDEX = 14
"""Position of the version in the text of a UUID."""


async def expect_rejection(call: Awaitable[object], reason: str) -> RunlaneError:
    """Checks that a call is rejected with this reason; returns its error."""
    try:
        response = await call
    except RunlaneError as error:
        rejection = error
    else:
        fail(f"the call was not rejected with {reason}; it returned {response!r}")
    expect("reason of the error", reason_of(rejection), reason)
    return rejection


@case(1)
async def _returns_without_agent(ctx: CaseContext) -> None:
    """An accept returns while the run is held before it becomes active."""
    gate = await ctx.arm(P.BEFORE_ACTIVE)
    handle = await ctx.accept(say("x"))
    await ctx.expect_arrivals(gate, handle)
    await ctx.expect_state(handle, S.ACCEPTED)
    await gate.release()
    await ctx.expect_end(handle, S.COMPLETED, "x")


@case(1, Need.RESTARTS, Need.DURABLE)
async def _survives_crash(ctx: CaseContext) -> None:
    """Accepted runs survive a crash right after the response."""
    gate = await ctx.arm(P.BEFORE_ACTIVE)
    handles = [await ctx.accept(say(str(n))) for n in range(3)]
    await ctx.crash()
    await gate.release()
    for n, handle in enumerate(handles):
        await ctx.expect_end(handle, S.COMPLETED, str(n))


@case(2)
async def _empty_prompt(ctx: CaseContext) -> None:
    """An empty or blank prompt is rejected with EMPTY_PROMPT; a text attachment suffices."""
    for prompt in ("", " \n"):
        call = ctx.client.run_accepted(ctx.session, prompt, allow_missing=True)
        error = await expect_rejection(call, "EMPTY_PROMPT")
        expect("field of the error", [v.field for v in error.violations], ["prompt"])
    only = Attachment("a.txt", "read me")
    handle = await ctx.client.run_accepted(ctx.session, "", attachments=[only], allow_missing=True)
    await ctx.expect_end(handle, S.COMPLETED)


@case(2)
async def _missing_session(ctx: CaseContext) -> None:
    """No session id is SESSION_MISSING; an unknown one is SESSION_NOT_FOUND or is created."""
    await expect_rejection(ctx.client.run_accepted("", "x", allow_missing=True), "SESSION_MISSING")
    await expect_rejection(ctx.client.run_accepted(ctx.session, "x"), "SESSION_NOT_FOUND")
    await ctx.expect_end(await ctx.accept(say("x")), S.COMPLETED, "x")
    await ctx.expect_end(await ctx.client.run_accepted(ctx.session, "y"), S.COMPLETED)


@case(3)
async def _same_run(ctx: CaseContext) -> None:
    """The same id with the same request returns the same waiting, active or ended run."""
    run_id = f"{ctx.session} r"
    gate = await ctx.arm(P.BEFORE_ACTIVE)
    first = await ctx.accept(*ctx.gate_steps("g"), run_id=run_id)
    while_waiting = await ctx.accept(*ctx.gate_steps("g"), run_id=run_id)
    await gate.release()
    await ctx.wait_for_text(first, "<g>")
    while_active = await ctx.accept(*ctx.gate_steps("g"), run_id=run_id)
    await ctx.open_gate()
    complete = await ctx.wait_for_end(first)
    after = await ctx.accept(*ctx.gate_steps("g"), run_id=run_id)
    seqs = [handle.run.accept_seq for handle in (first, while_waiting, while_active, after)]
    expect("accept_seq", seqs, [1, 1, 1, 1])
    expect("RunComplete of the repeated accept", after.run.run_complete, complete)
    expect("runs of the session", [run.run_id for run in await ctx.list_runs()], [run_id])


@case(3)
async def _conflict(ctx: CaseContext) -> None:
    """The same id with another prompt or session is RUN_ID_CONFLICT, also after the end."""
    run_id = f"{ctx.session} r"
    await ctx.accept_blocked(run_id=run_id)
    for _ in range(2):
        await expect_rejection(ctx.accept(say("other"), run_id=run_id), "RUN_ID_CONFLICT")
        other = ctx.accept(*ctx.gate_steps("g"), run_id=run_id, session=f"{ctx.session} other")
        await expect_rejection(other, "RUN_ID_CONFLICT")
        await ctx.open_gate()
        await ctx.client.wait_run(run_id, timeout=ctx.timeout)


@case(3)
async def _generated_id(ctx: CaseContext) -> None:
    """Without an id the server generates a UUIDv7."""
    wire = ctx.client._wire  # noqa: SLF001 - the public method always sends an id
    request = pb.RunAcceptedRequest(session_id=ctx.session, prompt="x", allow_missing=True)
    run = run_of((await wire.call(wire.runs.RunAccepted, request)).run)
    expect("version of the UUID", run.run_id[UUID_VERSION_INDEX], "7")


@case(3, Need.RESTARTS, Need.DURABLE)
async def _retry_after_crash(ctx: CaseContext) -> None:
    """After a crash between commit and response, a retry returns the same run."""
    run_id = f"{ctx.session} r"
    gate = await ctx.arm(P.ACCEPT_COMMITTED)
    call = asyncio.create_task(ctx.accept(say("x"), run_id=run_id))
    await gate.reached(timeout=ctx.timeout)
    await ctx.crash()
    await gate.release()
    # The client has retried the call.
    handle = await call
    expect("accept_seq of the retried call", handle.run.accept_seq, 1)
    await ctx.wait_for_end(handle)
    expect("runs of the session", [run.run_id for run in await ctx.list_runs()], [run_id])


@case(4)
async def _order(ctx: CaseContext) -> None:
    """Concurrent accepts get consecutive numbers, and their runs start in this order."""
    gate = await ctx.arm(P.BEFORE_ACTIVE)
    handles = await asyncio.gather(*(ctx.accept(say(str(n))) for n in range(20)))
    handles = sorted(handles, key=lambda handle: handle.run.accept_seq)
    expect("accept_seq", [h.run.accept_seq for h in handles], list(range(1, 21)))
    await gate.release()
    ends = [await ctx.wait_for_end(handle) for handle in handles]
    times = [end.started_at for end in ends if end.started_at is not None]
    expect("start times in accept order", times, sorted(times))


@case(5)
async def _caller_disconnects(ctx: CaseContext) -> None:
    """A cancelled call or a passed deadline of the caller does not affect the run."""
    active = await ctx.arm(P.BEFORE_ACTIVE)
    gate = await ctx.arm(P.ACCEPT_COMMITTED)
    ids = [f"{ctx.session} {n}" for n in range(2)]
    call = asyncio.create_task(ctx.accept(say("x"), run_id=ids[0]))
    await gate.reached(1, timeout=ctx.timeout)
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call
    async with ctx.no_retry_client(0.2) as client:
        try:
            await client.run_accepted(ctx.session, script(say("x")), run_id=ids[1])
            fail("an accept held at a gate returned")
        except DeadlineExceeded:
            pass
    await gate.release()
    expect("states", [run.state for run in await ctx.list_runs()], [S.ACCEPTED, S.QUEUED])
    await active.release()
    for run_id in ids:
        await ctx.expect_end(await ctx.client.attach(run_id), S.COMPLETED, "x")


@case(5)
async def _subscriber_disconnects(ctx: CaseContext) -> None:
    """A subscriber that disconnects does not end the run."""
    handle = await ctx.accept_blocked()
    events = handle.events()
    await anext(events)
    await events.aclose()
    await ctx.expect_state(handle, S.ACTIVE)
    await ctx.open_gate()
    await ctx.expect_end(handle, S.COMPLETED, "<g>")


@case(6)
async def _rejected_leaves_nothing(ctx: CaseContext) -> None:
    """A rejected accept leaves no run, no session and no work; its run id stays free."""
    run_id = f"{ctx.session} r"
    await expect_rejection(
        ctx.accept(say("x"), run_id=run_id, allow_missing=False), "SESSION_NOT_FOUND"
    )
    await expect_rejection(ctx.client.get_session(ctx.session), "SESSION_NOT_FOUND")
    await expect_rejection(ctx.client.get_run(run_id), "RUN_NOT_FOUND")
    call = ctx.client.run_accepted(ctx.session, "", run_id=run_id, allow_missing=True)
    await expect_rejection(call, "EMPTY_PROMPT")
    await expect_rejection(ctx.client.get_session(ctx.session), "SESSION_NOT_FOUND")
    handle = await ctx.accept(say("x"), run_id=run_id)
    expect("accept_seq", handle.run.accept_seq, 1)
    await ctx.expect_end(handle, S.COMPLETED, "x")
    await ctx.expect_busy(busy=False)


@case(6)
async def _rejected_while_busy(ctx: CaseContext) -> None:
    """Rejected accepts of a busy session do not wait and are not in a receipt."""
    await ctx.accept_blocked()
    for n in range(5):
        call = ctx.accept(say("x"), when_busy=WhenBusy.REJECT, run_id=f"{ctx.session} {n}")
        await expect_rejection(call, "SESSION_BUSY")
    session = await ctx.client.get_session(ctx.session)
    expect("waiting_runs", session.waiting_runs, 0)
    receipt = await ctx.client.cancel(ctx.session)
    expect("number of covered runs", len(receipt.cancelled), 1)
    expect("fence", receipt.fence_accept_seq, 1)
    expect("number of runs in the session", len(await ctx.list_runs()), 1)
