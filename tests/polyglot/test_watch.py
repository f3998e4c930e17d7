"""C9 to C12: each end is told, once, also those of the time in between."""

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
    say,
    scripted,
)

KEEPALIVE = 60.0
"""Within how many seconds a dead connection is replaced, whoever finds out first."""


def ends(*run_ids: str) -> list[str]:
    """The lines for runs that completed."""
    return [f"{run_id} COMPLETED STOP" for run_id in run_ids]


async def begun(programs: Programs, *words: str, target: str) -> Program:
    """A watch that has a place of its own in the stream."""
    program = await programs.start("watch", *words, target=target)
    await program.tells("watching")
    return program


async def test_c9_each_end_is_told_over_a_crash_of_the_server(
    programs: Programs, folder: Path
) -> None:
    file = programs.folder / "cursor"
    async with scripted(folder) as (server, client):
        words = ("--cursor-file", str(file), "--count", "2")
        program = await begun(programs, *words, target=server.address)
        one = await say(client)
        await program.shows(ends(one)[0])
        await server.kill()
        await program.tells("reconnecting UNAVAILABLE")
        await server.start()
        two = await say(client)
        await program.ends(0)
        assert program.out.lines == ends(one, two)

        between = [await say(client) for _ in range(2)]
        later = await programs.start("watch", *words, target=server.address)
        await later.ends(0)
        assert later.out.lines == ends(*between)


async def test_c9_marks_move_the_cursor_too(programs: Programs, folder: Path) -> None:
    file = programs.folder / "cursor"

    async def written() -> bool:
        return file.exists() and file.read_text().strip() != ""

    async with scripted(folder) as (server, client):
        program = await begun(programs, "--cursor-file", str(file), target=server.address)
        await becomes(written)
        await program.kill()
        assert program.out.text == ""
        between = await say(client)
        words = ("--cursor-file", str(file), "--count", "1")
        later = await programs.start("watch", *words, target=server.address)
        await later.ends(0)
        assert later.out.lines == ends(between)


async def test_c9_a_watch_that_begins_before_the_server_waits_for_it(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    program = await programs.start("watch", "--count", "1", target=proxy.address)
    await program.tells("reconnecting UNAVAILABLE")
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        await program.tells("watching")
        run_id = await say(client)
        await program.ends(0)
    assert program.out.lines == ends(run_id)


async def test_c9_how_a_run_ended_is_told(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, client):
        program = await begun(programs, "--count", "2", target=server.address)
        cancelled = await client.run_accepted("s", gated("g"), allow_missing=True)
        await client.cancel("s")
        await cancelled.completed(10)
        failed = await client.run_accepted("s", '[{"fail": "no"}]')
        await program.ends(0)
    assert program.out.lines == [
        f"{cancelled.run_id} CANCELLED CANCELED",
        f"{failed.run_id} FAILED ERROR",
    ]


async def test_c10_an_older_cursor_tells_again_and_a_lost_connection_does_not(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    file = programs.folder / "cursor"
    words = ("--cursor-file", str(file), "--count", "1")
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        program = await begun(programs, *words, target=proxy.address)
        one = await say(client)
        await program.ends(0)
        older = file.read_text()
        two = await say(client)

        first = await programs.start("watch", *words[:2], "--count", "2", target=proxy.address)
        await first.shows(ends(two)[0])
        proxy.cut()
        await first.tells("reconnecting UNAVAILABLE")
        three = await say(client)
        await first.ends(0)
        assert first.out.lines == ends(two, three)

        file.write_text(older)
        again = await programs.start("watch", *words[:2], "--count", "2", target=proxy.address)
        await again.ends(0)
        assert again.out.lines == ends(two, three)
        assert one not in again.out.text


async def test_c11_silence_is_a_lost_connection(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder, "--progress-interval", "300ms") as (server, client):
        proxy.target = server.address
        words = ("--silence", "2", "--count", "1")
        program = await begun(programs, *words, target=proxy.address)
        proxy.silence()
        await program.tells("reconnecting UNAVAILABLE")
        assert program.out.text == ""
        run_id = await say(client)
        proxy.speak()
        await program.ends(0)
    assert program.out.lines == ends(run_id)


async def test_c11_marks_keep_a_quiet_connection(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder, "--progress-interval", "300ms") as (server, client):
        proxy.target = server.address
        words = ("--silence", "2", "--count", "1")
        program = await begun(programs, *words, target=proxy.address)
        # Longer than the silence would be.
        handle = await client.run_accepted("s", gated("g"), allow_missing=True)
        await client.wait_run(handle.run_id, timeout=3)
        await open_gate(client, "g")
        await program.ends(0)
    assert not any(line.startswith("reconnecting") for line in program.err.lines)


async def test_c11_a_dead_connection_is_replaced(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder, "--progress-interval", "300ms") as (server, client):
        proxy.target = server.address
        words = ("--silence", "3", "--count", "1")
        program = await begun(programs, *words, target=proxy.address)
        proxy.strand()
        run_id = await say(client)
        await program.ends(0, KEEPALIVE)
    assert program.out.lines == ends(run_id)


async def test_c12_what_was_compacted_is_told(programs: Programs, folder: Path) -> None:
    file = programs.folder / "cursor"
    async with scripted(folder) as (server, client):
        words = ("--cursor-file", str(file), "--count", "1")
        program = await begun(programs, *words, target=server.address)
        one = await say(client)
        await program.ends(0)
        assert program.out.lines == ends(one)
        for _ in range(3):
            await say(client)
        # It compacts in the background as soon as it serves.
        await server.stop()
        await server.start("--event-retention", "1ms")
        await becomes_compacted(client, file.read_text().strip())
        # What comes now is to stay.
        await server.stop()
        await server.start()

        later = await programs.start("watch", *words[:2], target=server.address)
        told = await later.tells("events before ")
        assert told.endswith(" are gone")
        await later.tells("watching")
        five = await say(client)
        await later.shows(ends(five)[0])
        left = await kept(client, five)
        assert later.out.lines == ends(*left)
        assert len(left) < 4


async def test_c12_a_server_that_drains_is_followed_to_its_successor(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder, "--drain-timeout", "300ms") as (server, client):
        program = await begun(programs, "--count", "2", target=server.address)
        one = await say(client)
        await program.shows(ends(one)[0])
        await server.stop(signal.SIGTERM)
        await program.tells("reconnecting DRAINING")
        await server.start()
        two = await say(client)
        await program.ends(0)
    assert program.out.lines == ends(one, two)


async def test_c12_a_cursor_of_another_store_is_refused(programs: Programs, folder: Path) -> None:
    file = programs.folder / "cursor"
    file.write_text("nonsense")
    async with scripted(folder) as (server, _):
        program = await programs.start("watch", "--cursor-file", str(file), target=server.address)
        await program.ends(3)
    assert program.err.lines[-2].startswith("CURSOR_INVALID: ")
    assert program.err.lines[-1].startswith("  cursor: ")
