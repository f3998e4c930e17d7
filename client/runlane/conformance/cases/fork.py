"""The cases of R48: forks."""

from __future__ import annotations

from runlane.conformance.cases.accept import expect_rejection
from runlane.conformance.context import CaseContext, say
from runlane.conformance.rules import case, expect


@case(48)
async def _finished_turns(ctx: CaseContext) -> None:
    """A fork of a busy session has its finished turns, and both go on alone."""
    await ctx.wait_for_end(await ctx.accept(say("one")))
    await ctx.wait_for_end(await ctx.accept(say("two")))
    active = await ctx.accept_blocked()
    name = f"{ctx.session} fork"
    made = await ctx.client.fork_session(ctx.session, name)
    expect("origin", made.origin and (made.origin.session_id, made.origin.turn), (ctx.session, 2))
    copied = await ctx.list_messages(name)
    expect("turns of the fork", {message.turn for message in copied}, {1, 2})
    own = await ctx.accept(say("three"), session=name)
    await ctx.wait_for_end(own)
    await ctx.open_gate()
    await ctx.wait_for_end(active)
    source = await ctx.list_messages()
    expect("copied messages", [*copied], [one for one in source if one.turn <= 2])
    expect("turns of the source", {message.turn for message in source}, {1, 2, 3})
    mine = await ctx.list_messages(name)
    expect("messages before the turn of the fork", mine[: len(copied)], [*copied])
    expect("run of the last turn", {one.run_id for one in mine[len(copied) :]}, {own.run_id})


@case(48)
async def _whole_or_refused(ctx: CaseContext) -> None:
    """A repeated fork returns the first one, and a refused one leaves nothing."""
    await ctx.wait_for_end(await ctx.accept(say("one")))
    name = f"{ctx.session} fork"
    made = await ctx.client.fork_session(ctx.session, name, at_turn=1)
    again = await ctx.client.fork_session(ctx.session, name, at_turn=1)
    expect("created at", again.created_at, made.created_at)
    active = await ctx.accept_blocked()
    other = f"{ctx.session} other"
    fork = ctx.client.fork_session
    await expect_rejection(fork(ctx.session, other, at_turn=2), "TURN_NOT_FINISHED")
    await expect_rejection(fork(ctx.session, other, at_turn=3), "TURN_NOT_FOUND")
    await expect_rejection(fork(name, ctx.session), "SESSION_EXISTS")
    await ctx.open_gate()
    await ctx.wait_for_end(active)
    await ctx.client.delete_session(ctx.session)
    expect("messages of the fork", len(await ctx.list_messages(name)), 2)
    listed = [one.session_id async for one in ctx.client.list_sessions()]
    expect("sessions of refused forks", other in listed, False)
