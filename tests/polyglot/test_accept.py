"""C1 to C5: the idempotency key, deadlines, retries, and errors."""

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
    restartable,
    runs_of,
    scripted,
)
from runlane import Client, RunState
from support.server import ServerProcess

LATE = 15.0
"""Tolerance after a deadline, in seconds: a busy machine starts programs slowly."""

EARLY = 0.5
"""Tolerance before a deadline, in seconds: a backoff past the deadline ends the call early."""


async def test_c1_run_creates_its_own_run_id(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, client):
        program = await programs.start("run", "s", "hello", target=server.address)
        await program.exits(0)
        runs = await runs_of(client, "s")
    (run_id,) = runs
    assert RUN_ID.fullmatch(run_id)
    assert program.err.lines == [f"accepted {run_id}", "completed STOP"]
    assert program.out.text == "hello\n"


async def test_c1_run_with_the_same_run_id_starts_one_run(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, client):
        for _ in range(2):
            words = ("run", "s", "hello", "--run-id", "mine")
            program = await programs.start(*words, target=server.address)
            await program.exits(0)
            assert program.err.lines == ["accepted mine", "completed STOP"]
            assert program.out.text == "hello\n"
        assert await runs_of(client, "s") == {"mine": RunState.COMPLETED}


async def test_c1_c3_run_whose_answers_are_lost_starts_one_run(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        proxy.lose = 2
        program = await programs.start("run", "s", "hello", target=proxy.address)
        await program.exits(0)
        runs = await runs_of(client, "s")
    assert proxy.lose == 0
    assert proxy.requests >= 4  # two lost, one answered, and the stream
    (run_id,) = runs
    assert program.err.lines[0] == f"accepted {run_id}"
    assert program.out.text == "hello\n"


async def test_c3_run_retries_until_the_server_is_up(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    server = ServerProcess(folder, *SCRIPTED)
    program = await programs.start("run", "s", "hello", "--timeout", "25", target=proxy.address)
    await proxy.until("closed", 2)
    try:
        await server.start()
        proxy.target = server.address
        await program.exits(0)
        async with Client(server.address) as client:
            assert len(await runs_of(client, "s")) == 1
    finally:
        await server.kill()
    assert program.out.text == "hello\n"


async def test_c3_one_deadline_covers_all_attempts(programs: Programs, proxy: Proxy) -> None:
    program = await programs.start("run", "s", "hello", "--timeout", "6", target=proxy.address)
    await program.exits(4, 6 + LATE)
    # More than one attempt, and no busy loop.
    assert 2 <= proxy.connections < 100
    assert program.err.lines[-1].startswith(("UNAVAILABLE: ", "DEADLINE_EXCEEDED: "))
    assert program.out.text == ""


@pytest.mark.parametrize("words", [("run", "s", "hello"), ("cancel", "s")], ids=["run", "cancel"])
async def test_c2_call_to_a_silent_server_ends_at_its_deadline(
    programs: Programs, proxy: Proxy, words: tuple[str, ...]
) -> None:
    proxy.silence()
    began = time.monotonic()
    program = await programs.start(*words, "--timeout", "4", target=proxy.address)
    await proxy.until("connections", 1)
    await program.exits(4, 4 + LATE)
    assert time.monotonic() - began > 4 - EARLY
    assert program.err.lines[-1].startswith(("UNAVAILABLE: ", "DEADLINE_EXCEEDED: "))


async def test_c2_request_without_an_answer_ends_at_its_deadline(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        # The connection works until the first request, which gets no answer.
        proxy.silence_at_request = 1
        began = time.monotonic()
        program = await programs.start("run", "s", "hello", "--timeout", "6", target=proxy.address)
        await proxy.until("requests", 1)
        await program.exits(4, 6 + LATE)
        assert time.monotonic() - began > 6 - EARLY
        assert len(await runs_of(client, "s")) <= 1


async def test_c4_retry_waits_as_long_as_retry_info_says(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    full = ("--max-active-runs", "1", "--max-waiting-total", "1")
    async with restartable(folder, *full) as (server, client):
        active = await client.run_accepted("a", gated("g"), allow_missing=True)
        await becomes_state(client, active.run_id, RunState.ACTIVE)
        waits = await client.run_accepted("b", "waits", allow_missing=True)
        proxy.target = server.address
        program = await programs.start("run", "s", "hello", "--timeout", "20", target=proxy.address)
        await proxy.until("answers", 1)
        assert await runs_of(client, "s") == {}
        # Cancelling makes room. Opening the gate would need room for another run.
        await client.cancel(run_id=waits.run_id)
        await client.cancel(run_id=active.run_id)
        await program.exits(0)
    assert program.out.text == "hello\n"
    # RetryInfo says one second.
    assert proxy.requested_at[1] - proxy.requested_at[0] >= 0.95


async def test_c4_resource_exhausted_without_retry_info_is_not_retried(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with restartable(folder, "--max-waiting-runs", "0") as (server, client):
        active = await client.run_accepted("s", gated("g"), allow_missing=True)
        await becomes_state(client, active.run_id, RunState.ACTIVE)
        proxy.target = server.address
        program = await programs.start("run", "s", "hello", target=proxy.address)
        await program.exits(3)
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
async def test_c5_error_shows_its_reason_and_fields(
    programs: Programs,
    proxy: Proxy,
    folder: Path,
    *,
    words: tuple[str, ...],
    reason: str,
    fields: list[str],
) -> None:
    async with restartable(folder, "--max-prompt-bytes", "10") as (server, client):
        known = await client.run_accepted("known", "hi", run_id="taken", allow_missing=True)
        await known.completed(10)
        proxy.target = server.address
        program = await programs.start(*words, target=proxy.address)
        await program.exits(3)
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
async def test_invalid_arguments_exit_with_2_and_call_no_server(
    programs: Programs, proxy: Proxy, words: tuple[str, ...]
) -> None:
    program = await programs.start(*words, target=proxy.address)
    await program.exits(2)
    assert program.err.lines
    assert program.out.text == ""
    assert proxy.connections == 0
