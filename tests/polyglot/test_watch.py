"""C9 to C12: watch prints every completion once, across restarts and lost connections."""

from __future__ import annotations

import signal
from pathlib import Path

from polyglot.program import Program, Programs
from polyglot.proxy import Proxy
from polyglot.serving import (
    becomes,
    becomes_compacted,
    gated,
    kept,
    open_gate,
    restartable,
    say,
    scripted,
)

KEEPALIVE = 60.0
"""Timeout for replacing a dead connection, in seconds."""


def ends(*run_ids: str) -> list[str]:
    """The lines that watch prints for completed runs."""
    return [f"{run_id} COMPLETED STOP" for run_id in run_ids]


async def watching(programs: Programs, *words: str, target: str) -> Program:
    """Starts a watch, and waits until it is subscribed."""
    program = await programs.start("watch", *words, target=target)
    await program.reports("watching")
    return program


async def test_c9_watch_prints_every_completion_across_a_server_crash(
    programs: Programs, folder: Path
) -> None:
    file = programs.folder / "cursor"
    async with restartable(folder) as (server, client):
        words = ("--cursor-file", str(file), "--count", "2")
        program = await watching(programs, *words, target=server.address)
        one = await say(client)
        await program.prints(ends(one)[0])
        await server.kill()
        await program.reports("reconnecting UNAVAILABLE")
        await server.start()
        two = await say(client)
        await program.exits(0)
        assert program.out.lines == ends(one, two)

        between = [await say(client) for _ in range(2)]
        later = await programs.start("watch", *words, target=server.address)
        await later.exits(0)
        assert later.out.lines == ends(*between)


async def test_c9_watch_stores_the_cursor_of_progress_marks(
    programs: Programs, folder: Path
) -> None:
    file = programs.folder / "cursor"

    async def written() -> bool:
        return file.exists() and file.read_text().strip() != ""

    async with scripted(folder) as (server, client):
        program = await watching(programs, "--cursor-file", str(file), target=server.address)
        await becomes(written)
        await program.kill()
        assert program.out.text == ""
        between = await say(client)
        words = ("--cursor-file", str(file), "--count", "1")
        later = await programs.start("watch", *words, target=server.address)
        await later.exits(0)
        assert later.out.lines == ends(between)


async def test_c9_watch_retries_until_the_server_is_up(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    program = await programs.start("watch", "--count", "1", target=proxy.address)
    await program.reports("reconnecting UNAVAILABLE")
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        await program.reports("watching")
        run_id = await say(client)
        await program.exits(0)
    assert program.out.lines == ends(run_id)


async def test_c9_watch_prints_how_each_run_ended(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, client):
        program = await watching(programs, "--count", "2", target=server.address)
        cancelled = await client.run_accepted("s", gated("g"), allow_missing=True)
        await client.cancel("s")
        await cancelled.completed(10)
        failed = await client.run_accepted("s", '[{"fail": "no"}]')
        await program.exits(0)
    assert program.out.lines == [
        f"{cancelled.run_id} CANCELLED CANCELED",
        f"{failed.run_id} FAILED ERROR",
    ]


async def test_c10_watch_repeats_completions_for_an_older_cursor_only(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    file = programs.folder / "cursor"
    words = ("--cursor-file", str(file), "--count", "1")
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        program = await watching(programs, *words, target=proxy.address)
        one = await say(client)
        await program.exits(0)
        older = file.read_text()
        two = await say(client)

        first = await programs.start("watch", *words[:2], "--count", "2", target=proxy.address)
        await first.prints(ends(two)[0])
        proxy.cut()
        await first.reports("reconnecting UNAVAILABLE")
        three = await say(client)
        await first.exits(0)
        assert first.out.lines == ends(two, three)

        file.write_text(older)
        again = await programs.start("watch", *words[:2], "--count", "2", target=proxy.address)
        await again.exits(0)
        assert again.out.lines == ends(two, three)
        assert one not in again.out.text


async def test_c11_watch_reopens_a_silent_stream(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with restartable(folder, "--progress-interval", "300ms") as (server, client):
        proxy.target = server.address
        words = ("--silence", "2", "--count", "1")
        program = await watching(programs, *words, target=proxy.address)
        proxy.silence()
        await program.reports("reconnecting UNAVAILABLE")
        assert program.out.text == ""
        run_id = await say(client)
        proxy.speak()
        await program.exits(0)
    assert program.out.lines == ends(run_id)


async def test_c11_watch_keeps_a_stream_that_sends_progress_marks(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with restartable(folder, "--progress-interval", "300ms") as (server, client):
        proxy.target = server.address
        words = ("--silence", "5", "--count", "1")
        program = await watching(programs, *words, target=proxy.address)
        # Longer than --silence.
        handle = await client.run_accepted("s", gated("g"), allow_missing=True)
        await client.wait_run(handle.run_id, timeout=6)
        await open_gate(client, "g")
        await program.exits(0)
    assert not any(line.startswith("reconnecting") for line in program.err.lines)


async def test_c11_watch_replaces_a_dead_connection(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with restartable(folder, "--progress-interval", "300ms") as (server, client):
        proxy.target = server.address
        words = ("--silence", "3", "--count", "1")
        program = await watching(programs, *words, target=proxy.address)
        proxy.strand()
        run_id = await say(client)
        await program.exits(0, KEEPALIVE)
    assert program.out.lines == ends(run_id)


async def test_c12_watch_reports_compacted_events_and_resumes(
    programs: Programs, folder: Path
) -> None:
    file = programs.folder / "cursor"
    async with restartable(folder) as (server, client):
        words = ("--cursor-file", str(file), "--count", "1")
        program = await watching(programs, *words, target=server.address)
        one = await say(client)
        await program.exits(0)
        assert program.out.lines == ends(one)
        for _ in range(3):
            await say(client)
        # Compaction runs in the background after the start.
        await server.stop()
        await server.start("--event-retention", "1ms")
        await becomes_compacted(client, file.read_text().strip())
        # Later events are retained.
        await server.stop()
        await server.start()

        later = await programs.start("watch", *words[:2], target=server.address)
        line = await later.reports("events before ")
        assert line.endswith(" are gone")
        await later.reports("watching")
        five = await say(client)
        await later.prints(ends(five)[0])
        left = await kept(client, five)
        assert later.out.lines == ends(*left)
        assert len(left) < 4


async def test_c12_watch_reconnects_after_a_drained_server_restarts(
    programs: Programs, folder: Path
) -> None:
    async with restartable(folder, "--drain-timeout", "300ms") as (server, client):
        program = await watching(programs, "--count", "2", target=server.address)
        one = await say(client)
        await program.prints(ends(one)[0])
        await server.stop(signal.SIGTERM)
        await program.reports("reconnecting DRAINING")
        await server.start()
        two = await say(client)
        await program.exits(0)
    assert program.out.lines == ends(one, two)


async def test_c12_watch_with_an_invalid_cursor_is_refused(
    programs: Programs, folder: Path
) -> None:
    file = programs.folder / "cursor"
    file.write_text("nonsense")
    async with scripted(folder) as (server, _):
        program = await programs.start("watch", "--cursor-file", str(file), target=server.address)
        await program.exits(3)
    assert program.err.lines[-2].startswith("CURSOR_INVALID: ")
    assert program.err.lines[-1].startswith("  cursor: ")
