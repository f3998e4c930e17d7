"""Agents that ask people, on a node without the wire (R40 to R45)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from runlane_server.agents.base import AgentError, Turn
from runlane_server.agents.functions import FunctionAgent, resumable
from runlane_server.agents.questions import Asked
from runlane_server.core.errors import (
    AnswerInvalid,
    InputClosed,
    InputNotFound,
    StoreUnavailable,
)
from runlane_server.core.input import Answer, InputRequest, InputState
from runlane_server.core.limits import Limits
from runlane_server.core.model import (
    CancelScope,
    EventBody,
    InputAnswered,
    InputRequested,
    InputWithdrawn,
    Resumed,
    RunKey,
    RunState,
    Started,
    TextDelta,
)
from runlane_server.core.retry import RetryPolicy
from runlane_server.core.transition import Transition
from runlane_server.store.base import Store
from runlane_server.store.sqlite.store import SqliteStore
from support.node import Node, running
from support.staging import SECONDS

S = InputState

Running: TypeAlias = Callable[..., AbstractAsyncContextManager[Node]]


def answer_of(value_json: str, answer_id: str = "") -> Answer:
    return Answer(answer_id, value_json, "ann", "token", "", "", 0)


@pytest.fixture
def serving(store: Store) -> Running:
    @asynccontextmanager
    async def started(function: Callable[[Any], Any], **limits: Any) -> AsyncIterator[Node]:
        agent = FunctionAgent(function)
        async with running(store, agent=agent, limits=Limits(**limits)) as node:
            yield node

    return started


async def opened(node: Node, run_id: str, *, count: int = 1) -> list[InputRequest]:
    """Waits until a run has that many open requests; the first one asked comes first."""
    follower = node.feed.follow(RunKey("default", run_id), 0)
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                page = await node.store.list_inputs(
                    "default", run_id=run_id, states=[InputState.OPEN], limit=50
                )
                if len(page.items) >= count:
                    return list(reversed(page.items))
                await follower.next()
    finally:
        follower.close()


async def bodies(node: Node, run_id: str) -> list[EventBody]:
    key = RunKey("default", run_id)
    events = await node.store.run_events(key, after=0, limit=500, max_bytes=1 << 20)
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    return [event.body for event in events]


async def text_of(node: Node, run_id: str) -> str:
    return "".join(b.text for b in await bodies(node, run_id) if isinstance(b, TextDelta))


async def asks_once(turn: Turn) -> AsyncGenerator[str, None]:
    yield "before "
    yield await turn.ask("well?")
    yield " after"


async def test_r40_a_run_that_asks_has_no_slot(serving: Running) -> None:
    async with serving(asks_once, max_active_runs=1) as node:
        first = await node.accept("s", "one")
        [request] = await opened(node, first.run.run_id)
        assert await node.state(first.run.run_id) is RunState.INPUT_REQUIRED
        assert await text_of(node, first.run.run_id) == "before "
        assert node.coordinator.load.slots_in_use == 0
        # Another session gets the only slot, and asks too.
        second = await node.accept("t", "two")
        [other] = await opened(node, second.run.run_id)
        behind = await node.accept("s", "three")
        assert behind.run.state is RunState.QUEUED
        for asked, word in ((other, "b"), (request, "a")):
            _, accepted = await node.coordinator.inputs.answer(
                "default", asked.input_request_id, answer_of(f'"{word}"')
            )
            assert accepted
        assert (await node.end(first.run.run_id)).text == "before a after"
        assert (await node.end(second.run.run_id)).text == "before b after"


async def test_r40_the_timeout_is_paused(serving: Running) -> None:
    async with serving(asks_once) as node:
        run = (await node.accept("s", "one", timeout=300_000)).run
        [request] = await opened(node, run.run_id)
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        loop.call_later(0.4, over.set_result, None)
        await over
        assert await node.state(run.run_id) is RunState.INPUT_REQUIRED
        await node.coordinator.inputs.answer(
            "default", request.input_request_id, answer_of('"late"')
        )
        assert (await node.end(run.run_id)).state is RunState.COMPLETED


async def test_r41_the_first_answer_wins(serving: Running) -> None:
    async with serving(asks_once) as node:
        run = (await node.accept("s", "one")).run
        [request] = await opened(node, run.run_id)
        name = request.input_request_id
        answers = [answer_of(f'"{n}"', f"id{n}") for n in range(10)]
        inputs = node.coordinator.inputs
        replies = await asyncio.gather(*(inputs.answer("default", name, it) for it in answers))
        [winner] = [
            given for given, (_, accepted) in zip(answers, replies, strict=True) if accepted
        ]
        assert {settled.answer.answer_id for settled, _ in replies if settled.answer} == {
            winner.answer_id
        }
        end = await node.end(run.run_id)
        assert end.text == f"before {winner.value_json[1:-1]} after"
        # Again, after the end.
        settled, accepted = await inputs.answer("default", name, winner)
        assert accepted
        assert settled.answer is not None
        assert settled.answer.by == "ann"
        later = answer_of('"x"', "another")
        assert not (await inputs.answer("default", name, later))[1]
        events = await bodies(node, run.run_id)
        assert InputAnswered(name) in events
        assert events.index(Resumed(1)) == events.index(InputAnswered(name)) + 1


async def test_r41_an_answered_run_comes_before_new_ones(serving: Running) -> None:
    release = asyncio.Event()

    async def agent(turn: Turn) -> str:
        if turn.prompt.text == "ask":
            return str(await turn.ask("well?"))
        await release.wait()
        return "held"

    async with serving(agent, max_active_runs=1) as node:
        asking = (await node.accept("s", "ask")).run
        [request] = await opened(node, asking.run_id)
        holding = (await node.accept("t", "hold")).run
        waiting = [(await node.accept(f"w{n}", "hold")).run for n in range(3)]
        await node.coordinator.inputs.answer("default", request.input_request_id, answer_of('"y"'))
        # It waits for the slot: still INPUT_REQUIRED, with nothing open.
        assert await node.state(asking.run_id) is RunState.INPUT_REQUIRED
        release.set()
        ends = [await node.end(run.run_id) for run in (holding, asking, *waiting)]
        starts = [end.ended_at for end in ends]
        assert starts == sorted(starts)


async def test_r42_a_cancel_withdraws_what_is_open(serving: Running) -> None:
    async with serving(asks_once) as node:
        run = (await node.accept("s", "one")).run
        [request] = await opened(node, run.run_id)
        receipt = await node.coordinator.cancel("s")
        [covered] = receipt.cancelled
        assert (covered.run_id, covered.state) == (run.run_id, RunState.INPUT_REQUIRED)
        with pytest.raises(InputClosed):
            await node.coordinator.inputs.answer(
                "default", request.input_request_id, answer_of('"x"')
            )
        end = await node.end(run.run_id)
        assert (end.state, end.text) == (RunState.CANCELLED, "before ")
        assert InputWithdrawn(request.input_request_id) in await bodies(node, run.run_id)


async def test_r42_a_cancel_covers_a_run_that_waits_for_a_slot_after_its_answer(
    serving: Running,
) -> None:
    release = asyncio.Event()

    async def agent(turn: Turn) -> str:
        if turn.prompt.text == "ask":
            return str(await turn.ask("well?"))
        await release.wait()
        return "held"

    async with serving(agent, max_active_runs=1) as node:
        asking = (await node.accept("s", "ask")).run
        [request] = await opened(node, asking.run_id)
        holding = (await node.accept("t", "hold")).run
        await node.coordinator.inputs.answer("default", request.input_request_id, answer_of('"y"'))
        receipt = await node.coordinator.cancel("s", scope=CancelScope.ACTIVE)
        assert [run.state for run in receipt.cancelled] == [RunState.INPUT_REQUIRED]
        assert (await node.end(asking.run_id)).state is RunState.CANCELLED
        release.set()
        await node.end(holding.run_id)


async def test_r43_a_request_expires(serving: Running) -> None:
    async def agent(turn: Turn) -> str:
        default = "dunno" if turn.prompt.text == "default" else None
        return str(await turn.ask("well?", timeout=0.001, default=default))

    async with serving(agent) as node:
        given = (await node.accept("s", "default")).run
        failed = (await node.accept("t", "nothing")).run
        for run in (given, failed):
            await opened(node, run.run_id)
        async with asyncio.timeout(SECONDS):
            while (await node.store.list_inputs("default", states=[S.OPEN], limit=1)).items:
                await node.coordinator.inputs.expire_due()
                await asyncio.sleep(0)
        assert (await node.end(given.run_id)).text == "dunno"
        end = await node.end(failed.run_id)
        assert end.error is not None
        assert (end.state, end.error.reason) == (RunState.FAILED, "INPUT_EXPIRED")


async def leaves_once(turn: Turn) -> AsyncGenerator[str, None]:
    if not turn.checkpoint:
        yield "before "
        await turn.ask_and_leave([Asked("well?", key="k")], "state")
        return
    yield f"{await turn.answer_to('k')} after"


async def opened_in(store: Store, run_id: str) -> Sequence[InputRequest]:
    page = await store.list_inputs("default", run_id=run_id, states=[S.OPEN], limit=50)
    return page.items


class Unconfirmed(SqliteStore):
    """A store that loses the confirmation of the first question."""

    was_lost = False

    async def commit(self, base_version: int, transition: Transition) -> int:
        version = await super().commit(base_version, transition)
        if transition.inputs and not self.was_lost:
            self.was_lost = True
            raise StoreUnavailable("outcome unknown")
        return version


async def test_r40_a_run_whose_question_was_not_confirmed_waits(tmp_path: Path) -> None:
    async with (
        Unconfirmed(tmp_path / "runlane.db") as store,
        running(store, agent=FunctionAgent(asks_once)) as node,
    ):
        run = (await node.accept("s", "x", timeout=2_500_000)).run
        [request] = await opened(node, run.run_id)
        # Longer than the timeout, which does not count the wait once the question is repeated.
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        loop.call_later(3.0, over.set_result, None)
        await over
        assert store.was_lost
        assert await node.state(run.run_id) is RunState.INPUT_REQUIRED
        await node.coordinator.inputs.answer("default", request.input_request_id, answer_of('"A"'))
        assert (await node.end(run.run_id)).text == "before A after"


@pytest.mark.parametrize("agent", [asks_once, leaves_once], ids=["waits", "leaves"])
async def test_r44_a_question_that_was_not_confirmed_is_asked_once(
    tmp_path: Path, agent: Callable[[Any], Any]
) -> None:
    async with (
        Unconfirmed(tmp_path / "runlane.db") as store,
        running(store, agent=FunctionAgent(agent)) as node,
    ):
        run = (await node.accept("s", "x")).run
        async with asyncio.timeout(SECONDS):
            while not (page := await opened_in(store, run.run_id)):
                await asyncio.sleep(0)
        # Before the supervisor repeats it: then the lane does not know the question any more.
        await node.coordinator.inputs.answer("default", page[0].input_request_id, answer_of('"A"'))
        assert (await node.end(run.run_id)).text == "before A after"
        asked = await store.list_inputs("default", run_id=run.run_id, limit=50)
        assert [one.state for one in asked.items] == [S.ANSWERED]
        starts = [body for body in await bodies(node, run.run_id) if type(body) is Started]
        assert starts == [Started(1)]


class Refusing(SqliteStore):
    """A store that cannot write that a request of the session `bad` has expired."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.refused = 0
        self.is_refusing = True

    async def commit(self, base_version: int, transition: Transition) -> int:
        closed = any(change.state is S.EXPIRED for change in transition.inputs)
        if self.is_refusing and closed and transition.lane.key.session_id == "bad":
            self.refused += 1
            raise ValueError("cannot be written")
        return await super().commit(base_version, transition)


async def test_r43_a_request_that_cannot_expire_keeps_no_other_open(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        return str(await turn.ask("well?", timeout=0.001, default="dunno"))

    async with (
        Refusing(tmp_path / "runlane.db") as store,
        running(store, agent=FunctionAgent(agent)) as node,
    ):
        bad = (await node.accept("bad", "x")).run
        expiring = asyncio.create_task(node.coordinator.inputs.keep_expiring())
        async with asyncio.timeout(SECONDS):
            while not (store.refused or expiring.done()):
                await asyncio.sleep(0.01)
        assert (await node.end((await node.accept("good", "x")).run.run_id)).text == "dunno"
        store.is_refusing = False
        assert (await node.end(bad.run_id)).text == "dunno"
        expiring.cancel()


async def test_r44_an_attempt_that_asks_again_gets_the_stored_answer(
    serving: Running,
) -> None:
    crashed = asyncio.Event()

    async def agent(turn: Turn) -> AsyncGenerator[str, None]:
        first = await turn.ask("first?")
        if turn.attempt == 1:
            await turn.ask("second?")
        yield f"{turn.attempt}: {first}"
        crashed.set()

    async with serving(agent) as node:
        run = (await node.accept("s", "one", max_attempts=2)).run
        [request] = await opened(node, run.run_id)
        await node.coordinator.inputs.answer("default", request.input_request_id, answer_of('"A"'))
        [_, *_] = await opened(node, run.run_id)
    async with serving(agent) as node:
        end = await node.end(run.run_id)
        assert (end.text, end.attempt) == ("2: A", 2)
        page = await node.store.list_inputs("default", run_id=run.run_id, limit=50)
        assert [it.question.text for it in page.items] == ["second?", "first?"]
        assert page.items[0].state is InputState.WITHDRAWN


async def test_r44_a_resumable_agent_survives_a_restart_without_an_attempt(
    serving: Running,
) -> None:
    @resumable
    async def agent(turn: Turn) -> AsyncGenerator[str, None]:
        yield f"{turn.attempt}: "
        yield await turn.ask("well?")

    async with serving(agent) as node:
        run = (await node.accept("s", "one")).run
        [request] = await opened(node, run.run_id)
    async with serving(agent) as node:
        assert await node.state(run.run_id) is RunState.INPUT_REQUIRED
        [same] = await opened(node, run.run_id)
        assert same == request
        await node.coordinator.inputs.answer("default", request.input_request_id, answer_of('"A"'))
        end = await node.end(run.run_id)
        assert (end.state, end.text) == (RunState.COMPLETED, "2: A")
        assert Started(2) in await bodies(node, run.run_id)


async def leaves(turn: Turn) -> AsyncGenerator[str, None]:
    if not turn.checkpoint:
        yield "before "
        await turn.ask_and_leave([Asked("well?", key="k")], "some state")
        return
    yield f"{turn.checkpoint} {await turn.answer_to('k')} after"


async def test_r44_an_agent_that_leaves_is_called_again(serving: Running) -> None:
    async with serving(leaves) as node:
        run = (await node.accept("s", "one")).run
        [request] = await opened(node, run.run_id)
        assert await node.coordinator.wait_idle(SECONDS)
    async with serving(leaves) as node:
        assert await node.state(run.run_id) is RunState.INPUT_REQUIRED
        assert node.coordinator.load.active == 0
        await node.coordinator.inputs.answer("default", request.input_request_id, answer_of('"A"'))
        end = await node.end(run.run_id)
        assert (end.text, end.attempt) == ("before some state A after", 1)
        events = await bodies(node, run.run_id)
        assert [b for b in events if isinstance(b, Started | Resumed)] == [Started(1), Resumed(1)]


async def test_r44_an_answer_counts_that_came_while_the_server_was_starting(
    serving: Running, store: Store
) -> None:
    async with serving(leaves) as node:
        run = (await node.accept("s", "one")).run
        [request] = await opened(node, run.run_id)
        node.coordinator.begin_drain()
        await node.coordinator.inputs.answer("default", request.input_request_id, answer_of('"A"'))
        assert await node.state(run.run_id) is RunState.INPUT_REQUIRED
    async with serving(leaves) as node:
        assert (await node.end(run.run_id)).text == "before some state A after"


@pytest.mark.parametrize("restart", [False, True])
async def test_r42_a_run_whose_agent_has_left_is_cancelled_with_its_output(
    serving: Running, *, restart: bool
) -> None:
    async with serving(leaves) as node:
        run = (await node.accept("s", "one")).run
        await opened(node, run.run_id)
        if not restart:
            await node.coordinator.cancel("s")
            await node.end(run.run_id)
    async with serving(leaves) as node:
        await node.coordinator.cancel("s")
        end = await node.end(run.run_id)
    assert (end.state, end.text) == (RunState.CANCELLED, "before ")


async def test_r45_a_late_subscriber_learns_of_open_requests_and_of_their_withdrawal(
    serving: Running,
) -> None:
    async with serving(asks_once) as node:
        run = (await node.accept("s", "one")).run
        [request] = await opened(node, run.run_id)
        follower = node.feed.follow(RunKey("default", run.run_id), 0)
        seen: list[EventBody] = []
        async with asyncio.timeout(SECONDS):
            while not any(isinstance(body, InputRequested) for body in seen):
                seen += [event.body for event in await follower.next()]
            [asked] = [body for body in seen if isinstance(body, InputRequested)]
            assert asked.input_request_id == request.input_request_id
            await node.coordinator.cancel("s")
            while InputWithdrawn(request.input_request_id) not in seen:
                seen += [event.body for event in await follower.next()]
        follower.close()


async def test_several_questions_at_once(serving: Running) -> None:
    async def agent(turn: Turn) -> str:
        answers = await asyncio.gather(turn.ask("one?"), turn.ask("two?"), turn.ask("two?"))
        return " ".join(answers)

    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        for n, request in enumerate(await opened(node, run.run_id, count=3)):
            await node.coordinator.inputs.answer(
                "default", request.input_request_id, answer_of(f'"{n}"')
            )
        assert (await node.end(run.run_id)).text == "0 1 2"
        requested = [b for b in await bodies(node, run.run_id) if isinstance(b, InputRequested)]
        assert len({body.key for body in requested}) == 3


async def test_a_thread_asks(serving: Running) -> None:
    def agent(turn: Any) -> str:
        approval = turn.ask("Deploy?", tool_name="deploy", arguments={"to": "prod"})
        return f"{bool(approval)} {approval.arguments['to']} {approval.by}"

    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        [request] = await opened(node, run.run_id)
        assert request.question.arguments_json == '{"to": "prod"}'
        await node.coordinator.inputs.answer(
            "default",
            request.input_request_id,
            answer_of('{"approved": true, "arguments": {"to": "test"}}'),
        )
        assert (await node.end(run.run_id)).text == "True test ann"


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 3}},
    "required": ["n"],
    "additionalProperties": False,
}


async def test_an_answer_that_does_not_match_is_refused_and_changes_nothing(
    serving: Running,
) -> None:
    async def agent(turn: Turn) -> str:
        form = await turn.ask("How many?", schema=SCHEMA)
        choice = await turn.ask("Which?", choices=["a", "b"])
        return f"{form} {choice}"

    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        inputs = node.coordinator.inputs
        [form] = await opened(node, run.run_id)
        for bad in ('{"n": 4}', '{"n": 1, "m": 2}', "{}", '"x"', "nonsense", "NaN", "1" * 70_000):
            with pytest.raises(AnswerInvalid) as refused:
                await inputs.answer("default", form.input_request_id, answer_of(bad))
            assert refused.value.violations
        other = answer_of('{"n": 3}')._replace(digest="of another question")
        with pytest.raises(AnswerInvalid, match="question_digest"):
            await inputs.answer("default", form.input_request_id, other)
        await inputs.answer("default", form.input_request_id, answer_of('{"n": 3}'))
        [choice] = await opened(node, run.run_id)
        with pytest.raises(AnswerInvalid, match="one of a, b"):
            await inputs.answer("default", choice.input_request_id, answer_of('"c"'))
        with pytest.raises(InputNotFound):
            await inputs.answer("stranger", choice.input_request_id, answer_of('"a"'))
        await inputs.answer("default", choice.input_request_id, answer_of('"a"'))
        assert (await node.end(run.run_id)).text == "{'n': 3} a"


@pytest.mark.parametrize(
    "question",
    [
        {"schema": {"type": "nonsense"}},
        {"schema": {"$ref": "https://example.com/schema"}},
        {"schema": {"properties": {"a": {"$ref": "file:///etc/passwd"}}}},
        {"schema": {}, "choices": ["a"]},
        {"choices": ["a", "a"]},
        {"choices": ["a"] * 2_000},
        {"choices": "abc"},
        {"tool_name": "t", "arguments": {"x": object()}},
        {"tool_name": "t", "arguments": {"x": "x" * 300_000}},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"default": "x"},
        {"choices": ["a"], "default": "b", "timeout": 1},
    ],
    ids=count(),
)
async def test_a_question_that_nobody_can_answer_fails_the_run(
    serving: Running, question: dict[str, Any]
) -> None:
    async def agent(turn: Turn) -> str:
        return str(await turn.ask("well?", **question))

    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        end = await node.end(run.run_id)
        assert end.error is not None
        assert end.error.reason == "QUESTION_INVALID"
        assert (await node.store.list_inputs("default", limit=1)).items == ()


async def test_a_run_has_a_limit_of_open_requests(serving: Running) -> None:
    async def agent(turn: Turn) -> str:
        await asyncio.gather(*(turn.ask(f"{n}?") for n in range(1_000)))
        return "never"

    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        end = await node.end(run.run_id)
        assert end.error is not None
        assert end.error.reason == "INPUT_LIMIT"
        page = await node.store.list_inputs("default", limit=100)
        assert {it.state for it in page.items} == {InputState.WITHDRAWN}
        assert len(page.items) == 16


async def test_output_beside_a_question_waits_for_the_answer(serving: Running) -> None:
    async def agent(turn: Turn) -> None:
        async def chatter() -> None:
            for _ in range(3):
                await turn.emit("x")
                await asyncio.sleep(0)

        asking = asyncio.create_task(turn.ask("well?"))
        await chatter()
        said = await asking
        await turn.emit(f"[{said}]")

    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        [request] = await opened(node, run.run_id)
        await node.coordinator.inputs.answer("default", request.input_request_id, answer_of('"A"'))
        assert (await node.end(run.run_id)).text == "xxx[A]"
        await bodies(node, run.run_id)


async def test_r38_a_run_that_fails_while_it_waits_for_input_is_repeated(serving: Running) -> None:
    """A person is asked once all the same (R44)."""
    has_asked = asyncio.Event()

    async def agent(turn: Turn) -> str:
        asking = asyncio.create_task(turn.ask("well?", key="k"))
        if turn.attempt == 1:
            await has_asked.wait()
            asking.cancel()
            raise AgentError("no connection", reason="BUSY")
        return f"{turn.attempt}: {await asking}"

    policy = RetryPolicy(("BUSY",), max_attempts=2, initial_backoff=1000)
    async with serving(agent) as node:
        run = (await node.accept("s", "x", retry=policy)).run
        [request] = await opened(node, run.run_id)
        has_asked.set()
        async with asyncio.timeout(SECONDS):
            while (await node.coordinator.get_run(run.run_id)).attempt < 2:
                await asyncio.sleep(0)
        await node.coordinator.inputs.answer("default", request.input_request_id, answer_of('"A"'))
        assert (await node.end(run.run_id)).text == "2: A"
        asked = [body for body in await bodies(node, run.run_id) if type(body) is InputRequested]
        assert {body.input_request_id for body in asked} == {request.input_request_id}
