"""An ACP agent on a real server: the example of this repository, over the wire."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from runlane import Client, InputState, RunComplete, RunState, ToolCall, ToolResult
from support.acp import PRELUDE
from support.processes import wait_for_exit
from support.server import ServerProcess, serving
from support.wire import Wire, wait_for_text

EXAMPLE = Path(__file__).parents[2] / "examples" / "python" / "acp_agent.py"
AGENT = ("--agent", f"acp:{sys.executable} {EXAMPLE}")


async def ask(server: ServerProcess, prompt: str) -> RunComplete:
    """Runs a prompt of one session to its terminal event."""
    async with Client(server.address) as client:
        wire = Wire(client)
        return await wire.end(await client.run_accepted("s", prompt, allow_missing=True))


async def test_a_session_continues_over_turns_restarts_and_goes_when_it_is_deleted(
    tmp_path: Path,
) -> None:
    states = tmp_path / "states"
    flags = ("--agent-state-dir", str(states), "--acp-permissions", "deny,edit=allow")
    async with serving(tmp_path, *AGENT, *flags) as server:
        assert (await ask(server, "hello")).text == "This is prompt 1 of our session. "
        assert (await ask(server, "hello")).text == "This is prompt 2 of our session. "
        await server.kill()
        await server.start()
        assert (await ask(server, "note milk")).text == "Noted. "
        (notes,) = states.glob("*/*/*/notes.txt")
        assert notes.read_text() == "milk\n"
        assert (await ask(server, "hello")).text == "This is prompt 4 of our session. "
        async with Client(server.address) as client:
            await client.delete_session("s")
        assert not notes.exists()
        assert (await ask(server, "hello")).text == "This is prompt 1 of our session. "


async def test_a_start_removes_the_directories_of_sessions_that_are_gone(tmp_path: Path) -> None:
    states = tmp_path / "states"
    flags = ("--agent-state-dir", str(states))
    async with serving(tmp_path, *AGENT, *flags) as server:
        await ask(server, "hello")
        (home,) = states.glob("*/*/home")
    # Another node, which has no directory of it, deletes the session.
    async with serving(tmp_path, *AGENT) as server, Client(server.address) as client:
        await client.delete_session("s")
    assert home.exists()
    async with serving(tmp_path, *AGENT, *flags):
        while home.exists():  # the sweep begins after the server listens
            await asyncio.sleep(0.01)


async def test_a_permission_is_denied_by_default_and_the_transcript_has_the_call(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, *AGENT) as server:
        assert (await ask(server, "note milk")).text == "I may not write. "
        async with Client(server.address) as client:
            messages = [one async for one in client.list_messages("s")]
    parts = [part for message in messages for part in message.parts]
    (call,) = (part for part in parts if isinstance(part, ToolCall))
    (result,) = (part for part in parts if isinstance(part, ToolResult))
    assert call.name == "edit"
    assert '"text": "milk"' in call.arguments_json
    assert result.is_error


async def test_a_cancel_reaches_the_agent_and_nothing_of_it_remains(tmp_path: Path) -> None:
    source = tmp_path / "agent.py"
    source.write_text(f'{PRELUDE}\np = prompt()\nsay("%d." % os.getpid())\nwhile True: read()\n')
    agent = ("--agent", f"acp:{sys.executable} {source}", "--cancel-grace", "800ms")
    async with serving(tmp_path, *agent) as server, Client(server.address) as client:
        handle = await client.run_accepted("s", "x", allow_missing=True)
        pid = int((await wait_for_text(handle, ".")).strip("."))
        await handle.cancel()
        complete = await Wire(client).end(handle)
        assert complete.state is RunState.CANCELLED
        assert complete.text == f"{pid}."
        await wait_for_exit(pid)


async def test_the_agent_ends_when_the_server_is_killed(tmp_path: Path) -> None:
    source = tmp_path / "agent.py"
    source.write_text(
        f"{PRELUDE}\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        'p = prompt()\nsay("%d." % os.getpid())\nwhile True: time.sleep(60)\n'
    )
    agent = ("--agent", f"acp:{sys.executable} {source}", "--cancel-grace", "800ms")
    async with serving(tmp_path, *agent) as server, Client(server.address) as client:
        handle = await client.run_accepted("s", "x", allow_missing=True)
        pid = int((await wait_for_text(handle, ".")).strip("."))
        await server.kill()
        await wait_for_exit(pid)


@pytest.mark.parametrize(("approved", "answer"), [(True, "Noted. "), (False, "I may not write. ")])
async def test_a_person_answers_the_question_of_an_agent(
    tmp_path: Path, approved: bool, answer: str
) -> None:
    flags = ("--acp-permissions", "deny,edit=ask")
    async with serving(tmp_path, *AGENT, *flags) as server, Client(server.address) as client:
        handle = await client.run_accepted("s", "note milk", allow_missing=True)
        while not (asked := [one async for one in client.list_input_requests(session_id="s")]):
            await asyncio.sleep(0.01)
        assert (await client.answer_input(asked[0], approved)).accepted
        assert (await Wire(client).end(handle)).text == answer


async def test_a_cancel_withdraws_the_question_of_an_agent(tmp_path: Path) -> None:
    flags = ("--acp-permissions", "ask")
    async with serving(tmp_path, *AGENT, *flags) as server, Client(server.address) as client:
        handle = await client.run_accepted("s", "note milk", allow_missing=True)
        while not [one async for one in client.list_input_requests(session_id="s")]:
            await asyncio.sleep(0.01)
        await handle.cancel()
        assert (await Wire(client).end(handle)).state is RunState.CANCELLED
        (asked,) = [one async for one in client.list_input_requests(session_id="s")]
        assert asked.state is InputState.WITHDRAWN
