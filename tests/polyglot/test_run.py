"""C7, C8, and C11 for the text of a run: it is whole, and nothing is in it twice."""

from __future__ import annotations

import signal
from pathlib import Path

from polyglot.program import Programs
from polyglot.proxy import Proxy
from polyglot.serving import becomes_compacted, gated, open_gate, runs_of, script, scripted
from runlane import RunState

UNHEARD = 50.0
"""Within how many seconds a connection that says nothing is found out: 20 s until the ping, 10 s
for its answer, and time to spare."""


async def test_c7_text_is_shown_as_it_comes(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, client):
        program = await programs.start("run", "s", gated("g"), target=server.address)
        await program.shows("begun ")
        assert list((await runs_of(client, "s")).values()) == [RunState.ACTIVE]
        await open_gate(client, "g")
        await program.ends(0)
    assert program.out.text == "begun ended\n"


async def test_c7_a_broken_stream_goes_on_where_it_was(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    steps: list[dict[str, object]] = []
    for n in range(3):
        steps += [{"text": f"said {n}, grün "}, {"wait": f"g{n}"}]
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        program = await programs.start("run", "s", script(*steps), target=proxy.address)
        for n in range(3):
            await program.shows(f"said {n}, grün ")
            proxy.cut()
            await program.tells("reconnecting UNAVAILABLE", times=n + 1)
            await open_gate(client, f"g{n}")
        await program.ends(0)
    assert program.out.text == "said 0, grün said 1, grün said 2, grün \n"


async def test_c7_nothing_is_lost_or_doubled_in_a_long_answer(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    words = [f"word-{n} " for n in range(2000)]
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        # In the middle of frames, wherever that is.
        proxy.cuts = [5_003, 20_011, 9_001]
        prompt = script(*({"text": word} for word in words))
        program = await programs.start("run", "s", prompt, target=proxy.address)
        await program.ends(0)
        assert len(await runs_of(client, "s")) == 1
    assert not proxy.cuts
    assert program.out.text == "".join(words) + "\n"


async def test_c8_a_second_attempt_begins_anew(programs: Programs, folder: Path) -> None:
    steps = script({"say": "attempt"}, {"text": " begun. "}, {"wait": "g"}, {"text": "The end."})
    async with scripted(folder) as (server, client):
        words = ("run", "s", steps, "--max-attempts", "2")
        program = await programs.start(*words, target=server.address)
        await program.shows("1 begun. ")
        await server.kill()
        await program.tells("reconnecting UNAVAILABLE")
        await server.start()
        await program.tells("attempt 2")
        await program.shows("2 begun. ")
        await open_gate(client, "g")
        await program.ends(0)
    assert program.out.text.endswith("2 begun. The end.\n")
    assert program.out.text.count("The end.") == 1
    assert program.err.lines[-1] == "completed STOP"


async def test_c8_a_run_without_another_attempt_ends(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, _):
        program = await programs.start("run", "s", gated("g"), target=server.address)
        await program.shows("begun ")
        await server.kill()
        await program.tells("reconnecting UNAVAILABLE")
        await server.start()
        await program.ends(1)
    assert program.err.lines[-1] == "failed INTERRUPTED"


async def test_c12_a_run_whose_events_are_gone_still_has_its_end(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        old = await client.run_accepted("s", "hello", run_id="old", allow_missing=True)
        await old.completed(10)
        assert old.cursor is not None
        await server.stop()
        # It compacts in the background as soon as it serves.
        await server.start("--event-retention", "1ms")
        await becomes_compacted(client, old.cursor)
        words = ("run", "s", "hello", "--run-id", "old")
        program = await programs.start(*words, target=server.address)
        await program.ends(0)
    assert program.out.text == "hello\n"
    assert program.err.lines == ["accepted old", "completed STOP"]


async def test_an_agent_that_fails_is_told(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, _):
        steps = script({"text": "well"}, {"fail": "no more", "reason": "WORN_OUT"})
        program = await programs.start("run", "s", steps, target=server.address)
        await program.ends(1)
    assert program.out.text == "well\n"
    assert program.err.lines[-1].startswith("failed ERROR")


async def test_a_run_that_others_cancel_is_told(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, client):
        program = await programs.start("run", "s", gated("g"), target=server.address)
        await program.shows("begun ")
        await client.cancel("s")
        await program.ends(1)
    assert program.out.text == "begun \n"
    assert program.err.lines[-1] == "cancelled CANCELED"


async def test_c11_a_connection_without_a_word_is_found_out(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        program = await programs.start("run", "s", gated("g"), target=proxy.address)
        await program.shows("begun ")
        proxy.strand()
        await open_gate(client, "g")
        await program.ends(0, UNHEARD)
    assert program.out.text == "begun ended\n"
    assert any(line.startswith("reconnecting ") for line in program.err.lines)


async def test_c12_a_server_that_drains_is_followed_to_its_successor(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder, "--drain-timeout", "300ms") as (server, client):
        words = ("run", "s", gated("g"), "--max-attempts", "2")
        program = await programs.start(*words, target=server.address)
        await program.shows("begun ")
        await server.stop(signal.SIGTERM)
        await program.tells("reconnecting ")
        await server.start()
        await program.tells("attempt 2")
        await open_gate(client, "g")
        await program.ends(0)
    assert program.out.text.endswith("begun ended\n")
