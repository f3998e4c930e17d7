"""R1 to R6: accept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress

from runlane.conformance.rules import Need, broken, case, expect, hold
from runlane.conformance.world import World, reason_of, say, script
from runlane.convert import run as run_of
from runlane.errors import DeadlineExceeded, RunlaneError
from runlane.harness.client import GatePoint
from runlane.types import Attachment, RunState, WhenBusy
from runlane.v1 import run_service_pb2 as pb

S, P = RunState, GatePoint

UUID7_VERSION = 14
"""Where the version stands in the text of a UUID."""


async def refused(call: Awaitable[object], reason: str) -> RunlaneError:
    """The error that a call ends with; it has to have this reason."""
    try:
        answer = await call
    except RunlaneError as error:
        refusal = error
    else:
        broken(f"was not refused as {reason}: {answer!r}")
    expect("the reason of the refusal", reason_of(refusal), reason)
    return refusal


@case(1)
async def _answers_at_once(world: World) -> None:
    """An accept is answered while the run is kept from being active."""
    gate = await world.arm(P.BEFORE_ACTIVE)
    handle = await world.accept(say("x"))
    await world.at(gate, handle)
    await world.is_now(handle, S.ACCEPTED)
    await gate.release()
    await world.ended(handle, S.COMPLETED, "x")


@case(1, Need.RESTARTS, Need.DURABLE)
async def _outlives_a_crash(world: World) -> None:
    """What was accepted is there after a crash right behind the answer."""
    gate = await world.arm(P.BEFORE_ACTIVE)
    handles = [await world.accept(say(str(n))) for n in range(3)]
    await world.crash()
    await gate.release()
    for n, handle in enumerate(handles):
        await world.ended(handle, S.COMPLETED, str(n))


@case(2)
async def _empty_prompts(world: World) -> None:
    """A prompt without anything in it is EMPTY_PROMPT, a text attachment is enough."""
    for prompt in ("", " \n"):
        call = world.client.run_accepted(world.session, prompt, allow_missing=True)
        error = await refused(call, "EMPTY_PROMPT")
        expect("the field", [v.field for v in error.violations], ["prompt"])
    only = Attachment("a.txt", "read me")
    handle = await world.client.run_accepted(
        world.session, "", attachments=[only], allow_missing=True
    )
    await world.ended(handle, S.COMPLETED)


@case(2)
async def _sessions(world: World) -> None:
    """No session is SESSION_MISSING, an unknown one SESSION_NOT_FOUND unless it is to be made."""
    await refused(world.client.run_accepted("", "x", allow_missing=True), "SESSION_MISSING")
    await refused(world.client.run_accepted(world.session, "x"), "SESSION_NOT_FOUND")
    await world.ended(await world.accept(say("x")), S.COMPLETED, "x")
    await world.ended(await world.client.run_accepted(world.session, "y"), S.COMPLETED)


@case(3)
async def _same_run(world: World) -> None:
    """The same id with the same request is the same run: while it waits, is active, has ended."""
    run_id = f"{world.session} r"
    gate = await world.arm(P.BEFORE_ACTIVE)
    first = await world.accept(*world.at_gate("g"), run_id=run_id)
    while_waiting = await world.accept(*world.at_gate("g"), run_id=run_id)
    await gate.release()
    await world.heard(first, "<g>")
    while_active = await world.accept(*world.at_gate("g"), run_id=run_id)
    await world.open()
    complete = await world.end(first)
    after = await world.accept(*world.at_gate("g"), run_id=run_id)
    seqs = [handle.run.accept_seq for handle in (first, while_waiting, while_active, after)]
    expect("accept_seq", seqs, [1, 1, 1, 1])
    expect("the end that the same id names", after.run.run_complete, complete)
    expect("the runs of the session", [run.run_id for run in await world.runs()], [run_id])


@case(3)
async def _conflicts(world: World) -> None:
    """The same id with another prompt or session is RUN_ID_CONFLICT, also after its end."""
    run_id = f"{world.session} r"
    await world.blocked(run_id=run_id)
    for _ in range(2):
        await refused(world.accept(say("other"), run_id=run_id), "RUN_ID_CONFLICT")
        other = world.accept(*world.at_gate("g"), run_id=run_id, session=f"{world.session} other")
        await refused(other, "RUN_ID_CONFLICT")
        await world.open()
        await world.client.wait_run(run_id, timeout=world.patience)


@case(3)
async def _server_mints(world: World) -> None:
    """Without an id the server mints a UUIDv7."""
    wire = world.client._wire  # noqa: SLF001 - the client itself always sends an id
    request = pb.RunAcceptedRequest(session_id=world.session, prompt="x", allow_missing=True)
    run = run_of((await wire.call(wire.runs.RunAccepted, request)).run)
    expect("the version of the UUID", run.run_id[UUID7_VERSION : UUID7_VERSION + 1], "7")


@case(3, Need.RESTARTS, Need.DURABLE)
async def _retry_after_crash(world: World) -> None:
    """A crash between commit and answer: the same call again finds the one run."""
    run_id = f"{world.session} r"
    gate = await world.arm(P.ACCEPT_COMMITTED)
    call = asyncio.create_task(world.accept(say("x"), run_id=run_id))
    await gate.reached(timeout=world.patience)
    await world.crash()
    await gate.release()
    # The client has sent it again by itself.
    handle = await call
    expect("the accept_seq of the repeated call", handle.run.accept_seq, 1)
    await world.end(handle)
    expect("the runs of the session", [run.run_id for run in await world.runs()], [run_id])


@case(4)
async def _order(world: World) -> None:
    """Of many accepts at once each has a number of its own, without a hole, and runs by it."""
    gate = await world.arm(P.BEFORE_ACTIVE)
    handles = await asyncio.gather(*(world.accept(say(str(n))) for n in range(20)))
    handles = sorted(handles, key=lambda handle: handle.run.accept_seq)
    expect("accept_seq", [h.run.accept_seq for h in handles], list(range(1, 21)))
    await gate.release()
    ends = [await world.end(handle) for handle in handles]
    times = [end.started_at for end in ends if end.started_at is not None]
    expect("whether the runs started in accept order", times, sorted(times))


@case(5)
async def _caller_goes(world: World) -> None:
    """A caller who cancels his call, or whose deadline passes, changes nothing about the run."""
    active = await world.arm(P.BEFORE_ACTIVE)
    gate = await world.arm(P.ACCEPT_COMMITTED)
    ids = [f"{world.session} {n}" for n in range(2)]
    going = asyncio.create_task(world.accept(say("x"), run_id=ids[0]))
    await gate.reached(1, timeout=world.patience)
    going.cancel()
    with suppress(asyncio.CancelledError):
        await going
    async with world.hasty(0.2) as hasty:
        try:
            await hasty.run_accepted(world.session, script(say("x")), run_id=ids[1])
            broken("a call that is held was answered")
        except DeadlineExceeded:
            pass
    await gate.release()
    expect("the states", [run.state for run in await world.runs()], [S.ACCEPTED, S.QUEUED])
    await active.release()
    for run_id in ids:
        await world.ended(await world.client.attach(run_id), S.COMPLETED, "x")


@case(5)
async def _caller_of_an_active_run(world: World) -> None:
    """A follower who goes away does not end the run."""
    handle = await world.blocked()
    events = handle.events()
    await anext(events)
    await events.aclose()
    await world.is_now(handle, S.ACTIVE)
    await world.open()
    await world.ended(handle, S.COMPLETED, "<g>")


@case(6)
async def _nothing_left(world: World) -> None:
    """Of a refused accept there is no run, no session and no work; its id is free."""
    run_id = f"{world.session} r"
    await refused(world.accept(say("x"), run_id=run_id, allow_missing=False), "SESSION_NOT_FOUND")
    await refused(world.client.get_session(world.session), "SESSION_NOT_FOUND")
    await refused(world.client.get_run(run_id), "RUN_NOT_FOUND")
    call = world.client.run_accepted(world.session, "", run_id=run_id, allow_missing=True)
    await refused(call, "EMPTY_PROMPT")
    await refused(world.client.get_session(world.session), "SESSION_NOT_FOUND")
    handle = await world.accept(say("x"), run_id=run_id)
    expect("its accept_seq", handle.run.accept_seq, 1)
    await world.ended(handle, S.COMPLETED, "x")
    await world.busy(expected=False)


@case(6)
async def _refused_while_busy(world: World) -> None:
    """Refused accepts of a busy session are not counted, and not named by a cancel."""
    await world.blocked()
    for n in range(5):
        call = world.accept(say("x"), when_busy=WhenBusy.REJECT, run_id=f"{world.session} {n}")
        await refused(call, "SESSION_BUSY")
    session = await world.client.get_session(world.session)
    expect("how many wait", session.waiting_runs, 0)
    receipt = await world.client.cancel(world.session)
    expect("how many a cancel covers", len(receipt.cancelled), 1)
    expect("the fence", receipt.fence_accept_seq, 1)
    hold("one run is in the session", true=len(await world.runs()) == 1)
