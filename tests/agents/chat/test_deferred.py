"""Tool calls that wait for people: pydantic-ai's `requires_approval` and deferred tools."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias

import pytest
from pydantic_ai import Agent
from pydantic_ai.exceptions import CallDeferred
from pydantic_ai.messages import ModelMessage, ModelRequest, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel

from engine.test_input import answer_of, opened
from runlane_server.agents.chat.agent import ChatAgent
from runlane_server.core.model import RunState, ToolCall, ToolResult
from runlane_server.store.base import Store
from support.node import Node, running

pytestmark = pytest.mark.stores("sqlite")

Calls: TypeAlias = list[tuple[str, dict[str, Any]]]

Serving: TypeAlias = Callable[..., AbstractAsyncContextManager[Node]]


def model_of(*steps: Calls) -> FunctionModel:
    """A model that makes these calls, one list per request, and then reads out all results."""

    async def stream(messages: list[ModelMessage], _: AgentInfo) -> AsyncIterator[Any]:
        returned = [
            part
            for message in messages
            if isinstance(message, ModelRequest)
            for part in message.parts
            if isinstance(part, ToolReturnPart)
        ]
        asked = sum(1 for message in messages if message.kind == "response")
        if asked < len(steps):
            yield f"step {asked + 1}. "
            for n, (name, arguments) in enumerate(steps[asked]):
                yield {
                    n: DeltaToolCall(name, json.dumps(arguments), tool_call_id=f"call-{asked}-{n}")
                }
            return
        yield "; ".join(f"{part.tool_name}: {part.content}" for part in returned)

    return FunctionModel(stream_function=stream)


def agent_of(*steps: Calls) -> tuple[ChatAgent, list[str]]:
    """An agent with such a model, and what its tools did."""
    done: list[str] = []
    agent = Agent(model_of(*steps))

    @agent.tool_plain(requires_approval=True)
    def delete(path: str) -> str:
        done.append(f"delete {path}")
        return f"deleted {path}"

    @agent.tool_plain
    def look(path: str) -> str:
        done.append(f"look {path}")
        return f"saw {path}"

    @agent.tool_plain
    def ring(number: str) -> str:
        raise CallDeferred

    return ChatAgent(agent), done


@pytest.fixture
def serving(store: Store) -> Serving:
    @asynccontextmanager
    async def started(agent: ChatAgent) -> AsyncIterator[Node]:
        async with running(store, agent=agent) as node:
            yield node

    return started


async def settle(node: Node, run_id: str, value_json: str) -> None:
    [request] = await opened(node, run_id)
    await node.coordinator.inputs.answer("default", request.input_request_id, answer_of(value_json))


async def test_r44_an_approval_survives_a_restart_and_is_asked_once(serving: Serving) -> None:
    steps: tuple[Calls, ...] = ([("look", {"path": "a"}), ("delete", {"path": "a"})],)
    agent, done = agent_of(*steps)
    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        [request] = await opened(node, run.run_id)
        assert (request.question.tool_name, request.question.arguments_json) == (
            "delete",
            '{"path": "a"}',
        )
        # It waits without a task.
        assert await node.coordinator.wait_idle(5)
        assert done == ["look a"]
    again, done_again = agent_of(*steps)
    async with serving(again) as node:
        assert await node.state(run.run_id) is RunState.INPUT_REQUIRED
        await settle(node, run.run_id, '{"approved": true}')
        end = await node.end(run.run_id)
        assert end.text == "look: saw a; delete: deleted a"
        assert end.attempt == 1
        assert done_again == ["delete a"]
        bodies = [event.body for event in await node.events(run.run_id)]
        called = [body.name for body in bodies if isinstance(body, ToolCall)]
        returned = [body.name for body in bodies if isinstance(body, ToolResult)]
        assert sorted(called) == sorted(returned) == ["delete", "look"]


async def test_an_answer_replaces_the_arguments(serving: Serving) -> None:
    agent, done = agent_of([("delete", {"path": "a"})])
    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        await settle(node, run.run_id, '{"approved": true, "arguments": {"path": "b"}}')
        assert (await node.end(run.run_id)).text == "delete: deleted b"
        assert done == ["delete b"]


async def test_a_denied_call_is_not_made_and_the_model_learns_why(serving: Serving) -> None:
    agent, done = agent_of([("delete", {"path": "a"})])
    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        await settle(node, run.run_id, '{"approved": false, "reason": "never"}')
        assert (await node.end(run.run_id)).text == "delete: never"
        assert done == []


async def test_the_same_call_twice_is_asked_twice(serving: Serving) -> None:
    call: Calls = [("delete", {"path": "a"})]
    agent, done = agent_of(call, call)
    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        for _ in range(2):
            await settle(node, run.run_id, '{"approved": true}')
        await node.end(run.run_id)
        assert done == ["delete a", "delete a"]


async def test_a_deferred_call_gets_its_result_from_a_person(serving: Serving) -> None:
    agent, _ = agent_of([("ring", {"number": "110"})])
    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        await settle(node, run.run_id, '"nobody there"')
        assert (await node.end(run.run_id)).text == "ring: nobody there"


async def test_the_next_turn_has_a_valid_history(serving: Serving) -> None:
    agent, _ = agent_of([("delete", {"path": "a"})])
    async with serving(agent) as node:
        run = (await node.accept("s", "go")).run
        await settle(node, run.run_id, '{"approved": true}')
        await node.end(run.run_id)
        following = (await node.accept("s", "and now?")).run
        assert (await node.end(following.run_id)).state is RunState.COMPLETED
