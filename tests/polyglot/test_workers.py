"""Worker programs: `runlane worker`, and the example in Go (docs/workers.md, W1 to W11).

Their agent says the words of the prompt in capitals, 20 ms apart.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from polyglot.languages import LANGUAGES, ROOT, environment
from polyglot.proxy import Proxy
from runlane import Client, RunState
from support.server import ListeningProcess, ServerProcess, clean_environment
from support.workers import accept, check_whole, followed, until_streaming

SECONDS = 60.0

AGENT = """
import asyncio

async def answer(turn):
    for word in turn.prompt.text.split():
        yield word.upper() + " "
        await asyncio.sleep(0.02)
"""

PROMPT = " ".join(f"w{n}" for n in range(400))

SAID = PROMPT.upper() + " "


@pytest.fixture(scope="session", params=["python", "go"])
def worker_argv(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ...]:
    """The command of a worker, in a folder that has what it needs."""
    folder = tmp_path_factory.mktemp(str(request.param))
    if request.param == "python":
        (folder / "upper.py").write_text(AGENT)
        here = f"import sys; sys.path.insert(0, {str(folder)!r}); "
        command = "from runlane.cli import main; sys.exit(main())"
        arguments = ("worker", "upper:answer", "--slots", "4", "--drain-timeout", "0")
        return (sys.executable, "-c", here + command, *arguments)
    if missing := LANGUAGES["go"].missing():
        pytest.skip(missing)
    program = folder / "worker"
    source = ROOT / "examples" / "go-worker"
    build = [shutil.which("go") or "go", "build", "-o", str(program), "."]
    subprocess.run(build, cwd=source, check=True, env=environment())
    return (str(program),)


@asynccontextmanager
async def program(
    argv: tuple[str, ...], address: str, folder: Path
) -> AsyncIterator[ListeningProcess]:
    """The worker, as a process; it is killed at the end."""
    env = clean_environment() | {"RUNLANE_SERVER": address}
    started = ListeningProcess(argv, folder, env=env)
    started.launch()
    try:
        yield started
    finally:
        await started.kill()


@asynccontextmanager
async def server(folder: Path, *flags: str) -> AsyncIterator[tuple[ServerProcess, Client]]:
    node = ServerProcess(folder, "--agent", "worker", *flags, base=clean_environment())
    await node.start()
    try:
        async with Client(node.address, timeout=60) as client:
            yield node, client
    finally:
        await node.kill()


async def test_r34_a_worker_executes_a_run_and_then_the_next_one(
    worker_argv: tuple[str, ...], tmp_path: Path
) -> None:
    async with (
        server(tmp_path) as (node, client),
        program(worker_argv, node.address, tmp_path),
    ):
        for n in range(6):
            handle = await accept(client, f"s{n % 2}", "one two")
            assert (await handle.completed(SECONDS)).text == "ONE TWO "


async def test_r37_a_cancel_stops_a_worker(worker_argv: tuple[str, ...], tmp_path: Path) -> None:
    async with (
        server(tmp_path) as (node, client),
        program(worker_argv, node.address, tmp_path),
    ):
        handle = await accept(client, "s", PROMPT)
        await until_streaming(client, [handle])
        await client.cancel("s")
        end = await handle.completed(SECONDS)
        assert end.state is RunState.CANCELLED
        assert SAID.startswith(end.text)
        again = await accept(client, "s", "next")
        assert (await again.completed(SECONDS)).text == "NEXT "


async def test_r36_a_worker_continues_over_restarts_of_the_server(
    worker_argv: tuple[str, ...], tmp_path: Path
) -> None:
    async with (
        server(tmp_path) as (node, client),
        program(worker_argv, node.address, tmp_path),
    ):
        handles = [await accept(client, f"s{n}", PROMPT) for n in range(4)]
        following = [asyncio.create_task(followed(handle)) for handle in handles]
        for number in (signal.SIGKILL, signal.SIGTERM):
            await until_streaming(client, handles)
            await node.stop(number)
            await node.start()
        for events in await asyncio.gather(*following):
            check_whole(events, SAID)


async def test_r34_a_worker_continues_after_a_lost_connection(
    worker_argv: tuple[str, ...], tmp_path: Path
) -> None:
    async with (
        server(tmp_path) as (node, client),
        Proxy() as proxy,
        program(worker_argv, proxy.address, tmp_path),
    ):
        proxy.target = node.address
        handle = await accept(client, "s", PROMPT)
        following = asyncio.create_task(followed(handle))
        for _ in range(3):
            await until_streaming(client, [handle])
            proxy.cut()
        check_whole(await following, SAID)


async def test_r33_a_worker_that_was_away_for_too_long_drops_its_run(
    worker_argv: tuple[str, ...], tmp_path: Path
) -> None:
    async with (
        server(tmp_path, "--worker-lease", "500ms") as (node, client),
        program(worker_argv, node.address, tmp_path) as worker,
    ):
        handle = await accept(client, "s", PROMPT, max_attempts=2)
        await until_streaming(client, [handle])
        worker.send(signal.SIGSTOP)
        await node.stop(signal.SIGKILL)
        await node.start()
        async with program(worker_argv, node.address, tmp_path):
            end = await handle.completed(SECONDS)
            assert (end.text, end.attempt) == (SAID, 2)
        worker.send(signal.SIGCONT)
        # It has learned that its attempt is over, and works on.
        again = await accept(client, "t", "next")
        assert (await again.completed(SECONDS)).text == "NEXT "


async def test_r37_a_worker_that_is_stopped_ends_and_gives_its_runs_back(
    worker_argv: tuple[str, ...], tmp_path: Path
) -> None:
    async with (
        server(tmp_path) as (node, client),
        program(worker_argv, node.address, tmp_path) as worker,
    ):
        handle = await accept(client, "s", PROMPT, max_attempts=2)
        await until_streaming(client, [handle])
        assert await worker.stop(signal.SIGTERM) == 0
        async with program(worker_argv, node.address, tmp_path):
            end = await handle.completed(SECONDS)
            assert (end.text, end.attempt) == (SAID, 2)
