"""R21 to R25: complete."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from runlane.conformance.accepting import refused
from runlane.conformance.rules import Need, broken, case, expect, hold
from runlane.conformance.world import STEP, World, say
from runlane.errors import CursorCompacted
from runlane.harness.client import GatePoint
from runlane.run_handle import RunHandle
from runlane.subscription import Subscription
from runlane.types import CancelScope, FinishReason, Progress, RunComplete, RunState, WhenBusy

S, P = RunState, GatePoint


async def told(world: World, cursor: str | None, count: int) -> Sequence[RunComplete]:
    """The first ends of runs behind a cursor; and that in their sessions there are no more."""
    ends: list[RunComplete] = []
    async with world.client.subscribe_run_complete(cursor=cursor) as subscription:
        async with world.limit(f"{count} ends of runs are told"):
            while len(_of(world, ends)) < count:
                ends.append(await subscription.__anext__())
        # A run that ends later is told later; so what comes before it is all there is.
        last = await world.accept(say("last"), session=f"{world.session} last")
        async with world.limit("the end of a later run is told"):
            while ends[-1].run_id != last.run_id:
                ends.append(await subscription.__anext__())
    return _of(world, ends[:-1])


def _of(world: World, ends: Sequence[RunComplete]) -> list[RunComplete]:
    """Without what other sessions had to do with it."""
    helpers = [f"{world.session} {what}" for what in ("opens", "more", "last")]
    return [
        end
        for end in ends
        if end.session_id.startswith(world.session) and end.session_id not in helpers
    ]


def once_each(ends: Sequence[RunComplete], handles: Sequence[RunHandle]) -> None:
    """Each of these runs is told exactly once, and nothing else."""
    counts = Counter(end.run_id for end in ends)
    expect("how often each end was told", counts, Counter({h.run_id: 1 for h in handles}))


@case(21)
async def _each_way(world: World) -> None:
    """Completed, failed, crashed, cancelled active, on entry and from the queue, folded: one end
    for each."""
    done = await world.accept(say("x"))
    start = done.cursor
    failed = await world.accept({"fail": "no", "reason": "NO"})
    crashed = await world.accept({"crash": "boom"})
    await world.end(crashed)
    active = await world.blocked()
    queued = await world.accept(say("x"))
    await world.client.cancel(world.session, scope=CancelScope.WAITING)
    await world.client.cancel(world.session)
    await world.end(active)
    gate = await world.arm(P.BEFORE_ACTIVE)
    entry = await world.accept(say("x"))
    await entry.cancel()
    await gate.release()
    step = await world.arm(P.BEFORE_STEP)
    host = await world.accept(STEP)
    await world.at(step, host)
    folded = await world.accept(say("f"), when_busy=WhenBusy.FOLD)
    await step.release()
    handles = [done, failed, crashed, active, queued, entry, host, folded]
    ends = await told(world, start, len(handles))
    once_each(ends, handles)
    found = {end.run_id: end.state for end in ends}
    expected = [S.COMPLETED, S.FAILED, S.FAILED, *[S.CANCELLED] * 3, S.COMPLETED, S.COMPLETED]
    expect("how they ended", [found[handle.run_id] for handle in handles], expected)


@case(21)
async def _dropped_from_the_queue(world: World) -> None:
    """A run that is dropped from the queue has its end at once, while the active one goes on."""
    active = await world.blocked()
    queued = await world.accept(say("x"))
    await world.client.cancel(world.session, scope=CancelScope.WAITING)
    once_each(await told(world, queued.cursor, 1), [queued])
    await world.is_now(active, S.ACTIVE)
    await world.open()
    await world.end(active)


@case(21)
async def _cancelled_on_entry(world: World) -> None:
    """A run that is cancelled on entry has its end at once, and no second one later."""
    gate = await world.arm(P.BEFORE_ACTIVE)
    handle = await world.accept(say("x"))
    await world.at(gate, handle)
    await world.client.cancel(world.session)
    once_each(await told(world, handle.cursor, 1), [handle])
    await gate.release()
    nxt = await world.accept(say("x"))
    once_each(await told(world, handle.cursor, 2), [handle, nxt])


@case(21, Need.CLOCK)
async def _timeout(world: World) -> None:
    """A run that is active for longer than its timeout ends as `timeout`."""
    handle = await world.blocked(timeout=3600)
    await world.harness.advance_clock(3600)
    complete = await world.end(handle)
    expect("how it ended", complete.finish_reason, FinishReason.TIMEOUT)
    once_each(await told(world, handle.cursor, 1), [handle])


@case(21, Need.RESTARTS, Need.DURABLE)
async def _crash(world: World) -> None:
    """Of runs that were active, queued and about to end when the server crashed, each has one."""
    gate = await world.arm(P.BEFORE_FINISH, session=f"{world.session} b")
    active, queued = await world.blocked(), await world.accept(say("x"))
    ending = await world.accept(say("x"), session=f"{world.session} b")
    await world.at(gate, ending)
    again = await world.blocked("again", session=f"{world.session} c", max_attempts=2)
    await world.crash()
    await gate.release()
    await world.heard(again, "<again>", attempt=2)
    await world.open("again")
    handles = [active, queued, ending, again]
    ends = await told(world, active.cursor, len(handles))
    once_each(ends, handles)
    found = {end.run_id: end.finish_reason for end in ends}
    stop, lost = FinishReason.STOP, FinishReason.INTERRUPTED
    reasons = [found[handle.run_id] for handle in handles]
    expect("how they ended", reasons, [lost, stop, lost, stop])
    for end in ends:
        await world.check_turn(end)


@case(22)
async def _transcript_first(world: World) -> None:
    """Whoever hears of the end finds the turn in the transcript; before it, none of the answer."""
    gate = await world.arm(P.BEFORE_FINISH)
    handle = await world.accept(say("x"))
    await world.at(gate, handle)
    expect("messages of an active run", len(await world.turn(handle.run_id)), 1)
    async with world.client.subscribe_run_complete(cursor=handle.cursor) as subscription:
        await gate.release()
        async with world.limit("the end is told"):
            async for complete in subscription:
                if complete.run_id == handle.run_id:
                    await world.check_turn(complete)
                    break


@case(22, Need.RESTARTS, Need.DURABLE)
async def _what_was_told_stays(world: World) -> None:
    """What was told is there after a crash right behind it."""
    handle = await world.accept(say("x"))
    (before,) = await told(world, handle.cursor, 1)
    await world.crash()
    expect("the end after the crash", (await told(world, handle.cursor, 1))[0], before)
    await world.check_turn(before)


@case(23)
async def _all_fields(world: World) -> None:
    """It has session, run, accept_seq, message, text, finish reason, usage and times."""
    usage = {"usage": {"input_tokens": 3, "output_tokens": 4}}
    handle = await world.accept(say("x"), usage, {"finish": "length"})
    (end,) = await told(world, handle.cursor, 1)
    found = [end.session_id, end.run_id, end.accept_seq, end.text, end.attempt, end.error]
    expect("the fields", found, [world.session, handle.run_id, 1, "x", 1, None])
    expect("the finish reason", end.finish_reason, FinishReason.LENGTH)
    cost = end.usage and (end.usage.input_tokens, end.usage.output_tokens)
    expect("the usage", cost, (3, 4))
    times = [end.accepted_at, end.started_at or end.ended_at, end.ended_at]
    hold("accepted, started and ended follow on each other", true=times == sorted(times))
    await world.check_turn(end)
    failed = await world.end(await world.accept({"fail": "no milk", "reason": "NO_MILK"}))
    error = failed.error
    expect("the error", error and (error.reason, error.message), ("NO_MILK", "no milk"))
    cancelled = await world.blocked()
    await cancelled.cancel("enough")
    end = await world.end(cancelled)
    expect("the cancel", [end.cancelled, end.cancel_reason], [True, "enough"])


@case(24)
async def _failure(world: World) -> None:
    """The failure of a run ends the wait for it, and no other."""
    other = await world.blocked("o", session=f"{world.session} other")
    waiting = asyncio.create_task(world.end(other))
    # By the second one at the latest the wait has arrived, as calls arrive in their order.
    for _ in range(3):
        failing, behind = await world.accept({"fail": "no"}), await world.accept(say("x"))
        states = [end.state for end in await asyncio.gather(world.end(failing), world.end(behind))]
        expect("how they ended", states, [S.FAILED, S.COMPLETED])
    hold("the run of another session is still waited for", true=not waiting.done())
    await world.is_now(other, S.ACTIVE)
    await world.open("o")
    expect("how it ended", (await waiting).state, S.COMPLETED)


@case(25)
async def _late(world: World) -> None:
    """Who comes late with a cursor gets every end behind it, once, in order; also in the middle."""
    handles = [await world.accept(say(str(n))) for n in range(10)]
    await world.end(handles[-1])
    ends = await told(world, handles[0].cursor, 10)
    expect("the order", [end.text for end in ends], [str(n) for n in range(10)])
    subscription = world.client.subscribe_run_complete(
        cursor=handles[0].cursor, session_ids=[world.session]
    )
    seen = await _take(world, subscription, 4)
    resumed = world.client.subscribe_run_complete(
        cursor=subscription.cursor, session_ids=[world.session]
    )
    seen += await _take(world, resumed, 6)
    expect("what was told before and after", seen, list(ends))


async def _take(world: World, subscription: Subscription, count: int) -> list[RunComplete]:
    async with subscription, world.limit(f"{count} ends are told"):
        return [await subscription.__anext__() for _ in range(count)]


@case(25)
async def _progress(world: World) -> None:
    """The cursor of a progress mark is behind everything that was told before it."""
    handle = await world.accept(say("x"))
    await world.end(handle)
    async with world.client.subscribe_run_complete() as subscription:
        mark = await subscription.next_item()
        hold("a subscription begins with a mark", true=isinstance(mark, Progress))
        cursor = subscription.cursor
    nxt = await world.accept(say("y"))
    once_each(await told(world, cursor, 1), [nxt])


@case(25)
async def _not_ours(world: World) -> None:
    """A cursor that this store did not give out is CURSOR_INVALID."""
    handle = await world.accept(say("x"))
    await world.end(handle)
    for cursor in ("nonsense", (handle.cursor or "")[:-2], f"{handle.cursor}A"):
        subscription = world.client.subscribe_run_complete(cursor=cursor)
        await refused(subscription.__anext__(), "CURSOR_INVALID")
        await subscription.aclose()


@case(25, Need.RESTARTS, Need.DURABLE)
async def _over_a_crash(world: World) -> None:
    """A subscription that goes on after a crash misses nothing and repeats nothing."""
    handles = [await world.accept(say(str(n))) for n in range(3)]
    cursor = handles[0].cursor
    sessions = [world.session]
    async with world.client.subscribe_run_complete(
        cursor=cursor, session_ids=sessions
    ) as subscription:
        async with world.limit("the first ends are told"):
            seen = [await subscription.__anext__() for _ in range(3)]
        await world.crash()
        handles += [await world.accept(say(str(n))) for n in range(3, 6)]
        async with world.limit("the later ends are told"):
            seen += [await subscription.__anext__() for _ in range(3)]
    once_each(seen, handles)
    once_each(await told(world, cursor, 6), handles)


@case(25, Need.CLOCK, Need.RETENTION)
async def _compacted(world: World) -> None:
    """A cursor whose events were removed is CURSOR_COMPACTED, with the oldest that is good."""
    handle = await world.accept(say("x"))
    await world.end(handle)
    await world.harness.advance_clock(world.server.event_retention + timedelta(hours=1))
    newer = await world.accept(say("y"))
    await world.end(newer)
    oldest = ""
    async with world.limit("events that are too old are removed"):
        while not oldest:
            subscription = world.client.subscribe_run_complete(cursor=handle.cursor)
            try:
                await subscription.next_item()
            except CursorCompacted as error:
                oldest = error.oldest_cursor or broken("there is no oldest_cursor")
            finally:
                await subscription.aclose()
    once_each(await told(world, oldest, 1), [newer])
