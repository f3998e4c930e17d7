"""C16 and C17: an edit of a waiting run and a fork of a session, each once however often sent."""

from __future__ import annotations

from pathlib import Path

from polyglot.program import Programs
from polyglot.proxy import Proxy
from polyglot.serving import RUN_ID, becomes, gated, open_gate, say, script, scripted
from runlane import Client, RunHandle

LONG = "über " * 100
"""A prompt that is longer than an excerpt."""


async def waiting(client: Client, prompt: str) -> RunHandle:
    """Accepts a run that waits behind an active one."""
    await client.run_accepted("s", gated("g"), allow_missing=True)
    return await client.run_accepted("s", prompt)


async def test_c16_edit_prints_the_whole_prompt_and_replaces_it(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        handle = await waiting(client, LONG)
        program = await programs.start("edit", handle.run_id, "new", target=server.address)
        await program.exits(0)
        assert program.out.lines == [LONG, f"{handle.run_id} 1"]
        await open_gate(client, "g")
        assert (await handle.completed()).text == "new"
        late = await programs.start("edit", handle.run_id, "late", target=server.address)
        await late.exits(3)
    assert any(line.startswith("ALREADY_STARTED: ") for line in late.err.lines)


async def test_c16_edit_that_is_sent_twice_is_one_edit(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        handle = await waiting(client, "old")
        proxy.target = server.address
        proxy.silence_at_request = 2  # after GetRun
        program = await programs.start("edit", handle.run_id, "new", target=proxy.address)

        async def edited() -> bool:
            return (await client.get_run(handle.run_id)).revision == 1

        await becomes(edited)
        # Another edit meanwhile: the repeated one neither fails nor overwrites it.
        await client.update_run(handle.run_id, prompt="theirs")
        proxy.silence_at_request = 0
        proxy.cut()
        proxy.speak()
        await program.exits(0)
        assert program.out.lines == ["old", f"{handle.run_id} 2"]
        assert (await client.get_prompt(handle.run_id)).text == "theirs"


async def test_c16_edit_does_not_overwrite_the_edit_of_another(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        handle = await waiting(client, "old")
        proxy.target = server.address
        proxy.silence_at_request = 1
        program = await programs.start("edit", handle.run_id, "mine", target=proxy.address)
        await proxy.until("requests", 1)
        for _ in range(5):  # by then the server has answered the program too
            await client.get_run(handle.run_id)
        await client.update_run(handle.run_id, prompt="theirs")
        proxy.silence_at_request = 0
        proxy.speak()  # with the run as it was before
        await program.ends()
        if program.process.returncode == 0:
            # It was slower, and has read what it replaced.
            assert program.out.lines == ["theirs", f"{handle.run_id} 2"]
        else:
            assert any(line.startswith("EDIT_CONFLICT: ") for line in program.err.lines)
            assert (await client.get_prompt(handle.run_id)).text == "theirs"


async def test_c17_fork_prints_the_new_session_and_its_last_turn(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        await say(client, "one", session="s")
        await say(client, "two", session="s")
        program = await programs.start("fork", "s", "copy", target=server.address)
        await program.exits(0)
        again = await programs.start("fork", "s", "copy", target=server.address)
        await again.exits(0)
        assert program.out.lines == again.out.lines == ["copy 2"]
        messages = [each.text async for each in client.list_messages("copy")]
        assert [text for text in messages if text] == messages
        taken = await programs.start("fork", "copy", "s", target=server.address)
        await taken.exits(3)
    assert any(line.startswith("SESSION_EXISTS: ") for line in taken.err.lines)


async def test_c17_fork_that_is_sent_twice_makes_one_session(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        await say(client, script({"text": "one"}), session="s")
        proxy.target = server.address
        proxy.silence_at_request = 1
        program = await programs.start("fork", "s", target=proxy.address)

        async def sessions() -> list[str]:
            return [each.session_id async for each in client.list_sessions()]

        async def forked() -> bool:
            return len(await sessions()) == 2

        await becomes(forked)
        proxy.silence_at_request = 0
        proxy.cut()
        proxy.speak()
        await program.exits(0)
        made = await sessions()
    (line,) = program.out.lines
    name, turn = line.split()
    assert RUN_ID.fullmatch(name)
    assert (turn, sorted(made)) == ("1", sorted([name, "s"]))
