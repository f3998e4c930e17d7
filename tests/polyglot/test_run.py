"""C7, C8, C11 and C12 for the stream of a run: its text is complete and repeats nothing."""

from __future__ import annotations

import signal
from pathlib import Path

from polyglot.program import Programs
from polyglot.proxy import Proxy
from polyglot.serving import (
    becomes_compacted,
    gated,
    open_gate,
    pass_marks,
    restartable,
    runs_of,
    script,
    scripted,
)
from runlane import RunState

DEAD_CONNECTION = 50.0
"""Timeout for detecting a dead connection: 20 s until the ping, 10 s for its answer, and some time
to spare."""


async def test_c7_run_prints_text_as_it_arrives(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, client):
        program = await programs.start("run", "s", gated("g"), target=server.address)
        await program.prints("begun ")
        assert list((await runs_of(client, "s")).values()) == [RunState.ACTIVE]
        await open_gate(client, "g")
        await program.exits(0)
    assert program.out.text == "begun ended\n"


async def test_c7_run_resumes_a_broken_stream_after_the_last_event(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    steps: list[dict[str, object]] = []
    for n in range(3):
        steps += [{"text": f"said {n}, grün "}, {"wait": f"g{n}"}]
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        program = await programs.start("run", "s", script(*steps), target=proxy.address)
        for n in range(3):
            await program.prints(f"said {n}, grün ")
            proxy.cut()
            await program.reports("reconnecting UNAVAILABLE", times=n + 1)
            await open_gate(client, f"g{n}")
        await program.exits(0)
    assert program.out.text == "said 0, grün said 1, grün said 2, grün \n"


async def test_c7_run_passes_over_the_progress_marks_of_an_idle_run(
    programs: Programs, folder: Path
) -> None:
    async with restartable(folder, "--progress-interval", "50ms") as (server, client):
        program = await programs.start("run", "s", gated("g"), target=server.address)
        await program.prints("begun ")
        (run_id,) = await runs_of(client, "s")
        await pass_marks(server.address, run_id)
        await open_gate(client, "g")
        await program.exits(0)
    assert program.out.text == "begun ended\n"
    assert not any(line.startswith("reconnecting") for line in program.err.lines)


async def test_c7_long_text_is_complete_after_several_broken_connections(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    words = [f"word-{n} " for n in range(2000)]
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        # These offsets are in the middle of frames.
        proxy.cuts = [5_003, 20_011, 9_001]
        prompt = script(*({"text": word} for word in words))
        program = await programs.start("run", "s", prompt, target=proxy.address)
        await program.exits(0)
        assert len(await runs_of(client, "s")) == 1
    assert not proxy.cuts
    assert program.out.text == "".join(words) + "\n"


async def test_c8_run_reports_a_second_attempt_and_prints_its_text(
    programs: Programs, folder: Path
) -> None:
    steps = script({"say": "attempt"}, {"text": " begun. "}, {"wait": "g"}, {"text": "The end."})
    async with restartable(folder) as (server, client):
        words = ("run", "s", steps, "--max-attempts", "2")
        program = await programs.start(*words, target=server.address)
        await program.prints("1 begun. ")
        await server.kill()
        await program.reports("reconnecting UNAVAILABLE")
        await server.start()
        await program.reports("attempt 2")
        await program.prints("2 begun. ")
        await open_gate(client, "g")
        await program.exits(0)
    assert program.out.text.endswith("2 begun. The end.\n")
    assert program.out.text.count("The end.") == 1
    assert program.err.lines[-1] == "completed STOP"


async def test_c8_run_without_attempts_left_fails_when_its_server_crashes(
    programs: Programs, folder: Path
) -> None:
    async with restartable(folder) as (server, _):
        program = await programs.start("run", "s", gated("g"), target=server.address)
        await program.prints("begun ")
        await server.kill()
        await program.reports("reconnecting UNAVAILABLE")
        await server.start()
        await program.exits(1)
    assert program.err.lines[-1] == "failed INTERRUPTED"


async def test_c12_run_whose_events_are_compacted_prints_its_text_and_end(
    programs: Programs, folder: Path
) -> None:
    async with restartable(folder) as (server, client):
        old = await client.run_accepted("s", "hello", run_id="old", allow_missing=True)
        await old.completed(10)
        assert old.cursor is not None
        await server.stop()
        # Compaction runs in the background after the start.
        await server.start("--event-retention", "1ms")
        await becomes_compacted(client, old.cursor)
        words = ("run", "s", "hello", "--run-id", "old")
        program = await programs.start(*words, target=server.address)
        await program.exits(0)
    assert program.out.text == "hello\n"
    assert program.err.lines == ["accepted old", "completed STOP"]


async def test_run_that_fails_reports_the_failure(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, _):
        steps = script({"text": "well"}, {"fail": "no more", "reason": "WORN_OUT"})
        program = await programs.start("run", "s", steps, target=server.address)
        await program.exits(1)
    assert program.out.text == "well\n"
    assert program.err.lines[-1].startswith("failed ERROR")


async def test_run_that_is_cancelled_by_others_reports_the_cancel(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        program = await programs.start("run", "s", gated("g"), target=server.address)
        await program.prints("begun ")
        await client.cancel("s")
        await program.exits(1)
    assert program.out.text == "begun \n"
    assert program.err.lines[-1] == "cancelled CANCELED"


async def test_c11_run_replaces_a_dead_connection(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        program = await programs.start("run", "s", gated("g"), target=proxy.address)
        await program.prints("begun ")
        proxy.strand()
        await open_gate(client, "g")
        await program.exits(0, DEAD_CONNECTION)
    assert program.out.text == "begun ended\n"
    assert any(line.startswith("reconnecting ") for line in program.err.lines)


async def test_c12_run_reconnects_after_a_drained_server_restarts(
    programs: Programs, folder: Path
) -> None:
    async with restartable(folder, "--drain-timeout", "300ms") as (server, client):
        words = ("run", "s", gated("g"), "--max-attempts", "2")
        program = await programs.start(*words, target=server.address)
        await program.prints("begun ")
        await server.stop(signal.SIGTERM)
        await program.reports("reconnecting ")
        await server.start()
        await program.reports("attempt 2")
        await open_gate(client, "g")
        await program.exits(0)
    assert program.out.text.endswith("begun ended\n")
