"""The cases of R40 to R45: input from people."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from runlane.conformance.context import CaseContext, Step, covered_runs, say
from runlane.conformance.rules import Need, case, expect, expect_that
from runlane.errors import AnswerInvalid, InputClosed, InputNotFound
from runlane.inputs import (
    InputAnswered,
    InputExpired,
    InputRequest,
    InputRequested,
    InputState,
    InputWithdrawn,
)
from runlane.run_handle import RunHandle
from runlane.types import RunState

S = RunState


def ask(text: str = "well?", *, leave: bool = False, **options: Any) -> Step:
    """Returns a step that asks people, and outputs the answer."""
    return {"ask": {"text": text, **options}, "leave": leave}


async def requested(ctx: CaseContext, handle: RunHandle, count: int = 1) -> list[InputRequest]:
    """Waits until a run has asked that many questions."""
    found: dict[str, InputRequest] = {}
    async with ctx.time_limit(f"run {handle.run_id} to ask {count} questions"):
        async for event in handle.events():
            if isinstance(event.body, InputRequested):
                asked = event.body.input_request
                found[asked.input_request_id] = asked
            if len(found) == count:
                break
    expect("number of questions", len(found), count)
    return list(found.values())


async def stored(ctx: CaseContext, handle: RunHandle) -> Sequence[InputRequest]:
    """Lists the input requests of a run, the first one asked first."""
    pager = ctx.client.list_input_requests(run_id=handle.run_id)
    return [each async for each in pager][::-1]


async def bodies(handle: RunHandle) -> list[object]:
    """Returns the events of an ended run."""
    return [event.body async for event in handle.events()]


@case(40)
async def _waits(ctx: CaseContext) -> None:
    """A run that asks waits as INPUT_REQUIRED, and its session with it."""
    handle = await ctx.accept(say("a"), ask(), say("b"))
    [request] = await requested(ctx, handle)
    expect("state", await ctx.state(handle), S.INPUT_REQUIRED)
    [listed] = await stored(ctx, handle)
    expect("the listed request", [listed.text, listed.state], ["well?", InputState.OPEN])
    behind = await ctx.accept(say("next"))
    expect("state of the next run", await ctx.state(behind), S.QUEUED)
    await ctx.expect_busy(busy=True)
    await ctx.client.answer_input(request, "!")
    await ctx.expect_end(handle, S.COMPLETED, "a!b")
    await ctx.expect_end(behind, S.COMPLETED, "next")


@case(40)
async def _no_slot(ctx: CaseContext) -> None:
    """Runs that wait for input keep no slot from others."""
    limit = ctx.server.max_active_runs
    count = min(limit, 20) + 1
    waiting = [await ctx.accept(ask(), session=f"{ctx.session} {n}") for n in range(count)]
    for handle in waiting:
        await requested(ctx, handle)
    await ctx.expect_end(await ctx.accept(say("done")), S.COMPLETED, "done")
    for n in range(count):
        await ctx.client.cancel(f"{ctx.session} {n}")


@case(41)
async def _first_wins(ctx: CaseContext) -> None:
    """The first answer counts, every other one gets it back."""
    handle = await ctx.accept(ask())
    [request] = await requested(ctx, handle)
    answers = [
        ctx.client.answer_input(request, str(n), answer_id=f"{ctx.session}-{n}") for n in range(5)
    ]
    receipts = await asyncio.gather(*answers)
    expect("number of accepted answers", sum(each.accepted for each in receipts), 1)
    ids = {each.input_request.answer.answer_id for each in receipts if each.input_request.answer}
    expect("number of answers that count", len(ids), 1)
    [answer_id] = ids
    again = await ctx.client.answer_input(request, "repeated", answer_id=answer_id)
    expect_that("a repeated answer id is accepted", true=again.accepted)
    end = await ctx.wait_for_end(handle)
    expect("text", f"{ctx.session}-{end.text}", answer_id)
    answered = [body for body in await bodies(handle) if isinstance(body, InputAnswered)]
    expect("events", answered, [InputAnswered(request.input_request_id)])


@case(41)
async def _bad_answers(ctx: CaseContext) -> None:
    """An answer that does not match is refused, and the request stays open."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    handle = await ctx.accept(ask(schema=schema))
    [request] = await requested(ctx, handle)
    try:
        await ctx.client.answer_input(request, {"n": "no number"})
    except AnswerInvalid as error:
        expect_that("the field is named", true="n" in error.violations[0].field)
    else:
        expect("an answer that does not match", "accepted", "ANSWER_INVALID")
    [listed] = await stored(ctx, handle)
    expect("state of the request", listed.state, InputState.OPEN)
    await ctx.client.answer_input(request, {"n": 3})
    await ctx.expect_end(handle, S.COMPLETED, '{"n": 3}')


@case(42)
async def _withdrawn(ctx: CaseContext) -> None:
    """A cancel withdraws open requests, and later answers are refused."""
    handle = await ctx.accept(say("a"), ask())
    [request] = await requested(ctx, handle)
    receipt = await ctx.client.cancel(ctx.session)
    expect("receipt", covered_runs(receipt), [(handle.run_id, S.INPUT_REQUIRED)])
    await _expect_closed(ctx, request)
    await ctx.expect_end(handle, S.CANCELLED, "a")
    await _expect_closed(ctx, request)
    withdrawn = [body for body in await bodies(handle) if isinstance(body, InputWithdrawn)]
    expect("events", withdrawn, [InputWithdrawn(request.input_request_id)])


@case(42)
async def _withdrawn_without_agent(ctx: CaseContext) -> None:
    """The cancel of a run whose agent has left keeps its output."""
    handle = await ctx.accept(say("a"), ask(leave=True), say("b"))
    [request] = await requested(ctx, handle)
    await ctx.client.cancel(ctx.session)
    await ctx.expect_end(handle, S.CANCELLED, "a")
    await _expect_closed(ctx, request)


async def _expect_closed(ctx: CaseContext, request: InputRequest) -> None:
    try:
        await ctx.client.answer_input(request, "late")
    except InputClosed:
        return
    expect("an answer after the end", "accepted", "INPUT_CLOSED")


@case(42)
async def _unknown(ctx: CaseContext) -> None:
    """An answer to an unknown request is refused."""
    handle = await ctx.accept(ask())
    [request] = await requested(ctx, handle)
    unknown = replace(request, input_request_id=f"{ctx.session}-none")
    try:
        await ctx.client.answer_input(unknown, "x")
    except InputNotFound:
        pass
    else:
        expect("an answer to an unknown request", "accepted", "INPUT_NOT_FOUND")
    await ctx.client.cancel(ctx.session)


@case(43, Need.STORE_CLOCK)
async def _expires(ctx: CaseContext) -> None:
    """An expired request gets its default answer, or fails the run."""
    with_default = await ctx.accept(ask(timeout=0.1, default="default"))
    without = await ctx.accept(ask(timeout=0.1), session=f"{ctx.session} b")
    end = await ctx.wait_for_end(with_default)
    expect("text", [end.state, end.text], [S.COMPLETED, "default"])
    failed = await ctx.wait_for_end(without)
    expect("error", failed.error and failed.error.reason, "INPUT_EXPIRED")
    for handle in (with_default, without):
        expired = [body for body in await bodies(handle) if isinstance(body, InputExpired)]
        expect("number of events", len(expired), 1)


@case(44, Need.DURABLE, Need.RESTARTS)
async def _survives(ctx: CaseContext) -> None:
    """A run whose agent has left survives a crash, and consumes no attempt."""
    handle = await ctx.accept(say("a"), ask(leave=True), say("b"))
    [request] = await requested(ctx, handle)
    await ctx.crash()
    expect("state after the crash", await ctx.state(handle), S.INPUT_REQUIRED)
    await ctx.client.answer_input(request, "!")
    end = await ctx.wait_for_end(handle)
    expect("text and attempt", [end.text, end.attempt], ["a!b", 1])
    await ctx.expect_turn(end)


@case(44, Need.DURABLE, Need.RESTARTS)
async def _asked_once(ctx: CaseContext) -> None:
    """A later attempt gets the stored answer, and nobody is asked twice."""
    steps = (ask("one?", key="one"), say("<1>"), ask("two?", key="two"))
    handle = await ctx.accept(*steps, max_attempts=2)
    [first] = await requested(ctx, handle)
    await ctx.client.answer_input(first, "A")
    [_, second] = await requested(ctx, handle, 2)
    await ctx.crash()
    async with ctx.time_limit("the second attempt to ask again"):
        while (await ctx.client.get_run(handle.run_id)).attempt < 2:
            await asyncio.sleep(0.05)
    await ctx.client.answer_input(second, "B")
    end = await ctx.wait_for_end(handle)
    expect("text and attempt", [end.text, end.attempt], ["A<1>B", 2])
    expect("number of requests", len(await stored(ctx, handle)), 2)


@case(45)
async def _late_subscriber(ctx: CaseContext) -> None:
    """A subscriber learns of every open request, however late it comes."""
    handle = await ctx.accept(ask("one?"), ask("two?"))
    [first] = await requested(ctx, handle)
    await ctx.client.answer_input(first, "1")
    [_, second] = await requested(ctx, handle, 2)
    open_requests = ctx.client.list_input_requests(session_id=ctx.session, states=[InputState.OPEN])
    listed = [each.input_request_id async for each in open_requests]
    expect("open requests", listed, [second.input_request_id])
    await ctx.client.cancel(ctx.session)
    await ctx.wait_for_end(handle)
    told = [
        type(body).__name__
        for body in await bodies(handle)
        if isinstance(body, InputRequested | InputAnswered | InputWithdrawn)
    ]
    wanted = ["InputRequested", "InputAnswered", "InputRequested", "InputWithdrawn"]
    expect("events", told, wanted)
