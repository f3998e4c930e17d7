"""The quota of questions and standing approvals, on a node without the wire."""

from __future__ import annotations

import asyncio
import json
import time
from types import MappingProxyType
from typing import Any

import pytest

from runlane_server.access.admission import QuestionRate
from runlane_server.access.grants import Grant, GrantBook
from runlane_server.access.quotas import Quota, QuotaBook, Quotas
from runlane_server.agents.base import AgentError, Turn
from runlane_server.agents.functions import FunctionAgent
from runlane_server.agents.questions import Asked
from runlane_server.core.input import Answer, InputRequest, InputState
from runlane_server.store.base import Store
from support.node import Node, running
from support.staging import SECONDS

TENANT = "default"


def book(**limits: Any) -> QuotaBook:
    return QuotaBook(Quotas(MappingProxyType({TENANT: Quota(**limits)})))


def grants(**changes: Any) -> GrantBook:
    now = time.time()
    grant = Grant("g", TENANT, "default", "deploy", "maria", now - 60, now + 3600)
    return GrantBook([grant._replace(**changes)])


def test_questions_have_a_bucket_for_each_tenant() -> None:
    now = [0.0]
    rate = QuestionRate(book(questions_per_second=0.5, questions_burst=3), now=lambda: now[0])
    assert rate.refusal("another", 100) is None
    assert [rate.refusal(TENANT, 1) for _ in range(3)] == [None] * 3
    refusal = rate.refusal(TENANT, 1)
    assert refusal is not None
    assert refusal.retry_after == 2.0
    now[0] = 2.0
    # More than are there are asked at once, and the following ones wait for longer.
    assert rate.refusal(TENANT, 4) is None
    later = rate.refusal(TENANT, 1)
    assert later is not None
    assert later.retry_after == 8.0
    assert rate.refusal(TENANT, 0) is None


async def listed(node: Node, *states: InputState) -> list[InputRequest]:
    page = await node.store.list_inputs(TENANT, states=states, limit=50)
    return list(reversed(page.items))


async def test_an_agent_may_go_on_after_a_refused_question(store: Store) -> None:
    """A question that was refused and is asked again is not another question."""
    quotas = book(questions_per_second=1e-6, questions_burst=1)
    refused: list[str] = []

    async def agent(turn: Turn) -> str:
        await turn.ask("one?", key="one")
        try:
            await turn.ask("two?")
        except AgentError as error:
            refused.append(error.reason)
        quotas.replace(Quotas())
        return str(await turn.ask("two?"))

    async with running(store, agent=FunctionAgent(agent), quotas=quotas) as node:
        run = (await node.accept("s", "go")).run
        keys = []
        for n in range(2):
            async with asyncio.timeout(SECONDS):
                while not (found := await listed(node, InputState.OPEN)):
                    await asyncio.sleep(0.01)
            keys.append(found[0].question.key)
            await node.coordinator.inputs.answer(
                TENANT, found[0].input_request_id, answer_of(f'"{n}"')
            )
        assert (await node.end(run.run_id)).text == "1"
    assert refused == ["INPUT_RATE_LIMITED"]

    async def plain(turn: Turn) -> str:
        return str(await turn.ask("two?"))

    async with running(store, agent=FunctionAgent(plain)) as node:
        await node.accept("t", "go")
        async with asyncio.timeout(SECONDS):
            while not (found := await listed(node, InputState.OPEN)):
                await asyncio.sleep(0.01)
        assert found[0].question.key == keys[1]


def answer_of(value_json: str) -> Answer:
    return Answer("", value_json, "ann", "token", "", "", 0)


async def deploys(turn: Turn) -> str:
    """Asks for what its prompt lists, all at once."""
    calls = json.loads(turn.prompt.text)
    asked = [turn.ask("May I?", tool_name=tool, arguments=given) for tool, given in calls]
    approvals = await asyncio.gather(*asked)
    return " ".join(f"{one.by}:{bool(one)}" for one in approvals)


async def test_several_questions_are_approved_at_once(store: Store) -> None:
    calls = json.dumps([["deploy", {"n": n}] for n in range(5)])
    async with running(store, agent=FunctionAgent(deploys), grants=grants()) as node:
        run = (await node.accept("s", calls)).run
        assert (await node.end(run.run_id)).text == " ".join(["maria:True"] * 5)
        for request in await listed(node, InputState.ANSWERED):
            assert request.answer is not None
            assert request.answer.digest == request.question.digest


async def test_what_no_grant_covers_is_for_people(store: Store) -> None:
    calls = json.dumps([["deploy", {}], ["destroy", {}]])
    async with running(store, agent=FunctionAgent(deploys), grants=grants()) as node:
        run = (await node.accept("s", calls)).run
        async with asyncio.timeout(SECONDS):
            while not await listed(node, InputState.ANSWERED):
                await asyncio.sleep(0.01)
            while not (waiting := await listed(node, InputState.OPEN)):
                await asyncio.sleep(0.01)  # the second question
        [left] = waiting
        assert left.question.tool_name == "destroy"
        await node.coordinator.inputs.answer(
            TENANT, left.input_request_id, answer_of('{"approved": false}')
        )
        assert (await node.end(run.run_id)).text == "maria:True ann:False"


async def test_an_expired_grant_approves_nothing(store: Store) -> None:
    book_ = grants(expires=time.time() - 1)
    async with running(store, agent=FunctionAgent(deploys), grants=book_) as node:
        run = (await node.accept("s", json.dumps([["deploy", {}]]))).run
        async with asyncio.timeout(SECONDS):
            while not await listed(node, InputState.OPEN):
                await asyncio.sleep(0.01)
        await node.coordinator.cancel("s")
        await node.end(run.run_id)
        assert await listed(node, InputState.ANSWERED) == []


async def opened(node: Node) -> list[InputRequest]:
    """The open questions, once there are any."""
    async with asyncio.timeout(SECONDS):
        while not (found := await listed(node, InputState.OPEN)):
            await asyncio.sleep(0.01)
    return found


async def test_a_grant_approves_no_earlier_question_with_the_same_key(store: Store) -> None:
    """The agent that asks cannot get another call approved under the name of a granted one."""
    refused = asyncio.Event()

    async def agent(turn: Turn) -> str:
        async def ask(tool: str) -> str:
            try:
                one = await turn.ask("May I?", tool_name=tool, key="k")
            except AgentError as error:
                refused.set()
                return f"{error.reason} {error}"
            return f"{one.by}:{bool(one)}"

        return " ".join(await asyncio.gather(ask("destroy"), ask("deploy")))

    async with running(store, agent=FunctionAgent(agent), grants=grants()) as node:
        run = (await node.accept("s", "go")).run
        async with asyncio.timeout(SECONDS):
            await refused.wait()
        [one] = await opened(node)
        assert one.question.tool_name == "destroy"
        await node.coordinator.inputs.answer(
            TENANT, one.input_request_id, answer_of('{"approved": false}')
        )
        assert (await node.end(run.run_id)).text == (
            "ann:False QUESTION_INVALID key: 'k' names another question; give this one its own key"
        )


@pytest.mark.stores("memory")
@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        Asked("May I?", "k", "destroy", {"n": 1}),
        Asked("May I?", "k", "deploy", {"n": True}),
        Asked("May I, too?", "k", "deploy", {"n": 1}),
        Asked("May I?", "k", choices=["yes", "no"]),
        Asked("May I?", "k"),
    ],
)
async def test_r44_a_grant_approves_no_later_question_with_the_same_key(
    store: Store, other: Asked, leaves: bool
) -> None:
    async def agent(turn: Turn) -> str:
        good = await turn.ask("May I?", key="k", tool_name="deploy", arguments={"n": 1})
        assert good.by == "maria"
        if leaves:
            return str(await turn.ask_and_leave([other], "state"))
        return str(await turn.ask(**other._asdict()))

    async with running(store, agent=FunctionAgent(agent), grants=grants()) as node:
        run = (await node.accept("s", "go")).run
        async with asyncio.timeout(SECONDS):
            ended = await node.end(run.run_id)
        assert ended.error is not None
        assert (ended.error.reason, ended.text) == ("QUESTION_INVALID", "")
        assert len(await listed(node, *InputState)) == 1


@pytest.mark.stores("memory")
async def test_a_key_is_given_to_one_question_of_those_an_agent_leaves_with(store: Store) -> None:
    async def agent(turn: Turn) -> str:
        if turn.checkpoint:
            return str(await turn.answer_to("k"))
        with pytest.raises(AgentError, match="'k' names another question"):
            await turn.ask_and_leave([Asked("a?", "k"), Asked("b?", "k", choices=["b"])], "state")
        await turn.ask_and_leave([Asked("a?", "k"), Asked("a?", "k")], "state")
        return ""

    async with running(store, agent=FunctionAgent(agent)) as node:
        run = (await node.accept("s", "go")).run
        [one] = await opened(node)
        await node.coordinator.inputs.answer(TENANT, one.input_request_id, answer_of('"1"'))
        assert (await node.end(run.run_id)).text == "1"
        assert len(await listed(node, *InputState)) == 1


@pytest.mark.stores("memory")
@pytest.mark.parametrize(
    ("first", "again"),
    [
        (Asked("It is 10:01. Go on?", "k"), Asked("It is 10:02. Go on?", "k")),
        (
            Asked("May I?", "k", "deploy", {"to": "x", "n": 1}),
            Asked("May I?", "k", "deploy", {"n": 1, "to": "x"}),
        ),
    ],
)
async def test_r44_the_same_question_gets_its_answer_again(
    store: Store, first: Asked, again: Asked
) -> None:
    async def agent(turn: Turn) -> str:
        one = await turn.ask(**first._asdict())
        return str(one == await turn.ask(**again._asdict()))

    async with running(store, agent=FunctionAgent(agent)) as node:
        run = (await node.accept("s", "go")).run
        [one] = await opened(node)
        value = '{"approved": true}' if first.tool_name else '"yes"'
        await node.coordinator.inputs.answer(TENANT, one.input_request_id, answer_of(value))
        assert (await node.end(run.run_id)).text == "True"


@pytest.mark.stores("memory")
@pytest.mark.parametrize("refusal", ["rate", "invalid"])
async def test_r44_what_is_answered_is_not_asked_again_after_a_refusal(
    store: Store, refusal: str
) -> None:
    quotas = book(questions_per_second=1e-6, questions_burst=1)
    if refusal == "invalid":
        quotas.replace(Quotas())
    refused: list[str] = []
    bad = Asked("?", timeout=9, choices=["b"], default="c")

    async def agent(turn: Turn) -> str:
        if not turn.checkpoint:
            await turn.ask_and_leave([Asked("one?")], "a")
        elif turn.checkpoint == "a":
            second = bad if refusal == "invalid" else Asked("two?")
            try:
                await turn.ask_and_leave([Asked("one?"), second], "b")
            except AgentError as error:
                refused.append(error.reason)
            quotas.replace(Quotas())
            await turn.ask_and_leave([Asked("one?"), Asked("two?")], "b")
        return ""

    async with running(store, agent=FunctionAgent(agent), quotas=quotas) as node:
        run = (await node.accept("s", "go")).run
        [one] = await opened(node)
        await node.coordinator.inputs.answer(TENANT, one.input_request_id, answer_of('"1"'))
        assert [each.question.text for each in await opened(node)] == ["two?"]
        await node.coordinator.cancel("s")
        await node.end(run.run_id)
    assert refused == [{"rate": "INPUT_RATE_LIMITED", "invalid": "QUESTION_INVALID"}[refusal]]
