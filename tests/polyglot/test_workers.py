"""Workers in five languages (examples/): what a worker has to do (docs/workers.md, W1 to W14).

Their agent says the words of the prompt in capitals, 20 ms apart. For a prompt `release VERSION` it
builds in a step, asks for an approval, and then emits an artifact, a custom event and a result. For
`recall` it says the texts of the earlier turns.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from polyglot.program import Program, Programs
from polyglot.proxy import Proxy
from polyglot.serving import becomes_state, new_token
from runlane import (
    Artifact,
    Client,
    Custom,
    RunComplete,
    RunEvent,
    RunHandle,
    RunState,
    Started,
    Step,
    TextDelta,
    WhenBusy,
)
from support.server import ServerProcess, clean_environment
from support.workers import accept, check_whole, followed, requested, until_streaming

SECONDS = 60.0

SLOTS = 4

PROMPT = " ".join(f"w{n}" for n in range(300))

SAID = PROMPT.upper() + " "

TURN_BYTES = range(380, 560, 20)
"""About what a server sends on a connection until a turn with a short prompt has arrived."""

OUTAGE = 10.0
"""Seconds. gRPC's own backoff reconnects after 5 seconds, and then after 9 or more."""


@asynccontextmanager
async def served(folder: Path, *flags: str) -> AsyncIterator[tuple[ServerProcess, Client]]:
    """A server whose agent is executed by workers, and a client of it."""
    node = ServerProcess(folder, "--agent", "worker", *flags, base=clean_environment())
    await node.start()
    try:
        async with Client(node.address, timeout=60) as client:
            yield node, client
    finally:
        await node.kill()


async def launched(workers: Programs, address: str, **env: str) -> Program:
    """A worker that has started."""
    program = await workers.launch(env={"RUNLANE_SERVER": address, **env})
    await program.prints("worker for ")
    return program


async def said(client: Client, session: str, prompt: str) -> str:
    """The text of a new run."""
    handle = await accept(client, session, prompt)
    return (await handle.completed(SECONDS)).text


async def test_w1_a_worker_executes_as_many_runs_as_it_has_slots(
    workers: Programs, folder: Path
) -> None:
    async with served(folder) as (node, client):
        await launched(workers, node.address)
        handles = [await accept(client, f"s{n}", PROMPT) for n in range(SLOTS + 1)]
        *active, last = handles
        await until_streaming(client, active)
        assert (await client.get_run(last.run_id)).state is RunState.ACCEPTED
        await client.cancel("s0")
        assert (await last.completed(SECONDS)).text == SAID


async def test_w2_a_worker_splits_text_that_is_too_long_for_an_event(
    workers: Programs, folder: Path
) -> None:
    async with served(folder) as (node, client):
        await launched(workers, node.address)
        # Characters of one to four bytes; the limit of an event is 65,536 characters.
        prompt = "aä€😀" * 40_000
        handle = await accept(client, "s", prompt)
        check_whole(await followed(handle), prompt.upper() + " ")


async def test_w5_a_worker_executes_one_run_after_the_other(
    workers: Programs, folder: Path
) -> None:
    async with served(folder) as (node, client):
        await launched(workers, node.address)
        for n in range(2 * SLOTS):
            assert await said(client, f"s{n % 2}", "one two") == "ONE TWO "


async def test_w6_a_cancel_stops_the_agent(workers: Programs, folder: Path) -> None:
    # The server itself would end the turn only after the timeout of the test.
    async with served(folder, "--cancel-grace", "5m") as (node, client):
        await launched(workers, node.address)
        handle = await accept(client, "s", PROMPT)
        await until_streaming(client, [handle])
        await client.cancel("s")
        end = await handle.completed(SECONDS)
        assert end.state is RunState.CANCELLED
        assert SAID.startswith(end.text)
        assert await said(client, "s", "next") == "NEXT "


async def test_w7_a_worker_that_was_away_for_too_long_drops_its_run(
    workers: Programs, folder: Path
) -> None:
    async with served(folder, "--worker-lease", "500ms") as (node, client):
        away = await launched(workers, node.address)
        handle = await accept(client, "s", PROMPT, max_attempts=2)
        await until_streaming(client, [handle])
        away.process.send_signal(signal.SIGSTOP)
        await node.stop(signal.SIGKILL)
        await node.start()
        other = await launched(workers, node.address)
        end = await handle.completed(SECONDS)
        assert (end.text, end.attempt) == (SAID, 2)
        await other.kill()
        away.process.send_signal(signal.SIGCONT)
        # It has learned that its attempt is over, and continues with other runs.
        assert await said(client, "t", "next") == "NEXT "


async def test_w8_a_worker_continues_after_a_lost_connection(
    workers: Programs, proxy: Proxy, folder: Path
) -> None:
    async with served(folder) as (node, client):
        proxy.target = node.address
        await launched(workers, proxy.address)
        handles = [await accept(client, f"s{n}", PROMPT) for n in range(SLOTS)]
        following = [asyncio.create_task(followed(handle)) for handle in handles]
        for _ in range(3):
            await until_streaming(client, handles)
            proxy.cut()
        for events in await asyncio.gather(*following):
            check_whole(events, SAID)


async def test_w8_events_whose_acknowledgement_was_lost_are_stored_once(
    workers: Programs, proxy: Proxy, folder: Path
) -> None:
    async with served(folder) as (node, client):
        proxy.target = node.address
        # Each connection breaks within the messages of the server, and so in mid-emit; the first
        # one after the turn has arrived.
        proxy.cuts = [len(PROMPT) + 2000, 700, 900, 1101]
        await launched(workers, proxy.address)
        handle = await accept(client, "s", PROMPT)
        check_whole(await followed(handle), SAID)
        assert not proxy.cuts


async def test_w8_a_turn_that_is_lost_on_its_way_starts_again_at_once(
    workers: Programs, proxy: Proxy, folder: Path
) -> None:
    async with served(folder, "--worker-lease", "60s") as (node, client):
        proxy.target = node.address
        # The connection breaks within the turn.
        proxy.cuts = [len(PROMPT)]
        await launched(workers, proxy.address)
        handle = await accept(client, "s", PROMPT)
        async with asyncio.timeout(SECONDS / 2):
            check_whole(await followed(handle), SAID, attempt=2)
        assert not proxy.cuts


async def test_w8_a_worker_continues_over_restarts_of_the_server(
    workers: Programs, folder: Path
) -> None:
    async with served(folder) as (node, client):
        await launched(workers, node.address)
        handles = [await accept(client, f"s{n}", PROMPT) for n in range(SLOTS)]
        following = [asyncio.create_task(followed(handle)) for handle in handles]
        for number in (signal.SIGKILL, signal.SIGTERM):
            await until_streaming(client, handles)
            await node.stop(number)
            await node.start()
        for events in await asyncio.gather(*following):
            check_whole(events, SAID)


async def test_w8_a_worker_reconnects_soon_after_a_long_outage(
    workers: Programs, proxy: Proxy, folder: Path
) -> None:
    async with served(folder) as (node, client):
        proxy.target = node.address
        await launched(workers, proxy.address)
        handle = await accept(client, "s", PROMPT)
        await until_streaming(client, [handle])
        proxy.target = ""
        proxy.cut()
        clock = asyncio.get_running_loop().time
        until = clock() + OUTAGE
        while clock() < until:
            await proxy.until("closed", proxy.closed + 1)
        proxy.target = node.address
        await proxy.until("connections", proxy.connections + 1, seconds=3)
        check_whole(await followed(handle), SAID)


def check_folded(events: Sequence[RunEvent], text: str) -> None:
    """Checks that every event came once and in order, and that they say the text.

    The text at the end of a run is that after the last prompt that joined.
    """
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    deltas = [event.body.text for event in events if isinstance(event.body, TextDelta)]
    assert "".join(deltas) == text
    end = events[-1].body
    assert isinstance(end, RunComplete)
    assert (end.state, end.attempt, end.text) == (RunState.COMPLETED, 1, "MORE ")


async def test_w9_a_worker_answers_a_prompt_that_joins_the_turn(
    workers: Programs, folder: Path
) -> None:
    async with served(folder) as (node, client):
        await launched(workers, node.address)
        handle = await accept(client, "s", PROMPT)
        await until_streaming(client, [handle])
        joins = await accept(client, "s", "more", when_busy=WhenBusy.FOLD)
        check_folded(await followed(handle), f"{SAID}MORE ")
        assert (await joins.completed(SECONDS)).folded_into == handle.run_id


async def test_w9_a_folded_prompt_survives_a_lost_connection(
    workers: Programs, proxy: Proxy, folder: Path
) -> None:
    async with served(folder) as (node, client):
        proxy.target = node.address
        await launched(workers, proxy.address)
        handle = await accept(client, "s", PROMPT)
        following = asyncio.create_task(followed(handle))
        await until_streaming(client, [handle])
        # The server has given the prompt away; the worker may not have received it.
        joins = await accept(client, "s", "more", when_busy=WhenBusy.FOLD)
        await becomes_state(client, joins.run_id, RunState.FOLDED)
        proxy.cut()
        check_folded(await following, f"{SAID}MORE ")


async def test_w10_a_worker_that_is_stopped_gives_its_runs_back(
    workers: Programs, folder: Path
) -> None:
    # The server would not start the run again until the timeout of the test, without being asked.
    async with served(folder, "--worker-lease", "5m") as (node, client):
        stopped = await launched(workers, node.address)
        handle = await accept(client, "s", PROMPT, max_attempts=2)
        await until_streaming(client, [handle])
        stopped.process.send_signal(signal.SIGTERM)
        await stopped.exits(0)
        await launched(workers, node.address)
        end = await handle.completed(SECONDS)
        assert (end.text, end.attempt) == (SAID, 2)


async def test_w10_a_worker_without_a_run_stops_at_once(workers: Programs, folder: Path) -> None:
    async with served(folder) as (node, client):
        stopped = await launched(workers, node.address)
        assert await said(client, "s", "hello") == "HELLO "
        stopped.process.send_signal(signal.SIGTERM)
        await stopped.exits(0, seconds=10)


async def test_w11_a_worker_ends_if_the_server_does_not_declare_its_agent(
    workers: Programs, folder: Path
) -> None:
    async with served(folder) as (node, _):
        program = await launched(workers, node.address, RUNLANE_AGENT="nobody")
        await program.exits(1)
        assert "nobody" in program.err.text, program.said


@pytest.mark.parametrize("token", ["", "wrong"])
async def test_w11_a_worker_ends_if_its_token_is_refused(
    workers: Programs, folder: Path, token: str
) -> None:
    new_token(folder, "work")
    async with served(folder, "--access", "access.toml") as (node, _):
        program = await launched(workers, node.address, RUNLANE_TOKEN=token)
        await program.exits(1)
        assert "credentials" in program.err.text, program.said


BUILT = '"app-1.2"'


async def release(client: Client, session: str) -> RunHandle:
    """A run that waits for an approval. Attempts may be lost on their way to the worker."""
    handle = await accept(client, session, "release 1.2", max_attempts=20)
    request = await requested(client, handle.run_id)
    assert (request.text, request.tool_name) == ("May I deploy app-1.2?", "deploy")
    return handle


async def approve(client: Client, handle: RunHandle, answer: bool = True) -> RunComplete:
    """Answers the question of a run; returns its end."""
    await client.answer_input(await requested(client, handle.run_id), answer)
    return await handle.completed(SECONDS)


async def check_released(handle: RunHandle, *programs: Program) -> None:
    """Checks all that a release has emitted, and that its step was done once."""
    events = await followed(handle)
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    started = max(event.index for event in events if isinstance(event.body, Started))
    assert [event.body for event in events if isinstance(event.body, Step)] == [
        Step("build", BUILT)
    ]
    last = [event.body for event in events if event.index > started]
    assert [body for body in last if isinstance(body, Custom)] == [
        Custom("deployed", '{"build":"app-1.2"}')
    ]
    (notes,) = (body for body in last if isinstance(body, Artifact))
    assert (notes.artifact_id, notes.name, notes.mime_type) == ("notes", "notes.txt", "text/plain")
    assert (notes.content, notes.append, notes.last) == ("Release 1.2", False, True)
    end = last[-1]
    assert isinstance(end, RunComplete)
    assert (end.text, end.result, end.error) == (
        "Deployed app-1.2.",
        '{"build":"app-1.2"}',
        None,
    )
    if programs:
        assert sum(program.out.text.count("building 1.2") for program in programs) == 1


async def test_w12_w13_w14_a_worker_that_asks_continues_when_people_have_answered(
    workers: Programs, folder: Path
) -> None:
    async with served(folder) as (node, client):
        worker = await launched(workers, node.address)
        handles = [await release(client, f"s{n}") for n in range(SLOTS)]
        # While people think, its slots are free.
        assert await said(client, "other", "hello") == "HELLO "
        await node.stop(signal.SIGKILL)
        await node.start()
        for n, handle in enumerate(handles):
            end = await approve(client, handle, answer=n == 0)
            if n == 0:
                assert (end.text, end.error) == ("Deployed app-1.2.", None)
            else:
                assert end.error is not None
                assert (end.error.reason, end.error.message) == (
                    "NOT_APPROVED",
                    "nothing was deployed",
                )
        assert worker.out.text.count("building 1.2") == SLOTS, worker.said


async def test_a_worker_reads_the_history_of_the_session(workers: Programs, folder: Path) -> None:
    async with served(folder) as (node, client):
        await launched(workers, node.address)
        long = "x" * 100_000
        assert await said(client, "s", long) == f"{long.upper()} "
        assert await said(client, "s", "two") == "TWO "
        expected = f"{long}|{long.upper()} |two|TWO |"
        assert await said(client, "s", "recall") == expected


async def test_w12_a_step_is_not_repeated_by_another_worker(
    workers: Programs, folder: Path
) -> None:
    async with served(folder) as (node, client):
        first = await launched(workers, node.address)
        handle = await release(client, "s")
        await first.kill()
        second = await launched(workers, node.address)
        await approve(client, handle)
        await check_released(handle, first, second)


async def test_w14_steps_and_questions_survive_lost_connections(
    workers: Programs, proxy: Proxy, folder: Path
) -> None:
    async with served(folder) as (node, client):
        proxy.target = node.address
        worker = await launched(workers, proxy.address)
        broken = 0
        for n, size in enumerate(TURN_BYTES):
            connections = proxy.connections
            # The first connection breaks within the turn or what follows it, the others within the
            # short answers to a resume.
            proxy.cuts = [size, 100, 120]
            proxy.cut()
            await proxy.until("connections", connections + 1)
            handle = await release(client, f"s{n}")
            broken += 3 - len(proxy.cuts)
            proxy.cuts.clear()
            await approve(client, handle)
            await check_released(handle)
        assert broken > len(TURN_BYTES)
        assert worker.out.text.count("building 1.2") == len(TURN_BYTES), worker.said


async def test_a_worker_sends_its_token(workers: Programs, folder: Path) -> None:
    works, runs = new_token(folder, "work"), new_token(folder, "run")
    async with served(folder, "--access", "access.toml") as (node, _):
        await launched(workers, node.address, RUNLANE_TOKEN=works)
        async with Client(node.address, token=runs) as client:
            assert await said(client, "s", "hello") == "HELLO "


@pytest.mark.parametrize("server", ["192.0.2.1:50051", "127.0.0.1.example.test:50051"])
async def test_a_worker_keeps_its_token_from_other_machines(workers: Programs, server: str) -> None:
    secret = "not-to-be-seen"  # noqa: S105 - no server knows it
    program = await workers.launch(env={"RUNLANE_SERVER": server, "RUNLANE_TOKEN": secret})
    await program.exits(1)
    assert server in program.err.text
    assert secret not in program.err.text + program.out.text
