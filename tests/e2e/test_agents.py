"""Agents that are programs, models or modules, as clients see them over the wire."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from runlane import Client, FinishReason, Folded, RunError, RunHandle, RunState, Usage, WhenBusy
from runlane_server.config.settings import EVENT_LOOPS
from support.openai_server import Answer, OpenAIServer
from support.processes import is_running, wait_for_exit
from support.server import ServerProcess, serving
from support.staging import SECONDS
from support.wire import Wire, check_turn, text_of, wait_for_text

S = RunState


@pytest.fixture(params=[name for name in EVENT_LOOPS if name != "auto"])
def _event_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event loop starts processes in its own way."""
    monkeypatch.setenv("RUNLANE_EVENT_LOOP", request.param)


on_each_loop = pytest.mark.usefixtures("_event_loop")


@asynccontextmanager
async def using(
    folder: Path, agent: str, *flags: str, env: dict[str, str] | None = None
) -> AsyncIterator[tuple[ServerProcess, Wire]]:
    """A server with an agent, and a client of it."""
    async with (
        serving(folder, "--agent", agent, *flags, env=env) as server,
        Client(server.address) as client,
    ):
        yield server, Wire(client)


async def ask(wire: Wire, prompt: str, **options: Any) -> RunHandle:
    return await wire.client.run_accepted("s", prompt, allow_missing=True, **options)


# --- Programs -----------------------------------------------------------------------------------


def program(folder: Path, code: str) -> str:
    """Writes a shell script; returns the argv that runs it."""
    script = folder / "agent.sh"
    script.write_text(f"#!/bin/sh\n{code}\n")
    script.chmod(0o755)
    return f"'{script}'"


STAYS = """
sleep 600 &
echo "at work: $$ $!."
wait
"""
"""A program that prints its process id and that of its child, and stays."""


async def wait_for_pids(handle: RunHandle, *, attempt: int = 1) -> list[int]:
    """The process ids that a staying program has printed."""
    said = await wait_for_text(handle, ".\n", attempt=attempt)
    return [int(word) for word in said.rstrip(".\n").split()[-2:]]


@on_each_loop
async def test_the_output_of_a_program_is_streamed_before_it_exits(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = program(tmp_path, f'read -r prompt; echo "so far: $prompt"; cat "{gate}"; echo end')
    async with using(tmp_path, f"command:{script}") as (_, wire):
        handle = await ask(wire, "why?\n")
        assert await wait_for_text(handle, "\n") == "so far: why?\n"
        assert (await wire.client.get_run(handle.run_id)).state is S.ACTIVE
        await asyncio.to_thread(gate.write_text, "more\n")
        complete = await wire.end(handle)
        assert complete.text == "so far: why?\nmore\nend\n"
        assert (complete.state, complete.finish_reason) == (S.COMPLETED, FinishReason.STOP)
        check_turn(complete, await wire.messages("s"))


@on_each_loop
async def test_r09_r16_a_cancel_ends_the_program_and_keeps_its_text(tmp_path: Path) -> None:
    async with using(tmp_path, f"command:{program(tmp_path, STAYS)}") as (_, wire):
        handle = await ask(wire, "x")
        pids = await wait_for_pids(handle)
        assert all(map(is_running, pids))
        await handle.cancel("enough")
        complete = await wire.end(handle)
        # The program ends before its end is reported; its child gets the signal too, but may lag
        assert not is_running(pids[0])
        await wait_for_exit(pids[1])
        assert (complete.state, complete.finish_reason) == (S.CANCELLED, FinishReason.CANCELED)
        assert complete.cancel_reason == "enough"
        assert complete.text == f"at work: {pids[0]} {pids[1]}.\n"
        check_turn(complete, await wire.messages("s"))


@on_each_loop
async def test_the_error_of_a_failed_program_has_its_stderr(tmp_path: Path) -> None:
    script = program(tmp_path, "echo half; echo first >&2; echo 'no disk' >&2; exit 3")
    async with using(tmp_path, f"command:{script}") as (_, wire):
        complete = await wire.end(await ask(wire, "x"))
        assert (complete.state, complete.finish_reason) == (S.FAILED, FinishReason.ERROR)
        assert complete.error is not None
        assert complete.error.reason == "COMMAND_FAILED"
        assert "exited with code 3" in complete.error.message
        assert complete.error.message.endswith("no disk")
        assert complete.text == "half\n"
        check_turn(complete, await wire.messages("s"))


HISTORY = """
import json, sys
turn = json.load(sys.stdin)
for message in turn["history"]:
    print(message["role"], *(part["text"] for part in message["parts"]), sep=": ")
print("now", turn["prompt"], turn["metadata"].get("tone"), sep=": ")
"""


async def test_a_program_gets_the_earlier_turns_as_json(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(HISTORY)
    agent = f"command+json:{sys.executable} agent.py"
    async with using(tmp_path, agent, "--command-cwd", ".") as (_, wire):
        first = await wire.end(await ask(wire, "one", metadata={"tone": "kind"}))
        assert first.text == "now: one: kind\n"
        second = await wire.end(await ask(wire, "two"))
        assert second.text.splitlines() == [
            "user: one",
            *("assistant: now: one: kind", ""),
            "now: two: None",
        ]


@on_each_loop
async def test_r21_no_program_outlives_a_killed_server(tmp_path: Path) -> None:
    async with using(tmp_path, f"command:{program(tmp_path, STAYS)}") as (server, wire):
        handle = await ask(wire, "x")
        pids = await wait_for_pids(handle)
        await server.kill()
        for pid in pids:
            await wait_for_exit(pid)
        await server.start()
        complete = await wire.end(handle)
        assert (complete.state, complete.finish_reason) == (S.FAILED, FinishReason.INTERRUPTED)
        assert complete.text == f"at work: {pids[0]} {pids[1]}.\n"
        check_turn(complete, await wire.messages("s"))


@on_each_loop
async def test_a_stopping_server_ends_its_programs(tmp_path: Path) -> None:
    agent = f"command:{program(tmp_path, STAYS)}"
    async with using(tmp_path, agent, "--drain-timeout", "0s") as (server, wire):
        once = await ask(wire, "x")
        twice = await wire.client.run_accepted("t", "x", max_attempts=2, allow_missing=True)
        pids = await wait_for_pids(once) + await wait_for_pids(twice)
        assert await server.stop(signal.SIGTERM) == 0
        assert not is_running(pids[0])
        assert not is_running(pids[2])
        for pid in pids:
            await wait_for_exit(pid)
        await server.start()
        complete = await wire.end(once)
        assert (complete.state, complete.finish_reason) == (S.FAILED, FinishReason.INTERRUPTED)
        # The run with attempts left is started again.
        again = await wait_for_pids(twice, attempt=2)
        assert is_running(again[0])
        await twice.cancel()
        ended = await wire.end(twice)
        assert (ended.state, ended.attempt) == (S.CANCELLED, 2)
        assert ended.text == f"at work: {again[0]} {again[1]}.\n"


# --- Models -------------------------------------------------------------------------------------


@pytest.fixture
async def model() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer().serving() as serving_:
        yield serving_


def chatting(
    folder: Path, model: OpenAIServer
) -> AbstractAsyncContextManager[tuple[ServerProcess, Wire]]:
    """A server whose agent is a language model."""
    env = {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "sk-secret-0123456789"}
    return using(folder, "chat:openai:small", env=env)


def sent(model: OpenAIServer, request: int) -> list[tuple[str, str]]:
    """The messages that the model got with a request."""
    return [(m["role"], m["content"]) for m in model.requests[request].messages]


async def test_a_model_gets_the_earlier_turns_and_its_tokens_are_counted(
    tmp_path: Path, model: OpenAIServer
) -> None:
    model.answer(Answer(text=["I am ", "fine"]), Answer(text=["As I said"]))
    async with chatting(tmp_path, model) as (_, wire):
        first = await wire.end(await ask(wire, "how are you?"))
        assert (first.state, first.text) == (S.COMPLETED, "I am fine")
        assert first.usage == Usage(input_tokens=10, output_tokens=5, requests=1)
        second = await wire.end(await ask(wire, "really?"))
        assert second.usage == Usage(input_tokens=30, output_tokens=5, requests=1)
        assert sent(model, 1) == [
            ("user", "how are you?"),
            ("assistant", "I am fine"),
            ("user", "really?"),
        ]
        session = await wire.client.get_session("s")
        assert session.usage == Usage(input_tokens=40, output_tokens=10, requests=2)
        messages = await wire.messages("s")
        check_turn(second, messages)
        assert [m.model for m in messages if m.role == "assistant"] == ["small-1", "small-1"]


async def test_requests_to_a_model_are_not_in_the_log(tmp_path: Path, model: OpenAIServer) -> None:
    model.answer("fine")
    async with chatting(tmp_path, model) as (server, wire):
        assert (await wire.end(await ask(wire, "hi"))).state is S.COMPLETED
        await server.logs("serving")
        assert "HTTP" not in server.log
        assert model.base_url not in server.log


async def test_r16_a_cancel_closes_the_stream_of_a_model_and_keeps_its_text(
    tmp_path: Path, model: OpenAIServer
) -> None:
    model.answer(Answer(text=["half an ", "answer"], hold=True), "and now the rest")
    async with chatting(tmp_path, model) as (_, wire):
        handle = await ask(wire, "tell me")
        await wait_for_text(handle, "half an answer")
        await handle.cancel()
        complete = await wire.end(handle)
        assert (complete.state, complete.text) == (S.CANCELLED, "half an answer")
        check_turn(complete, await wire.messages("s"))
        async with asyncio.timeout(SECONDS):
            await model.requests[0].disconnected.wait()
        assert (await wire.end(await ask(wire, "go on"))).text == "and now the rest"
        assert sent(model, 1) == [
            ("user", "tell me"),
            ("assistant", "half an answer"),
            ("user", "go on"),
        ]


async def test_r26_a_prompt_is_folded_into_the_turn_of_a_model(
    tmp_path: Path, model: OpenAIServer
) -> None:
    model.answer(Answer(text=["at length, "], hold=True), "in short")
    async with chatting(tmp_path, model) as (_, wire):
        active = await ask(wire, "explain")
        await wait_for_text(active, "at length")
        folded = await ask(wire, "shorter, please", when_busy=WhenBusy.FOLD)
        model.release()
        ends = [await wire.end(handle) for handle in (active, folded)]
        assert [end.state for end in ends] == [S.COMPLETED, S.COMPLETED]
        assert ends[1].folded_into == active.run_id
        assert ends[0].text == "in short"  # the last message of the turn, as in the transcript
        events = [event.body async for event in folded.events()]
        assert Folded(folded.run_id, active.run_id) in events
        assert sent(model, 1) == [
            ("user", "explain"),
            ("assistant", "at length, "),
            ("user", "shorter, please"),
        ]
        spoken = [(m.run_id, m.role.value, text_of(m)) for m in await wire.messages("s")]
        assert spoken == [
            (active.run_id, "user", "explain"),
            (active.run_id, "assistant", "at length, "),
            (folded.run_id, "user", "shorter, please"),
            (active.run_id, "assistant", "in short"),
        ]
        # The usage of the turn is recorded once, on the run that the other one joined.
        assert ends[0].usage == Usage(input_tokens=40, output_tokens=10, requests=2)
        assert ends[1].usage is None
        assert (await wire.client.get_session("s")).usage == ends[0].usage


async def test_a_request_refused_by_the_provider_fails_the_run(
    tmp_path: Path, model: OpenAIServer
) -> None:
    refusal = "sk-secret-0123456789 is no good"
    async with chatting(tmp_path, model) as (server, wire):
        for status, reason in ((401, "PROVIDER_AUTH"), (404, "PROVIDER_REJECTED")):
            model.answer(Answer(status=status, error=refusal))
            complete = await wire.end(await ask(wire, str(status)))
            assert (complete.state, complete.finish_reason) == (S.FAILED, FinishReason.ERROR)
            assert complete.error is not None
            assert complete.error.reason == reason
            assert str(status) in complete.error.message
            assert "sk-secret" not in complete.error.message + server.log
            check_turn(complete, await wire.messages("s"))
        assert (await wire.end(await ask(wire, "fine again"))).text == "fine again "


# --- Modules ------------------------------------------------------------------------------------

MODULE = """
from runlane_server.core.model import TextDelta

async def answer(turn):
    for word in turn.prompt.text.split():
        yield word.upper() + " "
    yield TextDelta(f"after {len(await turn.history())}")
    if turn.prompt.text == "fail":
        raise ValueError("no such word")
"""


async def test_a_module_in_the_working_directory_can_be_the_agent(tmp_path: Path) -> None:
    (tmp_path / "my_agent.py").write_text(MODULE)
    async with using(tmp_path, "my_agent:answer") as (server, wire):
        assert (await wire.end(await ask(wire, "one two"))).text == "ONE TWO after 0"
        failed = await wire.end(await ask(wire, "fail"))
        assert (failed.state, failed.text) == (S.FAILED, "FAIL after 2")
        assert failed.error == RunError("AGENT_ERROR", "ValueError: no such word")
        await server.logs("my_agent.py")  # the place of the error
        check_turn(failed, await wire.messages("s"))
