"""Agents in processes of their own: what their code does costs nobody else anything."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from runlane import (
    Artifact,
    Client,
    Custom,
    InputClosed,
    RunComplete,
    RunHandle,
    RunState,
    Started,
    TextDelta,
    ToolCall,
    ToolResult,
    WhenBusy,
)
from support.processes import is_running, wait_for_exit
from support.server import ServerProcess, serving, start_fails
from support.staging import SECONDS
from support.workers import requested

MODULE = """
import asyncio, ctypes, os, sys, time
from runlane_server.agents.base import Artifact, Custom, Result

def read(name):
    with open(name) as file:
        return file.readline().strip()

async def answer(turn):
    what, _, rest = turn.prompt.text.partition(" ")
    match what:
        case "pid":
            yield str(os.getpid())
        case "hold":
            yield f"<{os.getpid()}>"
            yield await asyncio.to_thread(read, rest)
        case "forever":
            yield f"<{os.getpid()}>"
            await asyncio.Event().wait()
        case "die":
            yield "dying"
            os._exit(3)
        case "crash":
            yield "crashing"
            ctypes.string_at(0)
        case "exit":
            sys.exit(4)
        case "retry":
            if turn.attempt == 1:
                os._exit(3)
            yield f"attempt {turn.attempt} in {os.getpid()}"
        case "block":
            yield f"<{os.getpid()}>"
            await asyncio.sleep(0.2)  # the text is sent meanwhile
            while True:
                pass
        case "raise":
            raise ValueError("boom")
        case "bad":
            yield 7
        case "history":
            for message in await turn.history():
                yield f"{message.role}: {''.join(part.text for part in message.parts)}; "
        case "step":
            yield await turn.step("one", lambda: "done")
        case "custom":
            yield Custom("x", 1)
            yield Artifact(artifact_id="a", name="a.txt", text="text")
            yield Result({"n": 1})
        case "ask":
            built = await turn.step("build", build)
            answer = await turn.ask("well?")
            yield f"{built}, {answer}"
        case "fold":
            yield "<fold>"
            await asyncio.to_thread(read, rest)
            for one in await turn.take_folded():
                yield f"and {one.prompt.text}"
        case _:
            yield turn.prompt.text

from pydantic_ai import Agent
from pydantic_ai.models.function import DeltaToolCall, FunctionModel

async def think(messages, _):
    if any(part.part_kind == "tool-return" for message in messages for part in message.parts):
        yield "All done."
        return
    yield "Let me delete it. "
    yield {0: DeltaToolCall("delete", '{"path": "a"}', tool_call_id="call-1")}
    yield {1: DeltaToolCall("delete", '{"path": "b"}', tool_call_id="call-2")}

careful = Agent(FunctionModel(stream_function=think))

@careful.tool_plain(requires_approval=True)
def delete(path: str) -> str:
    with open("deleted-files", "a") as file:
        file.write(path)
    return f"deleted {path} in {os.getpid()}"

def build():
    with open("built", "a") as file:
        file.write("x")
    return "built once"

def blocking_asker(turn):
    built = turn.step("build", build)
    yield f"{built}, {turn.ask('well?')}"

def plain(turn):
    yield turn.prompt.text.upper()
    yield f" {turn.metadata['k']} {turn.attempt}"

class Keeper:
    async def start(self):
        pass
    async def run(self, turn):
        yield "kept"
    async def close(self):
        with open("closed", "a") as file:
            file.write("closed")
    def session_deleted(self, key):
        with open("deleted", "a") as file:
            print(key.tenant, key.session_id, file=file)

from runlane_server.agents.base import TextDelta
from runlane_server.agents.questions import Asked

KEPT = {
    "cjk": "\N{CJK UNIFIED IDEOGRAPH-4E16}" * (1 << 20),
    "json": '["\\\\n",' * (1 << 19),
    "control": "\\x01" * (3 << 20),
    "large": "x" * ((3 << 20) + 1),
    "half": "\\ud800",
    "empty": "",
}

class Leaves:
    async def start(self):
        pass
    async def run(self, turn):
        name = turn.prompt.text
        if not turn.checkpoint:
            text = "?" * 250_000
            asked = [Asked(text, key=f"k{n}", choices=("yes", "no")) for n in range(4)]
            await turn.ask_and_leave(asked, KEPT[name])
            return
        answers = [await turn.answer_to(f"k{n}") for n in range(4)]
        yield TextDelta(f"{turn.checkpoint == KEPT[name]} {answers}")
    async def close(self):
        pass

class Never:
    async def start(self):
        raise RuntimeError("no licence")
    def run(self, turn):
        pass
    async def close(self):
        pass
"""

FLAGS = ("--agent", "mine:answer", "--agent", "other=mine:answer", "--agent-processes", "2")


class Gate:
    """A named pipe at which an agent waits, in a process of any kind, until it is opened."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._file = os.open(path, os.O_RDWR)  # never blocks, and keeps what is written

    def open(self) -> None:
        os.write(self._file, b"done\n")

    def read(self) -> bytes:
        return os.read(self._file, 1000)


@asynccontextmanager
async def _serving(folder: Path, *flags: str) -> AsyncIterator[tuple[ServerProcess, Client]]:
    (folder / "mine.py").write_text(MODULE)
    async with serving(folder, *(flags or FLAGS)) as server, Client(server.address) as client:
        yield server, client


async def _accept(client: Client, prompt: str, **options: object) -> RunHandle:
    session = (await client.create_session()).session_id
    return await client.run_accepted(session, prompt, **options)  # type: ignore[arg-type]


async def _run(client: Client, prompt: str, **options: object) -> RunComplete:
    async with asyncio.timeout(SECONDS):
        return await (await _accept(client, prompt, **options)).completed()


async def _first_text(handle: RunHandle) -> str:
    """The first text of a run."""
    async with asyncio.timeout(SECONDS):
        async for event in handle.events():
            if isinstance(event.body, TextDelta):
                return event.body.text
    raise AssertionError("the run has no text")


async def _held(client: Client, prompt: str, **options: object) -> tuple[RunHandle, int]:
    """A run that has said in which process it is."""
    handle = await _accept(client, prompt, **options)
    return handle, int((await _first_text(handle)).strip("<>"))


@pytest.mark.parametrize("processes", [0, 1])
async def test_an_agent_behaves_the_same_in_a_process_of_its_own(
    tmp_path: Path, processes: int
) -> None:
    gate = Gate(tmp_path / "go")
    flags = ("--agent", "mine:answer", "--agent", "plain=mine:plain")
    async with _serving(tmp_path, *flags, "--agent-processes", str(processes)) as (server, client):
        pid = int((await _run(client, "pid")).text)
        assert (pid == server.pid) is (processes == 0)
        assert (await _run(client, "hi", agent="plain", metadata={"k": "v"})).text == "HI v 1"
        for prompt, message in (
            ("raise", "ValueError: boom"),
            ("exit", "the agent raised SystemExit: 4"),
            ("bad", "the agent yielded a int; expected a string or an AgentEvent"),
        ):
            error = (await _run(client, prompt)).error
            assert error is not None
            assert error.message == message
        await client.run_accepted("s", "one", allow_missing=True)
        last = await client.run_accepted("s", "history")
        assert (await last.completed(SECONDS)).text == "user: one; assistant: one; "
        folding = await client.run_accepted("s", "fold go")
        assert await _first_text(folding) == "<fold>"
        folded = await client.run_accepted("s", "more", when_busy=WhenBusy.FOLD)
        gate.open()
        assert (await folding.completed(SECONDS)).text == "and more"
        assert (await folded.completed(SECONDS)).folded_into == folding.run_id
        held, _ = await _held(client, "forever")
        await client.cancel(held.run.session_id)
        assert (await held.completed(SECONDS)).state is RunState.CANCELLED


@pytest.mark.parametrize("prompt", ["die", "crash"])
async def test_a_process_that_ends_costs_the_runs_in_it_only(tmp_path: Path, prompt: str) -> None:
    gates = [Gate(tmp_path / "one"), Gate(tmp_path / "two")]
    async with _serving(tmp_path) as (server, client):
        beside, _ = await _held(client, "hold one", agent="other")
        spared, pid = await _held(client, "hold two")
        lost = await _run(client, prompt)
        assert (lost.state, lost.error and lost.error.reason) == (RunState.FAILED, "INTERRUPTED")
        assert lost.error is not None
        assert lost.error.message == "the process of its agent has ended"
        assert is_running(pid), "runs are spread over the processes"
        for gate, handle in zip(gates, (beside, spared), strict=True):
            gate.open()
            assert (await handle.completed(SECONDS)).text.endswith("done")
        await server.logs("agent process exited")
        # A turn that is lost on its way to a process that ends has a number, and does not count.
        retried = await _run(client, "retry", max_attempts=2)
        assert re.match(r"attempt [2-9] in ", retried.text)


async def test_r09_a_process_that_is_blocked_gets_no_runs_and_is_replaced(tmp_path: Path) -> None:
    flags = (*FLAGS, "--cancel-grace", "1s")
    async with _serving(tmp_path, *flags) as (server, client):
        blocked, pid = await _held(client, "block")
        begun = time.monotonic()
        while "agent process does not respond" not in server.log:
            assert time.monotonic() - begun < SECONDS
            assert (await _run(client, "pid", agent="other")).text
        # More than the blocked process has, so that it would be next.
        beside = [await _held(client, "forever") for _ in range(3)]
        assert pid not in [other for _, other in beside]
        receipt = await client.cancel(blocked.run.session_id)
        assert [it.run_id for it in receipt.cancelled] == [blocked.run_id]
        assert (await blocked.completed(SECONDS)).state is RunState.CANCELLED
        await wait_for_exit(pid)
        await server.logs("agent process killed: its code does not return")


async def test_signals_of_a_service_manager_leave_the_runs_alone(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "go")
    async with _serving(tmp_path) as (server, client):
        held, pid = await _held(client, "hold go")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        server.send(signal.SIGTERM)
        await server.logs('"draining"')
        subscription = asyncio.create_task(held.completed())
        gate.open()
        assert (await subscription).text == f"<{pid}>done"
        assert await server.wait() == 0
        await wait_for_exit(pid)


async def test_r17_a_shutdown_writes_the_ends_of_runs_in_processes(tmp_path: Path) -> None:
    async with _serving(tmp_path, *FLAGS, "--drain-timeout", "0s") as (server, client):
        held, pid = await _held(client, "forever")
        assert await server.stop() == 0
        assert "run left to its worker" not in server.log
        assert '"finish_reason": "interrupted"' in server.log
        await server.start()
        async with Client(server.address) as later:
            complete = (await later.get_run(held.run_id)).run_complete
        assert complete is not None
        assert (complete.text, complete.attempt) == (f"<{pid}>", 1)


async def test_processes_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (server, client):
        _, pid = await _held(client, "forever")
        await server.kill()
        await wait_for_exit(pid)


def test_an_agent_that_cannot_be_imported_is_an_error_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    flags = ("--agent-processes", "1", "--agent")
    assert start_fails(tmp_path, *flags, "mine:missing") == (
        2,
        "runlane-server: error: agent mine:missing: module 'mine' has no attribute 'missing'\n",
    )


async def test_r30_an_agent_that_does_not_get_ready_fails_its_runs(tmp_path: Path) -> None:
    flags = ("--agent", "mine:Never", "--agent-processes", "1")
    async with _serving(tmp_path, *flags) as (_, client):
        error = (await _run(client, "hi")).error
        assert error is not None
        assert error.reason == "AGENT_NOT_READY"
        assert "RuntimeError: no licence" in error.message


async def test_an_agent_learns_of_deleted_sessions_and_is_closed(tmp_path: Path) -> None:
    deleted = Gate(tmp_path / "deleted")
    flags = ("--agent", "mine:Keeper", "--agent-processes", "1")
    async with _serving(tmp_path, *flags) as (server, client):
        await client.create_session("one")
        await client.delete_session("one")
        assert await asyncio.to_thread(deleted.read) == b"default one\n"
        assert await server.stop() == 0
    assert (tmp_path / "closed").read_text() == "closed"


async def test_an_agent_in_a_process_says_what_others_can(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (_, client):
        assert (await _run(client, "step")).text == "done"
        end = await _run(client, "custom")
        assert (end.result, end.error) == ('{"n":1}', None)
        events = [event.body async for event in client.subscribe_run(end.run_id)]
        assert [it.name for it in events if isinstance(it, Artifact)] == ["a.txt"]
        assert Custom("x", "1") in events


@pytest.mark.parametrize("processes", [0, 1])
async def test_an_agent_in_a_process_may_keep_as_much_while_it_waits_as_others(
    tmp_path: Path, processes: int
) -> None:
    flags = ("--agent", "mine:Leaves", "--agent-processes", str(processes))
    async with _serving(tmp_path, *flags) as (_, client):
        for prompt in ("cjk", "json", "control"):
            run = await _accept(client, prompt, max_attempts=1)
            await requested(client, run.run_id)
            async for one in client.list_input_requests(run_id=run.run_id):
                await client.answer_input(one, "yes")
            end = await run.completed(SECONDS)
            assert end.error is None, (prompt, end.error)
            assert end.text == "True ['yes', 'yes', 'yes', 'yes']"
        for prompt, message in (
            ("large", "ask_and_leave: the checkpoint has 3145729 bytes; 3145728 is the limit"),
            ("half", "ask_and_leave: the checkpoint has a lone surrogate, which is no text"),
            ("empty", "ask_and_leave: give a question and a checkpoint"),
        ):
            error = (await _run(client, prompt)).error
            assert error is not None
            assert (error.reason, error.message) == ("AGENT_ERROR", message)


@pytest.mark.parametrize("agent", ["default", "blocking"])
async def test_r44_a_run_that_asks_leaves_its_process_and_starts_again(
    tmp_path: Path, agent: str
) -> None:
    flags = ("--agent", "mine:answer", "--agent", "blocking=mine:blocking_asker")
    async with _serving(tmp_path, *flags, "--agent-processes", "1") as (_, client):
        run = await _accept(client, "ask", agent=agent)
        await client.answer_input(await requested(client, run.run_id), "fine")
        end = await run.completed(SECONDS)
        assert (end.text, end.error, end.attempt) == ("built once, fine", None, 2)
        # Its step is not repeated, and nobody is asked twice.
        assert (tmp_path / "built").read_text() == "x"
        assert len([one async for one in client.list_input_requests(run_id=run.run_id)]) == 1


async def test_r44_a_run_that_asks_survives_the_end_of_its_process(tmp_path: Path) -> None:
    flags = ("--agent", "mine:answer", "--agent-processes", "1", "--max-active-runs", "1")
    async with _serving(tmp_path, *flags) as (_, client):
        run = await _accept(client, "ask", max_attempts=1)
        request = await requested(client, run.run_id)
        # It holds no slot: others run, and the process dies (R40).
        assert (await _run(client, "die")).error is not None
        await client.answer_input(request, "late")
        assert (await run.completed(SECONDS)).text == "built once, late"


async def test_r42_a_cancel_ends_a_run_that_waits_outside_its_process(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (_, client):
        run = await _accept(client, "ask")
        request = await requested(client, run.run_id)
        await client.cancel(run.session_id)
        assert (await run.completed(SECONDS)).state is RunState.CANCELLED
        with pytest.raises(InputClosed):
            await client.answer_input(request, "too late")


@pytest.mark.parametrize("processes", [0, 1])
async def test_r44_approvals_of_tools_continue_the_same_attempt_in_another_process(
    tmp_path: Path, processes: int
) -> None:
    flags = ("--agent", "mine:careful")
    async with _serving(tmp_path, *flags, "--agent-processes", str(processes)) as (_, client):
        run = await _accept(client, "delete them", max_attempts=1)
        request = await requested(client, run.run_id)
        assert (request.tool_name, request.arguments_json) == ("delete", '{"path": "a"}')
        asked = [one async for one in client.list_input_requests(run_id=run.run_id)]
        for one in asked:
            await client.answer_input(one, "a" in one.arguments_json.split('"')[3])
        end = await run.completed(SECONDS)
        assert (end.text, end.error, end.attempt) == ("All done.", None, 1)
        assert (tmp_path / "deleted-files").read_text() == "a"
        bodies = [event.body async for event in client.subscribe_run(run.run_id)]
        # What it has emitted before the question stays, once and in order.
        told = [it for it in bodies if isinstance(it, TextDelta | ToolCall | ToolResult)]
        assert "".join(it.text for it in told if isinstance(it, TextDelta)) == (
            "Let me delete it. All done."
        )
        assert [it.tool_call_id for it in told if isinstance(it, ToolCall)] == ["call-1", "call-2"]
        results = {it.tool_call_id: it.content for it in told if isinstance(it, ToolResult)}
        assert results["call-1"].startswith("deleted a in ")
        assert results["call-2"] == "The tool call was denied."
        assert len([it for it in bodies if isinstance(it, Started)]) == 1
