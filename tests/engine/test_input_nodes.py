"""Input over several nodes on one store: any node takes an answer, a lost node loses none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.test_input import answer_of, asks_once, leaves
from engine.test_nodes import LONG, SHORT, cut_off
from runlane_server.agents.base import Turn
from runlane_server.agents.functions import FunctionAgent, resumable
from runlane_server.cluster import membership
from runlane_server.core.errors import InputClosed
from runlane_server.core.input import InputRequest, InputState
from runlane_server.core.limits import Limits
from runlane_server.core.model import RunState, SessionKey
from runlane_server.core.transition import Transition
from runlane_server.engine.agent_table import AgentTable, DeclaredAgent
from runlane_server.engine.executor import NodeSettings
from runlane_server.store.postgres.cluster import PostgresCluster
from support.node import Node, running
from support.postgres import postgres_store
from support.staging import SECONDS

S = RunState


@asynccontextmanager
async def a_node(
    url: str,
    function: Callable[[Any], Any],
    settings: NodeSettings = LONG,
    *,
    max_active: int = 256,
) -> AsyncIterator[Node]:
    limits = Limits(cancel_grace=SECONDS, max_active_runs=max_active)
    agent = FunctionAgent(function)
    async with (
        postgres_store(url) as store,
        running(store, limits=limits, node=settings, agent=agent) as node,
    ):
        yield node


async def opened(node: Node, run_id: str) -> InputRequest:
    """Waits until a run has an open request of any node."""
    async with asyncio.timeout(SECONDS):
        while True:
            page = await node.store.list_inputs(
                "default", run_id=run_id, states=[InputState.OPEN], limit=2
            )
            if page.items:
                return page.items[0]
            await asyncio.sleep(0.01)


async def give(node: Node, request: InputRequest, value_json: str = '"A"') -> bool:
    inputs = node.coordinator.inputs
    _, accepted = await inputs.answer("default", request.input_request_id, answer_of(value_json))
    return accepted


async def test_r41_an_answer_given_to_another_node_reaches_the_agent(postgres_url: str) -> None:
    async with (
        a_node(postgres_url, asks_once) as a,
        a_node(postgres_url, asks_once, max_active=0) as b,
    ):
        run = (await a.accept("s", "x")).run
        request = await opened(b, run.run_id)
        assert await give(b, request)
        assert (await a.end(run.run_id)).text == "before A after"


async def test_r41_of_the_answers_given_to_two_nodes_one_wins(postgres_url: str) -> None:
    async with (
        a_node(postgres_url, asks_once) as a,
        a_node(postgres_url, asks_once, max_active=0) as b,
    ):
        for n in range(10):
            run = (await a.accept(f"s{n}", "x")).run
            request = await opened(b, run.run_id)
            won = await asyncio.gather(give(a, request, '"a"'), give(b, request, '"b"'))
            assert sorted(won) == [False, True]
            text = "before a after" if won[0] else "before b after"
            assert (await a.end(run.run_id)).text == text


async def test_r42_a_cancel_sent_to_another_node_withdraws(postgres_url: str) -> None:
    async with (
        a_node(postgres_url, asks_once) as a,
        a_node(postgres_url, asks_once, max_active=0) as b,
    ):
        run = (await a.accept("s", "x")).run
        request = await opened(b, run.run_id)
        receipt = await b.coordinator.cancel("s")
        assert [it.state for it in receipt.cancelled] == [S.INPUT_REQUIRED]
        with pytest.raises(InputClosed):
            await give(a, request)
        end = await b.end(run.run_id)
        assert (end.state, end.text) == (S.CANCELLED, "before ")


async def test_r44_an_agent_that_has_left_goes_on_on_another_node(postgres_url: str) -> None:
    async with a_node(postgres_url, leaves, max_active=0) as b:
        async with a_node(postgres_url, leaves) as a:
            run = (await a.accept("s", "x")).run
            request = await opened(a, run.run_id)
            assert await give(b, request)
            assert (await a.end(run.run_id)).text == "before some state A after"
        async with a_node(postgres_url, leaves) as c:
            run = (await c.accept("t", "x")).run
            request = await opened(c, run.run_id)
        async with a_node(postgres_url, leaves) as d:
            assert await give(b, request)
            end = await d.end(run.run_id)
            assert (end.text, end.attempt) == ("before some state A after", 1)


async def test_r44_a_resumable_agent_survives_its_node_without_an_attempt(
    postgres_url: str,
) -> None:
    @resumable
    async def agent(turn: Turn) -> AsyncGenerator[str, None]:
        yield f"{turn.attempt}: "
        yield await turn.ask("well?")

    async with a_node(postgres_url, agent, SHORT) as b:
        async with a_node(postgres_url, agent, SHORT, max_active=256) as a:
            run = (await a.accept("s", "x")).run
            b_request = await opened(b, run.run_id)
            with cut_off(a):
                assert a.coordinator.membership is not None
                async with asyncio.timeout(SECONDS):
                    while a.coordinator.membership.alive:
                        await asyncio.sleep(0.05)
                assert await give(b, b_request)
                end = await b.end(run.run_id)
        assert end.state is S.COMPLETED
        assert end.text in {"1: A", "2: A"}
        assert (await b.coordinator.get_run(run.run_id)).max_attempts == 1


async def test_r43_one_of_several_nodes_lets_a_request_expire(postgres_url: str) -> None:
    async def agent(turn: Turn) -> str:
        return str(await turn.ask("well?", timeout=0.001))

    async with (
        a_node(postgres_url, agent) as a,
        a_node(postgres_url, agent, max_active=0) as b,
    ):
        run = (await a.accept("s", "x")).run
        await opened(b, run.run_id)
        async with asyncio.timeout(SECONDS):
            while not await b.coordinator.inputs.expire_due():
                await asyncio.sleep(0.01)
        end = await b.end(run.run_id)
        assert end.error is not None
        assert end.error.reason == "INPUT_EXPIRED"


async def test_r42_a_run_whose_agent_has_left_is_cancelled_by_any_node(postgres_url: str) -> None:
    async with a_node(postgres_url, leaves, max_active=0) as b:
        async with a_node(postgres_url, leaves) as a:
            run = (await a.accept("s", "x")).run
            await opened(b, run.run_id)
        await b.coordinator.cancel("s")
        end = await b.end(run.run_id)
        assert (end.state, end.text) == (S.CANCELLED, "before ")


async def test_r42_a_cancel_that_meets_the_commit_of_a_question_ends_the_run(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent leaves, and its run has no node from this commit on."""
    async with a_node(postgres_url, leaves, NodeSettings(lease=20 * SECONDS)) as a:
        commit = a.store.commit
        is_parking, may_park = asyncio.Event(), asyncio.Event()

        async def slow(base_version: int, transition: Transition) -> int:
            active = transition.lane.active
            if active is not None and active.asking.parked:
                is_parking.set()
                await may_park.wait()
            return await commit(base_version, transition)

        monkeypatch.setattr(a.store, "commit", slow)
        run = (await a.accept("s", "x")).run
        await is_parking.wait()
        cancel = asyncio.create_task(a.coordinator.cancel("s"))
        mailbox = a.coordinator._lanes._mailboxes[SessionKey("default", "s")]
        while not mailbox.commands:
            await asyncio.sleep(0)
        may_park.set()
        receipt = await cancel
        assert [it.state for it in receipt.cancelled] == [S.INPUT_REQUIRED]
        end = await a.end(run.run_id)
        assert (end.state, end.text) == (S.CANCELLED, "before ")


async def test_r44_answered_runs_without_a_slot_make_no_node_busy(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_node(postgres_url, leaves) as a:
        run = (await a.accept("s", "x")).run
        request = await opened(a, run.run_id)
    wakes = 0
    wake = PostgresCluster.wake

    def counted(cluster: PostgresCluster) -> None:
        nonlocal wakes
        wakes += 1
        wake(cluster)

    monkeypatch.setattr(PostgresCluster, "wake", counted)
    async with (
        a_node(postgres_url, leaves, max_active=0) as b,
        a_node(postgres_url, leaves, max_active=0),
    ):
        assert await give(b, request)
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        loop.call_later(2.0, over.set_result, None)
        await over
        assert 1 <= wakes < 5


async def test_r41_answered_runs_without_room_hide_no_others(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "ANSWERED_RUNS", 2)

    @asynccontextmanager
    async def nodes(**slots: int | None) -> AsyncIterator[Node]:
        declared = [
            DeclaredAgent(name, FunctionAgent(leaves), slots=most) for name, most in slots.items()
        ]
        async with (
            postgres_store(postgres_url) as store,
            running(store, node=LONG, agent=AgentTable(declared)) as node,
        ):
            yield node

    async with nodes(full=None, free=None) as a:
        runs = [(await a.accept(f"s{n}", "x", agent="full")).run for n in range(4)]
        last = (await a.accept("last", "x", agent="free")).run
        requests = [await opened(a, run.run_id) for run in (*runs, last)]
    async with nodes(full=0, free=0) as b:
        for request in requests:
            assert await give(b, request)
        async with nodes(full=0, free=1) as c:
            assert (await c.end(last.run_id)).text.endswith("after")
            assert {await c.state(run.run_id) for run in runs} == {S.INPUT_REQUIRED}
