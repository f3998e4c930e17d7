"""C13: the token and where it may be sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyglot.program import Programs
from polyglot.serving import guarded

SECRET = "not-to-be-seen"  # noqa: S105 - no server knows it


async def test_c13_every_call_sends_the_token(programs: Programs, folder: Path) -> None:
    async with guarded(folder) as (server, runs, _):
        run = await programs.start("run", "s", "hello", target=server.address, token=runs)
        await run.exits(0)
        assert run.out.text == "hello\n"
        cancel = await programs.start("cancel", "s", target=server.address, token=runs)
        await cancel.exits(0)
        watch = await programs.start("watch", "--count", "1", target=server.address, token=runs)
        await watch.reports("watching")
        again = await programs.start("run", "s", "hello", target=server.address, token=runs)
        await again.exits(0)
        await watch.exits(0)


@pytest.mark.parametrize(
    "words", [("run", "s", "hello"), ("cancel", "s"), ("watch",)], ids=" ".join
)
@pytest.mark.parametrize("token", ["", "wrong"])
async def test_c13_call_without_a_valid_token_is_refused(
    programs: Programs, folder: Path, words: tuple[str, ...], token: str
) -> None:
    async with guarded(folder) as (server, _, _):
        program = await programs.start(*words, target=server.address, token=token)
        await program.exits(3)
    assert program.err.lines[-1].startswith("UNAUTHENTICATED: ")
    assert program.out.text == ""


async def test_c13_call_without_permission_is_refused(programs: Programs, folder: Path) -> None:
    async with guarded(folder) as (server, _, reads):
        program = await programs.start("run", "s", "hello", target=server.address, token=reads)
        await program.exits(3)
    assert program.err.lines[-1].startswith("PERMISSION_DENIED: ")


@pytest.mark.parametrize(
    "target", ["192.0.2.1:50051", "localhost.example.test:50051", "127.0.0.1.example.test:50051"]
)
async def test_c13_token_is_not_sent_unencrypted_to_another_machine(
    programs: Programs, target: str
) -> None:
    program = await programs.start("run", "s", "hello", target=target, token=SECRET)
    await program.exits(2)
    assert target in program.err.text
    assert SECRET not in program.err.text
