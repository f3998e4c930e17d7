"""Agents that go wrong (`odd/`), in five languages: their runs end, and their slot is free again.

For the prompt `wordless` an agent fails with an error that has no text, for `no text` with one of
the library that has a reason only. For `early` it uses its turn no more and works on, for `clone`
it keeps it in a task, for `half` its texts have halves of characters, and for `nothing` its step
and its result have no value. Else it says `ok`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from polyglot.languages import Language
from polyglot.program import Programs
from polyglot.test_workers import SECONDS, launched, said, served
from runlane import RunState
from support.workers import accept


@pytest.mark.parametrize("prompt", ["wordless", "no text"])
async def test_an_error_without_a_text_ends_its_run(
    odd_workers: Programs, folder: Path, prompt: str
) -> None:
    async with served(folder) as (node, client):
        await launched(odd_workers, node.address)
        end = await (await accept(client, "s", prompt)).completed(SECONDS)
        assert end.state is RunState.FAILED
        assert end.error is not None
        assert end.error.reason == ("NO_MODEL" if prompt == "no text" else "AGENT_ERROR")
        assert end.error.message
        assert await said(client, "s", "go on") == "ok"


async def test_w6_a_cancel_stops_an_agent_that_uses_its_turn_no_more(
    odd_workers: Programs, folder: Path
) -> None:
    # The server itself would end the turn only after the timeout of the test.
    async with served(folder, "--cancel-grace", "5m") as (node, client):
        program = await launched(odd_workers, node.address)
        handle = await accept(client, "s", "early")
        await program.prints("let go")
        await client.cancel("s")
        assert (await handle.completed(SECONDS)).state is RunState.CANCELLED
        assert await said(client, "s", "go on") == "ok"


async def test_w6_a_turn_ends_with_its_agent_though_a_task_keeps_it(
    odd_workers: Programs, language: Language, folder: Path
) -> None:
    if language.name != "rust":
        pytest.skip("only in Rust does an agent own its turn")
    async with served(folder, "--cancel-grace", "5m") as (node, client):
        await launched(odd_workers, node.address)
        assert await said(client, "s", "clone") == "ok"
        assert await said(client, "s", "go on") == "ok"


async def test_w12_a_step_may_have_no_result(odd_workers: Programs, folder: Path) -> None:
    async with served(folder) as (node, client):
        await launched(odd_workers, node.address)
        assert await said(client, "s", "nothing") == "ok"


async def test_w12_texts_that_no_message_can_have_are_mended(
    odd_workers: Programs, folder: Path
) -> None:
    # The key of a step among them: the server answers with the key that was sent.
    async with served(folder) as (node, client):
        await launched(odd_workers, node.address)
        assert await said(client, "s", "half") == "ok"
