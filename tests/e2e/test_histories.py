"""However a turn with a model ends, the strictest provider takes the prompt after it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from runlane import (
    Attachment,
    CancelScope,
    Client,
    FinishReason,
    RunHandle,
    RunState,
    ToolCall,
    ToolResult,
    WhenBusy,
)
from support.openai_server import Answer, OpenAIServer
from support.server import ServerProcess, serving
from support.strict_history import refusal
from support.wire import Wire, wait_for_text

S = RunState
F = FinishReason

AGENT = """
import asyncio
from pydantic_ai import Agent

agent = Agent("openai-chat:small", system_prompt="you work")

@agent.tool_plain
def add(a: int, b: int) -> str:
    return str(a + b)

@agent.tool_plain
def silent() -> str:
    return ""

@agent.tool_plain
async def wait() -> str:
    await asyncio.Event().wait()
    return ""

@agent.tool_plain
def broken() -> str:
    raise OSError("no disk")
"""

PICTURE = Attachment(name="a.png", mime_type="image/png", content=b"\x89PNG")
BROKEN = Attachment(name="b.png", mime_type="image/png", content=b"broken")


def no_broken_picture(messages: list[dict[str, Any]]) -> str | None:
    """Why this provider refuses a request: it is strict, and does not take one of the pictures."""
    if "YnJva2Vu" in str(messages):  # BROKEN in base64
        return "Could not process image"
    return refusal(messages)


@pytest.fixture
async def model() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer(no_broken_picture).serving() as server:
        yield server


@pytest.fixture
async def server(tmp_path: Path, model: OpenAIServer) -> AsyncIterator[ServerProcess]:
    (tmp_path / "worker.py").write_text(AGENT)
    env = {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "sk-secret-0123456789"}
    flags = ("--agent", "worker:agent", "--cancel-grace", "2s")
    async with serving(tmp_path, *flags, env=env) as server:
        yield server


@pytest.fixture
async def wire(server: ServerProcess) -> AsyncIterator[Wire]:
    async with Client(server.address) as client:
        yield Wire(client)


Turn = Callable[[Wire, OpenAIServer, str], Awaitable[RunHandle]]
"""Runs a turn in a session; returns when its end is due."""


async def ask(wire: Wire, session: str, prompt: str = "one", **options: Any) -> RunHandle:
    return await wire.client.run_accepted(session, prompt, allow_missing=True, **options)


def calling(*calls: tuple[str, str], text: str = "") -> Answer:
    """An answer that calls tools, by their names and arguments."""
    return Answer(
        text=[text] if text else [],
        tool_calls=[(f"c{n}", name, args) for n, (name, args) in enumerate(calls)],
    )


async def seen(handle: RunHandle, kind: type) -> None:
    """Returns when the run has an event of a kind."""
    async for event in handle.events():
        if isinstance(event.body, kind):
            return


def answered(*answers: Answer | str, prompt: str = "one", **options: Any) -> Turn:
    """A turn in which the model gives these answers."""

    async def turn(wire: Wire, model: OpenAIServer, session: str) -> RunHandle:
        model.answer(*answers)
        return await ask(wire, session, prompt, **options)

    return turn


def cancelled_at(kind: type, *answers: Answer) -> Turn:
    """A turn that is cancelled when it has an event of a kind."""

    async def turn(wire: Wire, model: OpenAIServer, session: str) -> RunHandle:
        handle = await answered(*answers)(wire, model, session)
        await seen(handle, kind)
        await handle.cancel()
        return handle

    return turn


async def cancelled_in_text(wire: Wire, model: OpenAIServer, session: str) -> RunHandle:
    handle = await answered(Answer(text=["half an"], hold=True))(wire, model, session)
    await wait_for_text(handle, "half an")
    await handle.cancel()
    return handle


async def cancelled_on_entry(wire: Wire, model: OpenAIServer, session: str) -> RunHandle:
    """The run waits behind another one, and both are cancelled."""
    first = await answered(calling(("wait", "{}")))(wire, model, session)
    await seen(first, ToolCall)
    second = await ask(wire, session, "two")
    await wire.client.cancel(session, scope=CancelScope.SESSION)
    await wire.end(first)
    return second


async def folded_behind_results(wire: Wire, model: OpenAIServer, session: str) -> RunHandle:
    """A run joins the turn while the model writes a call, so it is sent after the result."""
    first = calling(("add", '{"a": 1, "b": 2}'), text="let me see")
    first.hold = True
    handle = await answered(first, "both")(wire, model, session)
    await wait_for_text(handle, "let me see")
    await ask(wire, session, "joins", when_busy=WhenBusy.FOLD)
    model.release()
    return handle


async def folded_and_cancelled(wire: Wire, model: OpenAIServer, session: str) -> RunHandle:
    """A run joins the turn, which is cancelled before the model has answered it."""
    handle = await answered(Answer(text=["half an"], hold=True), Answer(hold=True))(
        wire, model, session
    )
    await wait_for_text(handle, "half an")
    folded = await ask(wire, session, "joins", when_busy=WhenBusy.FOLD)
    model.release()
    await model.arrived(2)
    await handle.cancel()
    await wire.end(folded)
    return handle


ADD = '{"a": 1, "b": 2}'

ENDS: dict[str, tuple[Turn, RunState, FinishReason]] = {
    "completed": (answered("fine"), S.COMPLETED, F.STOP),
    "completed after tools": (
        answered(calling(("add", ADD), ("silent", "{}")), "fine"), S.COMPLETED, F.STOP),
    "length": (answered(Answer(text=["half"], finish="length")), S.COMPLETED, F.LENGTH),
    "content filter": (
        answered(Answer(text=["half"], finish="content_filter")), S.COMPLETED, F.CONTENT_FILTER),
    "content filter at once": (
        answered(Answer(finish="content_filter")), S.COMPLETED, F.CONTENT_FILTER),
    "length in a call": (
        answered(*[Answer(tool_calls=[("c", "add", '{"a": 1')], finish="length")] * 3),
        S.COMPLETED, F.LENGTH),
    "silence after tools": (
        answered(calling(("add", ADD)), Answer()), S.COMPLETED, F.STOP),
    "only thoughts": (answered(*[Answer(reasoning=["hm"])] * 3), S.FAILED, F.ERROR),
    "the same id twice in an answer": (
        answered(Answer(tool_calls=[("c", "add", ADD), ("c", "add", ADD)]), "fine"),
        S.COMPLETED, F.STOP),
    "the same id in two answers": (
        answered(calling(("add", ADD)), calling(("add", ADD)), "fine"), S.COMPLETED, F.STOP),
    "arguments that are no object": (
        answered(calling(("add", "[]")), calling(("add", '{"a": NaN}')), "fine"),
        S.FAILED, F.ERROR),
    "a tool that does not exist": (
        answered(calling(("functions.add", ADD)), "fine"), S.COMPLETED, F.STOP),
    "a tool that fails": (answered(calling(("broken", "{}"))), S.FAILED, F.ERROR),
    "cancelled in text": (cancelled_in_text, S.CANCELLED, F.CANCELED),
    "cancelled in a tool": (
        cancelled_at(ToolCall, calling(("wait", "{}"))), S.CANCELLED, F.CANCELED),
    "cancelled in one of two tools": (
        cancelled_at(ToolResult, calling(("wait", "{}"), ("add", ADD))), S.CANCELLED, F.CANCELED),
    "cancelled behind a result": (
        cancelled_at(ToolResult, calling(("add", ADD)), Answer(hold=True)),
        S.CANCELLED, F.CANCELED),
    "cancelled on entry": (cancelled_on_entry, S.CANCELLED, F.CANCELED),
    "timeout in a tool": (
        answered(calling(("wait", "{}")), timeout=0.5), S.FAILED, F.TIMEOUT),
    "timeout in text": (
        answered(Answer(text=["half"], hold=True), timeout=0.5), S.FAILED, F.TIMEOUT),
    "the provider is down behind a result": (
        answered(calling(("add", ADD)), *[Answer(status=503)] * 3), S.FAILED, F.ERROR),
    "the answer is cut off": (answered(Answer(text=["half"], cut=True)), S.FAILED, F.ERROR),
    "a call is cut off": (
        answered(Answer(tool_calls=[("c", "add", ADD)], cut=True)), S.FAILED, F.ERROR),
    "the connection breaks": (answered(Answer(text=["half"], drop=True)), S.FAILED, F.ERROR),
    "rejected after some words": (
        answered(Answer(text=["I see"], failure=400), attachments=[PICTURE]), S.FAILED, F.ERROR),
    "an attachment that the provider rejects": (
        answered(attachments=[BROKEN]), S.FAILED, F.ERROR),
    "an attachment that the model does not take": (
        answered(attachments=[Attachment("v", b"x", "video/mp4")]), S.FAILED, F.ERROR),
    "a picture": (answered("seen", attachments=[PICTURE]), S.COMPLETED, F.STOP),
    "blanks": (answered(Answer(text=[" \n"])), S.COMPLETED, F.STOP),
    "folded": (folded_behind_results, S.COMPLETED, F.STOP),
    "folded and cancelled": (folded_and_cancelled, S.CANCELLED, F.CANCELED),
}  # fmt: skip
"""Ways in which a turn can end."""


async def test_r16_the_next_prompt_is_answered_by_a_strict_provider(
    wire: Wire, model: OpenAIServer
) -> None:
    problems = {}
    for end, (turn, state, reason) in ENDS.items():
        model.forget()
        ended = await wire.end(await turn(wire, model, end))
        if (ended.state, ended.finish_reason) != (state, reason):
            problems[end] = f"ended with {ended}"
        for prompt in ("next", "and next"):
            model.forget()
            model.answer(f"to {prompt}")
            following = await wire.end(await ask(wire, end, prompt))
            if (following.text, model.refused) != (f"to {prompt}", []):
                problems[end] = f"{prompt}: {model.refused} {following}"
    assert problems == {}


async def test_r16_r21_the_next_prompt_is_answered_after_the_node_was_killed_in_a_tool(
    wire: Wire, model: OpenAIServer, server: ServerProcess
) -> None:
    model.answer(calling(("wait", "{}"), ("add", ADD), text="let me see"))
    handle = await ask(wire, "s")
    await seen(handle, ToolResult)
    await server.kill()
    await server.start()
    lost = await wire.end(handle)
    assert (lost.state, lost.finish_reason) == (S.FAILED, F.INTERRUPTED)
    model.answer("fine")
    assert (await wire.end(await ask(wire, "s", "next"))).text == "fine"
    assert model.refused == []
