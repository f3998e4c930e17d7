"""The programs in examples/, built and run with the commands in examples/README.md."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from polyglot.program import Programs
from polyglot.projects import EXAMPLES, Quickstart, first_block
from polyglot.proxy import Proxy
from polyglot.serving import (
    becomes,
    gated,
    guarded,
    open_gate,
    pass_marks,
    restartable,
    runs_of,
    script,
    scripted,
)
from runlane import Client, RunState, Unauthenticated

SECRET = "not-to-be-seen"  # noqa: S105 - no server knows it

INTERRUPTED = {"java": 130}
"""Exit codes after Ctrl-C, where they are not 1: the JVM sets its own."""


def server_at(address: str, token: str = "") -> dict[str, str]:
    """The environment variables that select a server."""
    return {"RUNLANE_SERVER": address, "RUNLANE_TOKEN": token}


async def test_quickstart_prints_what_the_readme_shows(
    quickstarts: Programs, quickstart: Quickstart, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        program = await quickstarts.launch(*quickstart.arguments(), env=server_at(server.address))
        await program.exits(0)
        (state,) = (await runs_of(client, "demo")).values()
    assert program.out.text + program.err.text == first_block(
        EXAMPLES / "README.md", "Quickstarts", "text"
    )
    assert program.err.text == "completed\n"
    assert state is RunState.COMPLETED


async def test_quickstart_streams_text_while_the_run_is_active(
    quickstarts: Programs, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        prompt = gated("g", before="grün ")
        program = await quickstarts.launch("s", prompt, env=server_at(server.address))
        await program.prints("grün ")
        assert list((await runs_of(client, "s")).values()) == [RunState.ACTIVE]
        await open_gate(client, "g")
        await program.exits(0)
    assert program.out.text == "grün ended\n"


async def test_quickstart_passes_over_the_progress_marks_of_an_idle_run(
    quickstarts: Programs, folder: Path
) -> None:
    async with restartable(folder, "--progress-interval", "50ms") as (server, client):
        program = await quickstarts.launch("s", gated("g"), env=server_at(server.address))
        await program.prints("begun ")
        (run_id,) = await runs_of(client, "s")
        await pass_marks(server.address, run_id)
        await open_gate(client, "g")
        await program.exits(0)
    assert program.out.text == "begun ended\n"


async def test_quickstart_reports_a_failed_run(quickstarts: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, _):
        prompt = script({"text": "half "}, {"fail": "no more"})
        program = await quickstarts.launch("s", prompt, env=server_at(server.address))
        await program.exits(1)
    assert program.out.text == "half \n"
    assert program.err.text == "failed: no more\n"


async def test_quickstart_cancels_its_run_and_no_other_on_ctrl_c(
    quickstarts: Programs, quickstart: Quickstart, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        program = await quickstarts.launch("s", gated("g"), env=server_at(server.address))
        await program.prints("begun ")
        other = await client.run_accepted("s", "other")
        program.process.send_signal(signal.SIGINT)
        await program.exits(INTERRUPTED.get(quickstart.language.name, 1))
        assert (await other.completed(10)).state is RunState.COMPLETED
        states = list((await runs_of(client, "s")).values())
    assert program.out.text == "begun \n"
    assert program.err.text == "cancelled\n"
    assert states == [RunState.CANCELLED, RunState.COMPLETED]


async def test_quickstart_cancels_its_run_on_ctrl_c_before_the_run_is_acknowledged(
    quickstarts: Programs, quickstart: Quickstart, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        proxy.silence_at_request = 1
        program = await quickstarts.launch("s", gated("g"), env=server_at(proxy.address))

        async def accepted() -> bool:
            # The session exists once the run does.
            return any([run async for run in client.list_runs()])

        await becomes(accepted)
        program.process.send_signal(signal.SIGINT)
        proxy.silence_at_request = 0
        proxy.speak()
        await program.exits(INTERRUPTED.get(quickstart.language.name, 1))
        assert list((await runs_of(client, "s")).values()) == [RunState.CANCELLED]
    assert program.err.text == "cancelled\n"


async def test_quickstart_sends_its_token(quickstarts: Programs, folder: Path) -> None:
    async with guarded(folder) as (server, token, _):
        env = server_at(server.address, token)
        program = await quickstarts.launch("s", "hello", env=env)
        await program.exits(0)
    assert program.out.text == "hello\n"


@pytest.mark.parametrize("token", ["", "wrong"])
async def test_quickstart_reports_the_servers_message_when_its_token_is_refused(
    quickstarts: Programs, folder: Path, token: str
) -> None:
    async with guarded(folder) as (server, _, _):
        async with Client(server.address) as client:
            with pytest.raises(Unauthenticated) as refused:
                await client.get_run("any")
        program = await quickstarts.launch("s", "hello", env=server_at(server.address, token))
        await program.exits(1)
    assert len(program.err.lines) == 1, program.said
    assert refused.value.message in program.err.text
    assert program.out.text == ""


@pytest.mark.parametrize("server", ["192.0.2.1:50051", "127.0.0.1.example.test:50051"])
async def test_quickstart_keeps_its_token_from_other_machines(
    quickstarts: Programs, server: str
) -> None:
    program = await quickstarts.launch("s", "hello", env=server_at(server, SECRET))
    await program.exits(1)
    assert len(program.err.lines) == 1, program.said
    assert server in program.err.text
    assert SECRET not in program.err.text


async def test_quickstart_reports_that_no_server_answers(
    quickstarts: Programs, proxy: Proxy
) -> None:
    program = await quickstarts.launch("s", "hello", env=server_at(proxy.address))
    await program.exits(1)
    assert len(program.err.lines) == 1, program.said
    assert program.out.text == ""


async def test_quickstart_without_arguments_prints_its_usage(quickstarts: Programs) -> None:
    program = await quickstarts.launch(env={})
    await program.exits(1)
    assert program.err.text.startswith("usage: ")
