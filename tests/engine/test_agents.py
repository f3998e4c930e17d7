"""Several agents on one node: which runs a run, and that none delays another (R31, R32)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.core.errors import AgentNotFound, PermissionDenied, RunDeleted, RunIdConflict
from runlane_server.core.limits import Limits
from runlane_server.core.model import (
    Prompt,
    RunRequest,
    RunState,
    SessionKey,
    TextDelta,
    WhenBusy,
)
from runlane_server.engine.agent_table import AgentTable, DeclaredAgent
from runlane_server.engine.editing import SessionChange
from runlane_server.store.base import Store
from support.node import Node, running
from support.staging import SECONDS, say, script, wait

S = RunState

SLOW = Limits(ready_timeout=SECONDS, cancel_grace=SECONDS)


class Named:
    """Answers with its name, as soon as it is ready; its first starts may fail."""

    def __init__(self, name: str, *, failures: int = 0, ready: bool = True) -> None:
        self.name = name
        self.ready = asyncio.Event()
        self.failures = failures
        self.is_closed = False
        if ready:
            self.ready.set()

    async def start(self) -> None:
        await self.ready.wait()
        if self.failures:
            self.failures -= 1
            raise RuntimeError("not yet")

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        yield TextDelta(self.name)

    async def close(self) -> None:
        self.is_closed = True


def table(*agents: Named, **slots: int) -> AgentTable:
    return AgentTable([DeclaredAgent(it.name, it, slots=slots.get(it.name)) for it in agents])


def scripted(**slots: int | None) -> AgentTable:
    """Scripted agents under several names."""
    return AgentTable(
        [DeclaredAgent(name, ScriptedAgent(), slots=most) for name, most in slots.items()]
    )


async def answer(node: Node, session_id: str, agent: str = "") -> str:
    accepted = await node.accept(session_id, "hello", agent=agent)
    return (await node.end(accepted.run.run_id)).text


async def test_r31_a_run_is_executed_by_the_agent_it_names_else_by_the_default(
    store: Store,
) -> None:
    async with running(store, agent=table(Named("a"), Named("default"), Named("c"))) as node:
        assert [await answer(node, "s", name) for name in ("", "a", "c", "default")] == [
            "default",
            "a",
            "c",
            "default",
        ]


async def test_r31_without_an_agent_called_default_the_first_one_is_the_default(
    store: Store,
) -> None:
    async with running(store, agent=table(Named("b"), Named("a"))) as node:
        assert await answer(node, "s") == "b"
        assert [it.name for it in node.coordinator.agents if it.is_default] == ["b"]


async def test_r31_the_agent_of_the_session_comes_before_the_default(store: Store) -> None:
    async with running(store, agent=table(Named("default"), Named("b"), Named("c"))) as node:
        session = await node.coordinator.sessions.create("s", agent="b")
        assert session.agent == "b"
        assert await answer(node, "s") == "b"
        assert await answer(node, "s", "c") == "c"
        # It is kept over all transitions of the lane.
        assert await answer(node, "s") == "b"


async def test_r31_an_unknown_agent_is_refused_and_nothing_is_stored(store: Store) -> None:
    async with running(store, agent=table(Named("a"))) as node:
        with pytest.raises(AgentNotFound, match="no agent 'b'"):
            await node.accept("s", "x", agent="b", run_id="r")
        assert await node.coordinator.store.get_session(_key("s")) is None
        assert await node.coordinator.wait_idle(SECONDS)
        assert not node.coordinator.is_busy()
        with pytest.raises(AgentNotFound):
            await node.coordinator.sessions.create("t", agent="b")
        assert await node.coordinator.store.get_session(_key("t")) is None
        # The id of the refused run is free.
        assert (await node.accept("s", "x", run_id="r")).run.agent == "a"


async def test_r31_the_agent_of_a_session_may_be_gone(store: Store) -> None:
    async with running(store, agent=table(Named("a"), Named("b"))) as node:
        await node.coordinator.sessions.create("s", agent="b")
    async with running(store, agent=table(Named("a"))) as node:
        with pytest.raises(AgentNotFound, match="no agent 'b'"):
            await node.accept("s", "x")
        assert await answer(node, "s", "a") == "a"


async def test_r31_the_agent_is_part_of_what_a_repeated_request_is_compared_with(
    store: Store,
) -> None:
    async with running(store, agent=table(Named("a"), Named("b"))) as node:
        first = await node.accept("s", "x", run_id="r", agent="b")
        await node.end("r")
        again = await node.accept("s", "x", run_id="r", agent="b")
        assert (again.run.run_id, again.run.accept_seq) == ("r", first.run.accept_seq)
        for other in ("a", ""):
            with pytest.raises(RunIdConflict):
                await node.accept("s", "x", run_id="r", agent=other)
        await node.coordinator.sessions.delete("s")
        with pytest.raises(RunDeleted):
            await node.accept("s", "x", run_id="r", agent="b")
        with pytest.raises(RunIdConflict):
            await node.accept("s", "x", run_id="r", agent="a")


async def test_r31_a_caller_may_use_only_the_agents_of_its_own(store: Store) -> None:
    async with running(store, agent=table(Named("a"), Named("b"))) as node:
        await node.coordinator.sessions.create("of-b", agent="b")

        async def accept(session_id: str, agent: str) -> str:
            with node.coordinator.begin_accepted(session_id) as accepted:
                acceptance = await node.coordinator.run_accepted(
                    accepted,
                    RunRequest(accepted.run_id, Prompt("x"), agent=agent),
                    allow_missing=True,
                    allowed_agents=frozenset({"a"}),
                )
            return acceptance.run.agent

        assert await accept("s", "") == "a"
        assert await accept("of-b", "a") == "a"
        for session_id, agent in (("s", "b"), ("s", "nothing"), ("of-b", "")):
            with pytest.raises(PermissionDenied, match="may not use the agent"):
                await accept(session_id, agent)
        with pytest.raises(PermissionDenied):
            await node.coordinator.sessions.create("t", agent="b", allowed_agents=frozenset("a"))


async def test_r31_a_session_gets_another_agent_while_its_lane_is_in_memory(store: Store) -> None:
    async with running(store, agent=table(Named("a"), Named("b"))) as node:
        await node.coordinator.sessions.create("s", agent="a")
        assert await answer(node, "s") == "a"

        async def accept(agent: str, *, reserved: bool) -> str:
            change = SessionChange(agent=agent)
            if not reserved:
                await node.coordinator.sessions.update("s", change)
            with node.coordinator.begin_accepted("s") as accepted:
                if reserved:  # the lane stays in its mailbox
                    await node.coordinator.sessions.update("s", change)
                acceptance = await node.coordinator.run_accepted(
                    accepted,
                    RunRequest(accepted.run_id, Prompt("x")),
                    allowed_agents=frozenset({agent}),
                )
            await node.end(acceptance.run.run_id)
            await node.coordinator._lanes.wait_settled()
            return acceptance.run.agent

        # A lane from before the change would be refused: the caller may not use its agent.
        assert await accept("b", reserved=True) == "b"
        assert await accept("a", reserved=False) == "a"
        await node.coordinator.sessions.update("s", SessionChange(agent="b"))
        assert await answer(node, "s") == "b"


async def test_r31_a_caller_gives_a_session_only_an_agent_of_its_own(store: Store) -> None:
    async with running(store, agent=table(Named("a"), Named("b"))) as node:
        await node.coordinator.sessions.create("s", agent="a")
        with pytest.raises(PermissionDenied, match="may not use the agent"):
            await node.coordinator.sessions.update(
                "s", SessionChange(title="new", agent="b"), allowed_agents=frozenset({"a"})
            )
        session = await store.get_session(SessionKey(DEFAULT_TENANT, "s"))
        assert session is not None
        assert (session.title, session.agent) == ("", "a")


async def test_r26_a_fold_joins_a_turn_of_the_same_agent_only(store: Store) -> None:
    async with running(store, agent=scripted(default=None, b=None)) as node:
        agent = node.coordinator._agents.agent_of("default")
        assert isinstance(agent, ScriptedAgent)
        host = await node.accept("s", script(wait("g"), {"step": True}, say("host")))
        await agent.latches.reached("g")
        own = await node.accept("s", "mine", when_busy=WhenBusy.FOLD)
        other = await node.accept("s", script(say("other")), when_busy=WhenBusy.FOLD, agent="b")
        agent.latches.open("g")
        assert (await node.end(own.run.run_id)).folded_into == host.run.run_id
        ended = await node.end(other.run.run_id)
        assert (ended.folded_into, ended.text) == ("", "other")


async def test_r32_runs_of_an_agent_that_is_not_ready_wait_and_delay_no_other(
    store: Store,
) -> None:
    late = Named("late", ready=False)
    async with running(store, agent=table(Named("a"), late), limits=SLOW) as node:
        waiting = [(await node.accept(f"w{n}", "x", agent="late")).run.run_id for n in range(5)]
        cancelled = (await node.accept("w", "x", agent="late")).run.run_id
        assert [await answer(node, f"s{n}") for n in range(5)] == ["a"] * 5
        assert {await node.state(run_id) for run_id in waiting} == {S.ACCEPTED}
        receipt = await node.coordinator.cancel("w")
        assert [run.state for run in receipt.cancelled] == [S.ACCEPTED]
        assert (await node.end(cancelled)).attempt == 0
        late.ready.set()
        assert [(await node.end(run_id)).text for run_id in waiting] == ["late"] * 5


async def test_r32_only_the_runs_of_an_agent_that_fails_to_start_fail(store: Store) -> None:
    broken, slow = Named("broken", failures=1, ready=False), Named("slow", ready=False)
    async with running(store, agent=table(slow, broken), limits=SLOW) as node:
        kept = (await node.accept("kept", "x", agent="slow")).run.run_id
        failed = (await node.accept("failed", "x", agent="broken")).run.run_id
        behind = (await node.accept("failed", "x", agent="slow")).run.run_id
        broken.ready.set()
        error = (await node.end(failed)).error
        assert error is not None
        assert error.message == "the agent 'broken' did not get ready: RuntimeError: not yet"
        assert {await node.state(kept), await node.state(behind)} == {S.ACCEPTED}
        slow.ready.set()
        assert (await node.end(behind)).text == "slow"
        assert (await node.end(kept)).text == "slow"
        # It is tried again by itself.
        assert await answer(node, "s", "broken") == "broken"


async def test_r32_an_agent_at_its_limit_delays_no_other(store: Store) -> None:
    async with running(store, agent=scripted(default=None, one=1)) as node:
        agent = node.coordinator._agents.agent_of("one")
        assert isinstance(agent, ScriptedAgent)
        first = await node.accept("a", script(wait("g")), agent="one")
        await agent.latches.reached("g")
        second = await node.accept("b", script(say("second")), agent="one")
        assert (await node.end((await node.queue("c", "other")).run_id)).text == "other"
        assert await node.state(second.run.run_id) is S.ACCEPTED
        states = {it.name: (it.slots_in_use, it.slots_limit) for it in node.coordinator.agents}
        assert states == {"default": (0, None), "one": (1, 1)}
        agent.latches.open("g")
        assert (await node.end(first.run.run_id)).state is S.COMPLETED
        assert (await node.end(second.run.run_id)).text == "second"


async def test_r32_the_next_run_of_a_lane_may_be_for_another_agent(store: Store) -> None:
    """The lane gives its slot back if the agent of its next run has none."""
    async with running(store, agent=scripted(default=None, one=1)) as node:
        agent = node.coordinator._agents.agent_of("one")
        assert isinstance(agent, ScriptedAgent)
        holder = await node.accept("a", script(wait("g")), agent="one")
        await agent.latches.reached("g")
        before = await node.queue("b", "before")
        behind = await node.accept("b", script(say("behind")), agent="one")
        last = await node.accept("b", script(say("last")))
        assert (await node.end(before.run_id)).text == "before"
        assert await node.state(behind.run.run_id) is S.ACCEPTED
        assert node.coordinator.load.slots_in_use == 1
        # With the head of the lane gone, the next run needs another agent.
        await node.coordinator.cancel(run_id=behind.run.run_id)
        assert (await node.end(last.run.run_id)).text == "last"
        agent.latches.open("g")
        await node.end(holder.run.run_id)


async def test_r32_a_node_with_no_slots_for_an_agent_accepts_its_runs(store: Store) -> None:
    never = Named("never", ready=False)
    async with running(store, agent=table(Named("a"), never, never=0)) as node:
        waiting = (await node.accept("s", "x", agent="never")).run.run_id
        assert await answer(node, "t") == "a"
        assert await node.state(waiting) is S.ACCEPTED
        # An agent that executes nothing here is not started.
        assert node.coordinator.are_agents_ready
        receipt = await node.coordinator.cancel("s")
        assert [run.run_id for run in receipt.cancelled] == [waiting]


async def test_r32_a_run_of_an_agent_that_is_no_longer_declared_waits(store: Store) -> None:
    async with running(store, agent=table(Named("a"), Named("gone", ready=False))) as node:
        left = (await node.accept("s", "x", agent="gone")).run.run_id
        kept = (await node.accept("t", "x", agent="gone")).run.run_id
    async with running(store, agent=table(Named("a"))) as node:
        assert await answer(node, "u") == "a"
        assert await node.state(left) is S.ACCEPTED
        receipt = await node.coordinator.cancel("s")
        assert [run.state for run in receipt.cancelled] == [S.ACCEPTED]
    async with running(store, agent=table(Named("a"), Named("gone"))) as node:
        assert (await node.end(kept)).text == "gone"


async def test_all_agents_are_closed_even_if_one_fails() -> None:
    class Broken(Named):
        async def close(self) -> None:
            raise RuntimeError("broken")

    good = Named("b")
    await AgentTable([DeclaredAgent("a", Broken("a")), DeclaredAgent("b", good)]).close(SECONDS)
    assert good.is_closed


def _key(session_id: str) -> SessionKey:
    return SessionKey(DEFAULT_TENANT, session_id)
