"""The cases of R31 and R32: several agents on one server."""

from __future__ import annotations

from collections.abc import Awaitable

from runlane.conformance.context import CaseContext, reason_of, say, script
from runlane.conformance.rules import Need, case, expect, fail
from runlane.errors import RunlaneError
from runlane.types import AgentInfo, RunState, WhenBusy

S = RunState

ECHO, SCRIPTED = "echo", "scripted"


def find_echo(agents: tuple[AgentInfo, ...]) -> AgentInfo | None:
    """An agent that repeats its prompt, besides the default."""
    return next((it for it in agents if it.kind == ECHO and not it.is_default), None)


def find_limited(agents: tuple[AgentInfo, ...]) -> AgentInfo | None:
    """A scripted agent with one slot, besides the default."""
    wanted = (it for it in agents if it.kind == SCRIPTED and it.slots_limit == 1)
    return next((it for it in wanted if not it.is_default), None)


async def _echo(ctx: CaseContext) -> str:
    found = find_echo(await ctx.client.list_agents())
    return found.name if found else fail("the agent disappeared")


async def _limited(ctx: CaseContext) -> str:
    found = find_limited(await ctx.client.list_agents())
    return found.name if found else fail("the agent disappeared")


async def _reason(call: Awaitable[object]) -> str:
    """The reason with which a call is refused; empty if it succeeds."""
    try:
        await call
    except RunlaneError as error:
        return reason_of(error)
    return ""


@case(31)
async def _unknown(ctx: CaseContext) -> None:
    """An unknown agent is refused with AGENT_NOT_FOUND, and nothing is stored."""
    run_id = f"{ctx.session} r"
    found = await _reason(ctx.accept(say("a"), agent="no-such-agent", run_id=run_id))
    expect("reason of RunAccepted", found, "AGENT_NOT_FOUND")
    other = f"{ctx.session} other"
    found = await _reason(ctx.client.create_session(other, agent="no-such-agent"))
    expect("reason of CreateSession", found, "AGENT_NOT_FOUND")
    for session in (ctx.session, other):
        found = await _reason(ctx.client.get_session(session))
        expect("reason of GetSession", found, "SESSION_NOT_FOUND")
    expect("reason of GetRun", await _reason(ctx.client.get_run(run_id)), "RUN_NOT_FOUND")
    await ctx.expect_end(await ctx.accept(say("a"), run_id=run_id), S.COMPLETED, "a")


@case(31, Need.AGENTS)
async def _named(ctx: CaseContext) -> None:
    """A run is executed by the agent it names, else by that of its session, else by the default."""
    echo = await _echo(ctx)
    steps = script(say("a"))
    named = await ctx.accept(say("a"), agent=echo)
    expect("agent of the run", named.run.agent, echo)
    await ctx.expect_end(named, S.COMPLETED, steps)
    await ctx.expect_end(await ctx.accept(say("a")), S.COMPLETED, "a")
    other = f"{ctx.session} other"
    session = await ctx.client.create_session(other, agent=echo)
    expect("agent of the session", session.agent, echo)
    await ctx.expect_end(await ctx.accept(say("a"), session=other), S.COMPLETED, steps)
    (default,) = [it.name for it in await ctx.client.list_agents() if it.is_default]
    back = await ctx.accept(say("a"), session=other, agent=default)
    await ctx.expect_end(back, S.COMPLETED, "a")


@case(31, Need.AGENTS)
async def _compared(ctx: CaseContext) -> None:
    """The same run id with another agent is refused with RUN_ID_CONFLICT."""
    echo, run_id = await _echo(ctx), f"{ctx.session} r"
    first = await ctx.accept(say("a"), agent=echo, run_id=run_id)
    await ctx.wait_for_end(first)
    again = await ctx.accept(say("a"), agent=echo, run_id=run_id)
    expect("accept_seq of the repeated run", again.run.accept_seq, first.run.accept_seq)
    expect("reason", await _reason(ctx.accept(say("a"), run_id=run_id)), "RUN_ID_CONFLICT")


@case(31, Need.AGENTS)
async def _fold(ctx: CaseContext) -> None:
    """A FOLD run of another agent than the active run's has a turn of its own."""
    echo = await _echo(ctx)
    host = await ctx.accept(*ctx.gate_steps("g"), {"step": True}, say("!"))
    await ctx.wait_for_text(host, "<g>")
    other = await ctx.accept(say("b"), agent=echo, when_busy=WhenBusy.FOLD)
    await ctx.open_gate()
    await ctx.expect_end(host, S.COMPLETED, "<g>!")
    complete = await ctx.wait_for_end(other)
    expect("run that it joined", complete.folded_into, None)
    expect("text", complete.text, script(say("b")))


@case(32, Need.AGENTS)
async def _limit(ctx: CaseContext) -> None:
    """Runs of an agent without a free slot wait, are covered by a cancel, and delay no other."""
    limited = await _limited(ctx)
    sessions = [f"{ctx.session} {n}" for n in range(3)]
    active = await ctx.accept_blocked(session=sessions[0], agent=limited)
    waiting = await ctx.accept(say("waiting"), session=sessions[1], agent=limited)
    cancelled = await ctx.accept(say("cancelled"), session=sessions[2], agent=limited)
    await ctx.expect_end(await ctx.accept(say("other")), S.COMPLETED, "other")
    expect("state", [await ctx.state(it) for it in (waiting, cancelled)], [S.ACCEPTED, S.ACCEPTED])
    receipt = await ctx.client.cancel(sessions[2])
    expect("covered states", [it.state_when_cancelled for it in receipt.cancelled], [S.ACCEPTED])
    await ctx.expect_end(cancelled, S.CANCELLED, "")
    await ctx.open_gate()
    await ctx.expect_end(active, S.COMPLETED)
    await ctx.expect_end(waiting, S.COMPLETED, "waiting")


@case(32, Need.AGENTS)
async def _handoff(ctx: CaseContext) -> None:
    """A lane does not pass its slot to a run of an agent that has none."""
    limited = await _limited(ctx)
    other = f"{ctx.session} other"
    active = await ctx.accept_blocked(session=other, agent=limited)
    first = await ctx.accept_blocked("h")
    behind = await ctx.accept(say("behind"), agent=limited)
    await ctx.open_gate("h")
    await ctx.expect_end(first, S.COMPLETED)
    await ctx.expect_end(await ctx.accept(say("c"), session=f"{other} 2"), S.COMPLETED, "c")
    await ctx.expect_state(behind, S.ACCEPTED)
    await ctx.open_gate()
    await ctx.expect_end(active, S.COMPLETED)
    await ctx.expect_end(behind, S.COMPLETED, "behind")
