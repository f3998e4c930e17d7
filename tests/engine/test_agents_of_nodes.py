"""Nodes with different agents over one store: a run starts where its agent has room (R32)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.core.limits import Limits
from runlane_server.core.model import RunState
from runlane_server.engine.agent_table import AgentTable, DeclaredAgent
from runlane_server.engine.executor import NodeSettings
from support.node import Node, running
from support.postgres import postgres_store
from support.staging import SECONDS, say, script, wait

S = RunState


@asynccontextmanager
async def a_node(url: str, **slots: int | None) -> AsyncIterator[tuple[Node, ScriptedAgent]]:
    """A node with scripted agents of these names, the last of which is returned too."""
    agents = {name: ScriptedAgent() for name in slots}
    declared = [DeclaredAgent(name, agents[name], slots=most) for name, most in slots.items()]
    async with (
        postgres_store(url) as store,
        running(
            store,
            agent=AgentTable(declared),
            limits=Limits(cancel_grace=SECONDS),
            node=NodeSettings(lease=60.0),
        ) as node,
    ):
        yield node, [*agents.values()][-1]


async def test_r32_a_run_waits_for_the_node_that_executes_its_agent(postgres_url: str) -> None:
    async with a_node(postgres_url, default=None, coder=0) as (front, _):
        first = await front.accept("a", script(say("first")), agent="coder")
        assert (await front.end((await front.queue("b", "own")).run_id)).text == "own"
        assert await front.state(first.run.run_id) is S.ACCEPTED
        async with a_node(postgres_url, default=None, coder=1):
            assert (await front.end(first.run.run_id)).text == "first"
            second = await front.accept("a", script(say("second")), agent="coder")
            assert (await front.end(second.run.run_id)).text == "second"


async def test_r32_the_next_run_of_a_session_may_start_on_another_node(postgres_url: str) -> None:
    async with (
        a_node(postgres_url, default=None, coder=0) as (front, _),
        a_node(postgres_url, default=0, coder=1) as (back, coder),
    ):
        host = await front.accept("a", script(wait("g")), agent="coder")
        await coder.latches.reached("g")
        runs = [
            await front.accept("b", script(say(f"{n}")), agent="coder" if n % 2 else "default")
            for n in range(4)
        ]
        assert (await front.end(runs[0].run.run_id)).text == "0"
        # The agent of the next run is at its limit on the only node that executes it.
        assert await front.state(runs[1].run.run_id) is S.ACCEPTED
        assert back.coordinator.load.slots_in_use == 1
        coder.latches.open("g")
        assert (await front.end(host.run.run_id)).state is S.COMPLETED
        assert [(await front.end(it.run.run_id)).text for it in runs] == ["0", "1", "2", "3"]
