"""C1 to C5: one run whatever happens, repetitions, deadlines, and what a refusal says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from polyglot.program import Programs
from polyglot.proxy import Proxy
from polyglot.serving import (
    RUN_ID,
    SCRIPTED,
    becomes_state,
    gated,
    open_gate,
    runs_of,
    scripted,
)
from runlane import Client, RunState
from support.server import ServerProcess

PATIENCE = 15.0
"""How many seconds later than its deadline a program may end: a busy machine starts it slowly."""

EARLY = 0.5
"""How many seconds before its deadline it may end: the last pause would have been too long."""


async def test_c1_the_run_has_an_id_of_the_program_s_own(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, client):
        program = await programs.start("run", "s", "hello", target=server.address)
        await program.ends(0)
        runs = await runs_of(client, "s")
    (run_id,) = runs
    assert RUN_ID.fullmatch(run_id)
    assert program.err.lines == [f"accepted {run_id}", "completed STOP"]
    assert program.out.text == "hello\n"


async def test_c1_the_id_that_it_is_given_is_sent(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, client):
        for _ in range(2):
            words = ("run", "s", "hello", "--run-id", "mine")
            program = await programs.start(*words, target=server.address)
            await program.ends(0)
            assert program.err.lines == ["accepted mine", "completed STOP"]
            assert program.out.text == "hello\n"
        assert await runs_of(client, "s") == {"mine": RunState.COMPLETED}


async def test_c1_c3_a_lost_answer_makes_no_second_run(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        proxy.lose = 2
        program = await programs.start("run", "s", "hello", target=proxy.address)
        await program.ends(0)
        runs = await runs_of(client, "s")
    assert proxy.lose == 0
    assert proxy.requests >= 4  # two in vain, one with an answer, and the stream
    (run_id,) = runs
    assert program.err.lines[0] == f"accepted {run_id}"
    assert program.out.text == "hello\n"


async def test_c3_a_server_that_is_down_is_waited_for(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    server = ServerProcess(folder, *SCRIPTED)
    program = await programs.start("run", "s", "hello", "--timeout", "25", target=proxy.address)
    await proxy.until("closed", 2)
    try:
        await server.start()
        proxy.target = server.address
        await program.ends(0)
        async with Client(server.address) as client:
            assert len(await runs_of(client, "s")) == 1
    finally:
        await server.kill()
    assert program.out.text == "hello\n"


async def test_c3_the_deadline_is_for_all_tries_together(programs: Programs, proxy: Proxy) -> None:
    program = await programs.start("run", "s", "hello", "--timeout", "6", target=proxy.address)
    await program.ends(4, 6 + PATIENCE)
    # More than one try, and none in a tight loop.
    assert 2 <= proxy.connections < 100
    assert program.err.lines[-1].startswith(("UNAVAILABLE: ", "DEADLINE_EXCEEDED: "))
    assert program.out.text == ""


@pytest.mark.parametrize("words", [("run", "s", "hello"), ("cancel", "s")], ids=["run", "cancel"])
async def test_c2_a_server_that_says_nothing_is_given_up(
    programs: Programs, proxy: Proxy, words: tuple[str, ...]
) -> None:
    proxy.silence()
    began = time.monotonic()
    program = await programs.start(*words, "--timeout", "4", target=proxy.address)
    await proxy.until("connections", 1)
    await program.ends(4, 4 + PATIENCE)
    assert time.monotonic() - began > 4 - EARLY
    assert program.err.lines[-1].startswith(("UNAVAILABLE: ", "DEADLINE_EXCEEDED: "))


async def test_c2_a_request_that_is_not_answered_is_given_up(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        # The connection is made, and falls silent with the answer to the first request.
        proxy.silence_at_request = 1
        began = time.monotonic()
        program = await programs.start("run", "s", "hello", "--timeout", "6", target=proxy.address)
        await proxy.until("requests", 1)
        await program.ends(4, 6 + PATIENCE)
        assert time.monotonic() - began > 6 - EARLY
        assert len(await runs_of(client, "s")) <= 1


async def test_c4_retry_info_is_kept_to(programs: Programs, proxy: Proxy, folder: Path) -> None:
    full = ("--max-active-runs", "1", "--max-waiting-total", "1")
    async with scripted(folder, *full) as (server, client):
        active = await client.run_accepted("a", gated("g"), allow_missing=True)
        await becomes_state(client, active.run_id, RunState.ACTIVE)
        waits = await client.run_accepted("b", "waits", allow_missing=True)
        proxy.target = server.address
        program = await programs.start("run", "s", "hello", "--timeout", "20", target=proxy.address)
        await proxy.until("answers", 1)
        assert await runs_of(client, "s") == {}
        # There is room only when this one is gone; a gate would want a run of its own.
        await client.cancel(run_id=waits.run_id)
        await client.cancel(run_id=active.run_id)
        await program.ends(0)
    assert program.out.text == "hello\n"
    # The server asks for a second.
    assert proxy.requested_at[1] - proxy.requested_at[0] >= 0.95


async def test_c4_without_retry_info_it_is_final(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder, "--max-waiting-runs", "0") as (server, client):
        active = await client.run_accepted("s", gated("g"), allow_missing=True)
        await becomes_state(client, active.run_id, RunState.ACTIVE)
        proxy.target = server.address
        program = await programs.start("run", "s", "hello", target=proxy.address)
        await program.ends(3)
        assert proxy.requests == 1
        assert program.err.lines[-1].startswith("QUEUE_FULL: ")
        await open_gate(client, "g")
        assert len(await runs_of(client, "s")) == 1


@pytest.mark.parametrize(
    ("words", "reason", "fields"),
    [
        (("run", "s", ""), "EMPTY_PROMPT", ["prompt"]),
        (("run", "s", "12345678901"), "PROMPT_TOO_LARGE", ["prompt"]),
        (("run", "", "hello"), "SESSION_MISSING", ["session_id"]),
        (("run", "s" * 129, "hello", "--run-id", "r" * 129), "INVALID", ["run_id", "session_id"]),
        (("cancel", "nobody"), "SESSION_NOT_FOUND", []),
        (("cancel", "known", "--run-id", "nothing"), "RUN_NOT_FOUND", []),
        (("run", "known", "other", "--run-id", "taken"), "RUN_ID_CONFLICT", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_c5_a_refusal_has_its_reason_and_its_fields(
    programs: Programs,
    proxy: Proxy,
    folder: Path,
    *,
    words: tuple[str, ...],
    reason: str,
    fields: list[str],
) -> None:
    async with scripted(folder, "--max-prompt-bytes", "10") as (server, client):
        known = await client.run_accepted("known", "hi", run_id="taken", allow_missing=True)
        await known.completed(10)
        proxy.target = server.address
        program = await programs.start(*words, target=proxy.address)
        await program.ends(3)
    head, *rest = program.err.lines
    assert head.startswith(reason), program.said
    assert ": " in head
    assert sorted(line.split(":")[0] for line in rest) == [f"  {field}" for field in fields]
    assert all(line.partition(": ")[2] for line in rest)
    assert program.out.text == ""
    assert proxy.requests == 1


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("run",),
        ("run", "s"),
        ("cancel",),
        ("sing", "s"),
        ("run", "s", "hello", "--volume", "3"),
        ("run", "s", "hello", "--max-attempts", "many"),
        ("watch", "--count", "some"),
    ],
    ids=lambda words: " ".join(words) or "nothing",
)
async def test_wrong_arguments_are_told(
    programs: Programs, proxy: Proxy, words: tuple[str, ...]
) -> None:
    program = await programs.start(*words, target=proxy.address)
    await program.ends(2)
    assert program.err.lines
    assert program.out.text == ""
    assert proxy.connections == 0
