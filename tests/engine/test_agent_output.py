"""Everything that an agent reports is untrusted: its run ends, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from runlane_server.agents.base import AgentError, AgentEvent, Report, Turn
from runlane_server.core.model import (
    MAX_COUNT,
    FinishReason,
    Prompt,
    ReasoningDelta,
    RunComplete,
    RunState,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)
from runlane_server.core.transition import Outcome
from runlane_server.engine.lane_access import LaneAccess
from runlane_server.engine.runner import Runner
from runlane_server.store.base import Store
from support.node import running

Wrong = Any
"""A value of a type that the annotation of its field does not allow."""


@dataclass
class Agent:
    """Yields events of any kind, and then calls a function."""

    events: list[Wrong]
    then: Callable[[], None] = field(default=lambda: None)

    async def start(self) -> None:
        pass

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        for event in self.events:
            yield event
        self.then()

    async def close(self) -> None:
        pass


async def run_beside_another(store: Store, agent: Agent) -> RunComplete:
    """Runs a prompt, and then the next one of the same session, which needs the lane and a slot."""
    async with running(store, agent=agent) as node:
        async with asyncio.timeout(10):
            complete = await node.coordinator.run("s", Prompt("x"))
            agent.events, agent.then = [TextDelta("fine")], lambda: None
            following = await node.coordinator.run("s", Prompt("y"))
        assert (following.state, following.text) == (RunState.COMPLETED, "fine")
        return complete


class Word(str):
    """A text whose methods are not to be trusted."""

    __slots__ = ()

    def encode(self, *_: object) -> bytes:
        raise RuntimeError("encoded by the engine")


@pytest.mark.parametrize(
    ("event", "field_name"),
    [
        (None, "NoneType"),
        (b"bytes", "bytes"),
        (TextDelta(None), "TextDelta.text"),  # type: ignore[arg-type]
        (TextDelta(b"x"), "TextDelta.text"),  # type: ignore[arg-type]
        (ReasoningDelta(3), "ReasoningDelta.text"),  # type: ignore[arg-type]
        (ToolCall(1, "t", "{}"), "ToolCall.tool_call_id"),  # type: ignore[arg-type]
        (ToolCall("c", None, "{}"), "ToolCall.name"),  # type: ignore[arg-type]
        (ToolCall("c", "t", {}), "ToolCall.arguments_json"),  # type: ignore[arg-type]
        (ToolResult("c", "t", None), "ToolResult.content"),  # type: ignore[arg-type]
        (ToolResult("c", "t", "ok", "yes"), "ToolResult.is_error"),  # type: ignore[arg-type]
        (Report(usage={"input_tokens": 3}), "Report.usage"),  # type: ignore[arg-type]
        (Report(usage=Usage(input_tokens=None)), "Usage.input_tokens"),  # type: ignore[arg-type]
        (Report(usage=Usage(output_tokens=True)), "Usage.output_tokens"),
        (Report(usage=Usage(requests=-1)), "Usage.requests"),
        (Report(usage=Usage(input_tokens=1 << 63)), "Usage.input_tokens"),
        (Report(usage=Usage(input_tokens=float("nan"))), "Usage.input_tokens"),  # type: ignore[arg-type]
        (Report(usage=Usage(input_tokens=float("inf"))), "Usage.input_tokens"),  # type: ignore[arg-type]
        (Report(model=42), "Report.model"),  # type: ignore[arg-type]
        (Report(model="m" * 5_000), "Report.model"),
        (Report(model="m\ud800"), "Report.model"),
        (Report(finish_reason="finished"), "Report.finish_reason"),  # type: ignore[arg-type]
        (Report(finish_reason={}), "Report.finish_reason"),  # type: ignore[arg-type]
    ],
)
async def test_r21_a_value_that_cannot_be_stored_fails_the_run_and_names_the_field(
    store: Store, event: Wrong, field_name: str
) -> None:
    complete = await run_beside_another(store, Agent([TextDelta("so far"), event]))
    assert (complete.state, complete.text) == (RunState.FAILED, "so far")
    assert complete.error is not None
    assert complete.error.reason == "AGENT_ERROR"
    assert field_name in complete.error.message


async def test_harmless_deviations_are_corrected(store: Store) -> None:
    events = [
        ToolCall("c" * 8_000, "look", "{}"),
        ToolResult("c" * 8_000, "look", "ok"),
        TextDelta(Word("said")),
        Report(Usage(input_tokens=14417.92), finish_reason="length"),  # type: ignore[arg-type]
        Report(Usage(output_tokens=2.5)),  # type: ignore[arg-type]
    ]
    complete = await run_beside_another(store, Agent(events))
    assert complete.state is RunState.COMPLETED
    assert complete.text == "said"
    assert complete.finish_reason is FinishReason.LENGTH
    assert complete.usage == Usage(input_tokens=14418, output_tokens=2)


async def test_usage_that_adds_up_to_more_than_can_be_stored_stays_at_the_most(
    store: Store,
) -> None:
    half = Report(Usage(input_tokens=1 << 62, requests=1))
    complete = await run_beside_another(store, Agent([half, half, half]))
    assert complete.state is RunState.COMPLETED
    assert complete.usage == Usage(input_tokens=MAX_COUNT, requests=3)


class RudeError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class OddError(BaseException):
    pass


def fail_with(
    kind: Callable[..., BaseException], *given: Wrong, **named: Wrong
) -> Callable[[], None]:
    """Raises a new exception for each call: one that is kept would keep the run's frames alive."""

    def fail() -> None:
        raise kind(*given, **named)

    return fail


@pytest.mark.parametrize(
    ("then", "reason", "message"),
    [
        (lambda: sys.exit(3), "AGENT_ERROR", "the agent raised SystemExit: 3"),
        (fail_with(KeyboardInterrupt), "AGENT_ERROR", "the agent raised KeyboardInterrupt: "),
        (fail_with(OddError, "odd"), "AGENT_ERROR", "OddError: odd"),
        (fail_with(RudeError), "AGENT_ERROR", "RudeError (its text could not be read)"),
        (fail_with(AgentError, "m", reason="R\ud800"), "AGENT_ERROR", "m"),
        (fail_with(AgentError, "m", reason="R" * 5_000), "AGENT_ERROR", "m"),
        (fail_with(AgentError, "m", reason=7), "AGENT_ERROR", "m"),
        (
            fail_with(AgentError, None),
            "AGENT_ERROR",
            "the agent failed with a message of type NoneType",
        ),
    ],
)
async def test_r21_any_exception_of_an_agent_ends_its_run_only(
    store: Store, then: Callable[[], None], reason: str, message: str
) -> None:
    complete = await run_beside_another(store, Agent([TextDelta("so far")], then))
    assert (complete.state, complete.text) == (RunState.FAILED, "so far")
    assert complete.error is not None
    assert (complete.error.reason, complete.error.message) == (reason, message)


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ('{"a": 1.50, "b": [null]}', '{"a": 1.50, "b": [null]}'),
        ('{"a": "\\u00e9"}', '{"a": "\\u00e9"}'),
        ("", "{}"),
        (" \n", "{}"),
        ("not json", '{"INVALID_JSON": "not json"}'),
        ('{"half": ', '{"INVALID_JSON": "{\\"half\\": "}'),
        ("[1]", '{"INVALID_JSON": "[1]"}'),
        ("null", '{"INVALID_JSON": "null"}'),
        ("7", '{"INVALID_JSON": "7"}'),
        ('{"a": NaN}', '{"INVALID_JSON": "{\\"a\\": NaN}"}'),
        ('{"a": -Infinity}', '{"INVALID_JSON": "{\\"a\\": -Infinity}"}'),
        ('{"a": 1}{"b": 2}', '{"INVALID_JSON": "{\\"a\\": 1}{\\"b\\": 2}"}'),
        ('{"a": "\n"}', '{"INVALID_JSON": "{\\"a\\": \\"\\n\\"}"}'),
        ("\0", '{"INVALID_JSON": "\\u0000"}'),
        ('{"a": "\\ud800"}', '{"a": "\ufffd"}'),
        ('{"a": "\\ud83d\\ude00"}', '{"a": "\\ud83d\\ude00"}'),
        ("\ud800", '{"INVALID_JSON": "\ufffd"}'),
        ('{"a": ' + "9" * 5_000 + "}", None),
        ("[" * 100_000, None),
        ('{"a": ' * 100_000, None),
        ("\x01" * (1 << 20), None),
    ],
)
async def test_arguments_of_a_tool_call_are_stored_as_a_strict_json_object(
    store: Store, given: str, stored: str | None
) -> None:
    agent = Agent([ToolCall("c", "look", given), ToolResult("c", "look", "ok")])
    async with running(store, agent=agent) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
        assert complete.state is RunState.COMPLETED
        (call,) = (
            part
            for message in await node.messages("s")
            for part in message.parts
            if isinstance(part, ToolCall)
        )
    assert isinstance(json.loads(call.arguments_json, parse_constant=refuse), dict)
    assert len(call.arguments_json.encode()) <= 1 << 20
    assert stored in {None, call.arguments_json}


@pytest.mark.parametrize(
    ("deltas", "text"),
    [
        (["ok \ud83d", "\ude00 end"], "ok \U0001f600 end"),
        (["lone \ud83d", " half"], "lone \ufffd half"),
        (["last \ud83d"], "last \ufffd"),
        (["\ud83d", "\ud83d", "\ude00"], "\ufffd\U0001f600"),
    ],
)
async def test_a_character_cut_between_two_deltas_is_joined(
    store: Store, deltas: list[str], text: str
) -> None:
    complete = await run_beside_another(store, Agent([TextDelta(delta) for delta in deltas]))
    assert complete.text == text


class Halves(Agent):
    """Yields the two halves of a character, and has the first one stored in between."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        yield TextDelta("\ud83d")
        await turn.take_folded()
        yield TextDelta("\ude00")


async def test_the_first_half_of_a_character_is_not_stored_as_an_empty_delta(store: Store) -> None:
    async with running(store, agent=Halves([])) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
        events = await node.events(complete.run_id)
    deltas = [event.body.text for event in events if isinstance(event.body, TextDelta)]
    assert deltas == ["\U0001f600"]


async def test_a_half_character_is_not_joined_across_a_tool_call(store: Store) -> None:
    events = [
        TextDelta("a\ud83d"),
        ToolCall("c", "look", "{}"),
        ToolResult("c", "look", "ok"),
        TextDelta("\ude00b"),
    ]
    complete = await run_beside_another(store, Agent(events))
    assert complete.text == "\ufffdb"


async def test_r21_an_end_that_cannot_be_written_is_replaced_by_one_of_safe_fields(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = LaneAccess.finish

    async def fail_with_output(self: LaneAccess, *given: Wrong) -> None:
        outcome = next(one for one in given if isinstance(one, Outcome))
        if outcome.content and outcome.content[0].parts:
            raise OverflowError("a value that no store takes")
        await finish(self, *given)

    agent = Agent([TextDelta("output")])
    async with running(store, agent=agent) as node:
        with monkeypatch.context() as patch:
            patch.setattr(LaneAccess, "finish", fail_with_output)
            async with asyncio.timeout(10):
                complete = await node.coordinator.run("s", Prompt("x"))
        assert complete.state is RunState.FAILED
        assert complete.error is not None
        assert complete.error.reason == "AGENT_ERROR"
        async with asyncio.timeout(10):
            assert (await node.coordinator.run("s", Prompt("y"))).text == "output"


async def test_r21_a_supervisor_that_fails_ends_its_run(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Runner, *_: object) -> Outcome:
        raise ZeroDivisionError("a bug of the supervisor")

    async with running(store, agent=Agent([TextDelta("x")])) as node:
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "_outcome", broken)
            async with asyncio.timeout(10):
                complete = await node.coordinator.run("s", Prompt("x"))
        assert complete.state is RunState.FAILED
        async with asyncio.timeout(10):
            assert (await node.coordinator.run("s", Prompt("y"))).state is RunState.COMPLETED
