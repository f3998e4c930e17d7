"""C6: cancels, their retries, and Ctrl-C."""

from __future__ import annotations

import signal
from pathlib import Path

from polyglot.program import Programs
from polyglot.proxy import Proxy
from polyglot.serving import becomes, becomes_state, gated, open_gate, runs_of, say, scripted
from runlane import Client, RunHandle, RunState


async def two_runs(client: Client) -> tuple[RunHandle, RunHandle]:
    """Accepts an active run, and one that waits behind it."""
    first = await client.run_accepted("s", gated("g"), allow_missing=True)
    await becomes_state(client, first.run_id, RunState.ACTIVE)
    return first, await client.run_accepted("s", "second")


async def test_c6_cancel_prints_every_covered_run_and_its_state(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        first, second = await two_runs(client)
        program = await programs.start("cancel", "s", target=server.address)
        await program.exits(0)
        assert program.out.lines == [f"{first.run_id} ACTIVE", f"{second.run_id} QUEUED"]
        await first.completed(10)
        again = await programs.start("cancel", "s", target=server.address)
        await again.exits(0)
        assert again.out.text == ""
        assert set((await runs_of(client, "s")).values()) == {RunState.CANCELLED}


async def test_c6_cancel_with_a_run_id_covers_that_run_only(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        first, second = await two_runs(client)
        words = ("cancel", "s", "--run-id", second.run_id)
        program = await programs.start(*words, target=server.address)
        await program.exits(0)
        assert program.out.lines == [f"{second.run_id} QUEUED"]
        await open_gate(client, "g")
        assert (await first.completed(10)).state is RunState.COMPLETED


async def test_c6_cancel_without_a_run_id_is_not_retried(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        await two_runs(client)
        proxy.target = server.address
        proxy.lose = 1
        program = await programs.start("cancel", "s", target=proxy.address)
        await program.exits(4)
        assert program.err.lines[-1].startswith("UNAVAILABLE: ")
        assert program.out.text == ""
        assert proxy.requests == 1
        # The lost answer belongs to a cancel that took effect.
        await say(client, session="s")
        *before, _ = (await runs_of(client, "s")).values()
        assert before == [RunState.CANCELLED] * 2


async def test_c6_cancel_with_a_run_id_is_retried(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        first, second = await two_runs(client)
        proxy.target = server.address
        proxy.lose = 1
        words = ("cancel", "s", "--run-id", first.run_id)
        program = await programs.start(*words, target=proxy.address)
        await program.exits(0)
        # The first attempt covered the run, so the receipt of the second is empty.
        assert program.out.text == ""
        assert proxy.requests == 2
        assert (await first.completed(10)).state is RunState.CANCELLED
        assert (await second.completed(10)).state is RunState.COMPLETED


async def test_ctrl_c_cancels_the_run_and_no_other_run(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, client):
        program = await programs.start("run", "s", gated("g"), target=server.address)
        await program.prints("begun ")
        other = await client.run_accepted("s", "other")
        program.process.send_signal(signal.SIGINT)
        await program.exits(130)
        first, second = (await runs_of(client, "s")).items()
        assert program.err.lines[0] == f"accepted {first[0]}"
        assert (await (await client.attach(first[0])).completed(10)).state is RunState.CANCELLED
        assert second[0] == other.run_id
        assert (await other.completed(10)).state is RunState.COMPLETED


async def test_ctrl_c_before_the_run_is_acknowledged_cancels_the_run(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        proxy.silence_at_request = 1
        program = await programs.start("run", "s", gated("g"), target=proxy.address)

        async def accepted() -> bool:
            # The session exists once the run does.
            return any([run async for run in client.list_runs()])

        await becomes(accepted)
        program.process.send_signal(signal.SIGINT)
        proxy.silence_at_request = 0
        proxy.speak()
        await program.exits(130)
        (run_id,) = await runs_of(client, "s")
        assert (await (await client.attach(run_id)).completed(10)).state is RunState.CANCELLED


async def test_ctrl_c_stops_watch(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, _):
        program = await programs.start("watch", target=server.address)
        await program.reports("watching")
        program.process.send_signal(signal.SIGINT)
        await program.exits(130)
