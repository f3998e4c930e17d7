"""The cases of R50 to R52: the stream of a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runlane.conformance.cases.answer import ask, requested
from runlane.conformance.context import CaseContext, say
from runlane.conformance.rules import Need, case, expect, expect_that
from runlane.session_stream import (
    SessionChanged,
    SessionEvent,
    SessionRunEvent,
    SessionSnapshot,
    SessionStream,
)
from runlane.types import RunComplete, Started, WhenBusy


async def read_until(
    ctx: CaseContext, stream: SessionStream, is_last: Callable[[SessionEvent], bool]
) -> Sequence[SessionEvent]:
    """Reads a stream up to an event."""
    seen: list[SessionEvent] = []
    async with ctx.time_limit("an event of the stream of the session"):
        async for event in stream:
            seen.append(event)
            if is_last(event):
                break
    return seen


def ends(*run_ids: str) -> Callable[[SessionEvent], bool]:
    """Whether the last of these runs has ended."""
    left = set(run_ids)

    def is_last(event: SessionEvent) -> bool:
        match event.body:
            case SessionRunEvent(run_id, of_run) if isinstance(of_run.body, RunComplete):
                left.discard(run_id)
        return not left

    return is_last


def is_snapshot(event: SessionEvent) -> bool:
    """Whether an event is a snapshot."""
    return isinstance(event.body, SessionSnapshot)


def events_of(seen: Sequence[SessionEvent]) -> list[tuple[str, int]]:
    """Returns run id and index of each event of a run."""
    return [
        (event.body.run_id, event.body.event.index)
        for event in seen
        if isinstance(event.body, SessionRunEvent)
    ]


@case(50)
async def _snapshot_and_tail(ctx: CaseContext) -> None:
    """A stream begins with a snapshot, and goes on after exactly its position."""
    active = await ctx.accept(*ctx.gate_steps("g"), say("more"))
    await ctx.wait_for_text(active, "<g>")
    waiting = await ctx.accept(say("next"), metadata={"k": "v"})
    async with ctx.client.subscribe_session(ctx.session) as stream:
        [first] = await read_until(ctx, stream, is_snapshot)
        snapshot = first.body
        expect_that("the stream begins with a snapshot", true=is_snapshot(first))
        if not isinstance(snapshot, SessionSnapshot):
            return
        expect("session", snapshot.session and snapshot.session.active_run_id, active.run_id)
        expect("active run", snapshot.active_run and snapshot.active_run.run_id, active.run_id)
        expect("queue", [dict(run.metadata) for run in snapshot.queue], [{"k": "v"}])
        await ctx.open_gate()
        tail = events_of(await read_until(ctx, stream, ends(active.run_id, waiting.run_id)))
    known = [event.index for event in snapshot.output]
    own = [index for run_id, index in tail if run_id == active.run_id]
    every = [event.index async for event in active.events()]
    expect("output in the snapshot and events after it", known + own, every[1:])
    expect("events of the next run", [n for run, n in tail if run == waiting.run_id], [2, 3, 4])


@case(50)
async def _questions(ctx: CaseContext) -> None:
    """A snapshot has the open input requests."""
    handle = await ctx.accept(ask())
    [request] = await requested(ctx, handle)
    async with ctx.client.subscribe_session(ctx.session) as stream:
        [first] = await read_until(ctx, stream, is_snapshot)
        if isinstance(first.body, SessionSnapshot):
            found = [each.input_request_id for each in first.body.input_requests]
            expect("open requests", found, [request.input_request_id])
    await ctx.client.cancel(ctx.session)


@case(50)
async def _created_and_deleted(ctx: CaseContext) -> None:
    """A stream reports that its session is created, and deleted."""
    async with ctx.client.subscribe_session(ctx.session) as stream:
        [first] = await read_until(ctx, stream, is_snapshot)
        if isinstance(first.body, SessionSnapshot):
            expect("session before it is created", first.body.session, None)
        handle = await ctx.accept(say("a"))
        seen = await read_until(ctx, stream, ends(handle.run_id))
        expect("events", events_of(seen), [(handle.run_id, index) for index in range(1, 5)])
        await ctx.client.delete_session(ctx.session)
        await read_until(
            ctx,
            stream,
            lambda event: isinstance(event.body, SessionChanged) and event.body.session is None,
        )


@case(51)
async def _resumes(ctx: CaseContext) -> None:
    """A stream resumes after each of its cursors, exactly once and in order."""
    async with ctx.client.subscribe_session(ctx.session) as stream:
        await read_until(ctx, stream, is_snapshot)
        handles = [await ctx.accept(say("a"), say("b")), await ctx.accept(say("c"))]
        last = ends(*(handle.run_id for handle in handles))
        seen = await read_until(ctx, stream, last)
    whole = events_of(seen)
    for number, event in enumerate(seen):
        rest = events_of(seen[number + 1 :])
        if not rest:
            break
        cursors = {ctx.session: event.cursor}
        async with ctx.client.subscribe_session(ctx.session, cursors=cursors) as stream:
            found = events_of(await read_until(ctx, stream, ends(handles[1].run_id)))
        expect(f"events after the cursor of message {number} of {len(whole)}", found, rest)


@case(51, Need.RESTARTS, Need.DURABLE)
async def _after_a_crash(ctx: CaseContext) -> None:
    """A stream resumes after a crash of the server."""
    async with ctx.client.subscribe_session(ctx.session) as stream:
        await read_until(ctx, stream, is_snapshot)
        first = await ctx.accept(say("a"))
        before = await read_until(ctx, stream, ends(first.run_id))
        await ctx.crash()
        second = await ctx.accept(say("b"))
        after = await read_until(ctx, stream, ends(second.run_id))
    wanted = [(handle.run_id, index) for handle in (first, second) for index in range(1, 5)]
    expect("events before and after the crash", events_of([*before, *after]), wanted)


@case(52)
async def _order_of_the_lane(ctx: CaseContext) -> None:
    """Events of a run come by index, and its end before the start of the next run."""
    async with ctx.client.subscribe_session(ctx.session) as stream:
        await read_until(ctx, stream, is_snapshot)
        active = await ctx.accept(*ctx.gate_steps("g"), say("1"))
        queued = [await ctx.accept(say(f"{n}"), say("more")) for n in range(3)]
        first = await ctx.accept(say("x"), when_busy=WhenBusy.INTERRUPT)
        handles = [active, *queued, first]
        seen = await read_until(ctx, stream, ends(*(handle.run_id for handle in handles)))
    indexes: dict[str, int] = {}
    running = ""
    order: list[str] = []
    for event in seen:
        if not isinstance(event.body, SessionRunEvent):
            continue
        run_id, of_run = event.body.run_id, event.body.event
        expect(f"next index of run {run_id}", of_run.index, indexes.get(run_id, 0) + 1)
        indexes[run_id] = of_run.index
        if isinstance(of_run.body, Started):
            expect(f"active run when {run_id} starts", running, "")
            running = run_id
            order.append(run_id)
        elif isinstance(of_run.body, RunComplete) and run_id == running:
            running = ""
    ids = [active.run_id, first.run_id, *(handle.run_id for handle in queued)]
    expect("order of starts", order, ids)
