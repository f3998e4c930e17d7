"""C13: who calls, and who may not hear of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from polyglot.program import Programs
from polyglot.serving import SCRIPTED
from support.server import ServerProcess, serving

SECRET = "not-to-be-seen"  # noqa: S105 - it opens nothing


def new_token(folder: Path, role: str) -> str:
    """A token for the server in a folder."""
    told = subprocess.run(
        (
            *(sys.executable, "-m", "runlane_server", "token", "new", role),
            *("--access", str(folder / "access.toml"), "--role", role),
        ),
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return told.stdout.split()[-1]


@asynccontextmanager
async def guarded(folder: Path) -> AsyncIterator[tuple[ServerProcess, str, str]]:
    """A server that lets nobody in without a token, one for running, and one for reading."""
    runs, reads = new_token(folder, "run"), new_token(folder, "read")
    async with serving(folder, *SCRIPTED, "--access", "access.toml") as server:
        yield server, runs, reads


async def test_c13_the_token_is_sent_with_every_call(programs: Programs, folder: Path) -> None:
    async with guarded(folder) as (server, runs, _):
        run = await programs.start("run", "s", "hello", target=server.address, token=runs)
        await run.ends(0)
        assert run.out.text == "hello\n"
        cancel = await programs.start("cancel", "s", target=server.address, token=runs)
        await cancel.ends(0)
        watch = await programs.start("watch", "--count", "1", target=server.address, token=runs)
        await watch.tells("watching")
        again = await programs.start("run", "s", "hello", target=server.address, token=runs)
        await again.ends(0)
        await watch.ends(0)


@pytest.mark.parametrize(
    "words", [("run", "s", "hello"), ("cancel", "s"), ("watch",)], ids=" ".join
)
@pytest.mark.parametrize("token", ["", "wrong"])
async def test_c13_who_is_not_known_is_refused(
    programs: Programs, folder: Path, words: tuple[str, ...], token: str
) -> None:
    async with guarded(folder) as (server, _, _):
        program = await programs.start(*words, target=server.address, token=token)
        await program.ends(3)
    assert program.err.lines[-1].startswith("UNAUTHENTICATED: ")
    assert program.out.text == ""


async def test_c13_who_may_not_is_refused(programs: Programs, folder: Path) -> None:
    async with guarded(folder) as (server, _, reads):
        program = await programs.start("run", "s", "hello", target=server.address, token=reads)
        await program.ends(3)
    assert program.err.lines[-1].startswith("PERMISSION_DENIED: ")


@pytest.mark.parametrize(
    "target", ["192.0.2.1:50051", "localhost.example.test:50051", "127.0.0.1.example.test:50051"]
)
async def test_c13_a_token_does_not_leave_this_machine_unencrypted(
    programs: Programs, target: str
) -> None:
    program = await programs.start("run", "s", "hello", target=target, token=SECRET)
    await program.ends(2)
    assert target in program.err.text
    assert SECRET not in program.err.text
