"""`runlane top` with real servers, in a pipe and on a terminal."""

from __future__ import annotations

from collections.abc import AsyncIterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from e2e.test_command_line import command, on_terminal
from runlane import Client
from runlane.cli.exposition import parse
from runlane.cli.top import Node, Workload, frame
from support.server import ServerProcess, serving
from support.staging import say
from support.terminal import CTRL_C
from support.wire import Wire
from support.workers import be_refused
from telemetry.scrape import scrape, url_in

FLAGS = ("--metrics-listen", "0", "--log-format", "json", "--store", "memory:")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    async with serving(tmp_path, *FLAGS, "--agent", "scripted", "--max-active-runs", "7") as made:
        yield made


@pytest.fixture
async def wire(server: ServerProcess) -> AsyncIterator[Wire]:
    async with Client(server.address) as client:
        yield Wire(client)


def row(out: str, first: str) -> list[str]:
    """The cells of the first row that begins with a text."""
    return next(line for line in out.splitlines() if line.startswith(first)).split()


async def test_once_prints_one_plain_frame(server: ServerProcess, wire: Wire) -> None:
    active = await wire.start_blocked("busy one", "g")
    waiting = await wire.accept("busy one", say("later"))
    await wire.end(await wire.accept("idle one", say("x")))
    url = url_in(server.log)
    place = url.removeprefix("http://").removesuffix("/metrics")
    code, out, err = await command(server, "top", "--once", "--metrics", url)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "busy sessions: 1  runs: 2, active: 1" in out
    assert row(out, place)[:3] == [place, "1/7", "1"]
    assert row(out, place)[3:6] == ["0.0", "0.0", "0.0"]  # nothing happened in that second
    assert row(out, "busy one") == ["busy", "one", "1", active.run_id]
    assert row(out, active.run_id[:13])[3] == "active"
    assert row(out, waiting.run_id[:13])[3] == "queued"
    assert "idle one" not in out


async def test_a_server_that_does_not_answer_is_named(server: ServerProcess) -> None:
    code, out, _ = await command(
        server, "top", "--once", "--metrics", "127.0.0.1:1", "--metrics", url_in(server.log)
    )
    assert code == 1
    assert "127.0.0.1:1: Connection refused" in out
    assert "0/7" in out
    await server.stop()
    code, out, _ = await command(server, "top", "--once")
    assert code == 1
    assert "give --metrics HOST:PORT" in out


async def test_workers_that_get_no_turns_are_counted(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, *FLAGS, "--agent", "worker") as server,
        Client(server.address) as client,
    ):
        url = url_in(server.log)
        page = await scrape(url)
        assert (page("workers_quarantined"), page("worker_quarantines_total")) == (0, 0)
        await be_refused(server.address, client)
        assert (await scrape(url))("worker_quarantines_total") == 1


@pytest.mark.parametrize(("count", "is_shown"), [(0, False), (2, True)])
def test_workers_that_get_no_turns_are_shown(count: int, *, is_shown: bool) -> None:
    seen = parse(f"runlane_workers_quarantined {count}\n", 0.0)
    console = Console(file=StringIO(), width=100)
    console.print(frame("server", [Node("http://node/metrics", seen, seen)], Workload()))
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert (f"node: {count} workers get no turns after repeated faults" in shown) is is_shown


async def test_on_a_terminal_it_refreshes_until_interrupted(
    server: ServerProcess, wire: Wire
) -> None:
    arguments = ("top", "--interval", "50ms", "--metrics", url_in(server.log))
    async with on_terminal(server, *arguments) as terminal:
        await terminal.shows("runs: 0, active: 0")
        await wire.start_blocked("s", "g")
        await terminal.shows("runs: 1, active: 1")
        await server.kill()
        await terminal.shows("Connection refused")
        terminal.type(CTRL_C)
        assert await terminal.wait() == 0


async def test_rates_are_per_second_between_two_frames(server: ServerProcess, wire: Wire) -> None:
    arguments = ("top", "--interval", "2s", "--metrics", url_in(server.log))
    async with on_terminal(server, *arguments) as terminal:
        await terminal.shows("ACCEPT/S")
        for n in range(20):
            await wire.accept(f"s{n}", say("x"))
        # Twenty runs in about two seconds, seen in one frame or two.
        while not any(f" {tenths / 10:.1f} " in terminal.screen for tenths in range(10, 110)):
            terminal._more.clear()
            await terminal._more.wait()
        terminal.type(CTRL_C)
        assert await terminal.wait() == 0
