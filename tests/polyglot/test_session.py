"""C15: session prints a snapshot, then everything that happens after it, once."""

from __future__ import annotations

from pathlib import Path

from polyglot.program import Program, Programs
from polyglot.proxy import Proxy
from polyglot.serving import (
    becomes,
    becomes_state,
    gated,
    open_gate,
    restartable,
    say,
    script,
    scripted,
)
from runlane import Client, CursorCompacted, RunHandle, RunState, TextDelta


def end(handle: RunHandle) -> str:
    """The line for the end of a completed run."""
    return f"{handle.run_id} COMPLETED STOP"


def text(handle: RunHandle, words: str) -> str:
    """The line for a text of a run."""
    return f"{handle.run_id} text {words}"


async def begun(client: Client, gate: str) -> RunHandle:
    """Starts a run that has printed a text and waits for a gate."""
    handle = await client.run_accepted("s", gated(gate), allow_missing=True)
    await becomes_state(client, handle.run_id, RunState.ACTIVE)
    return handle


async def becomes_session_compacted(client: Client, cursor: str) -> None:
    """Waits until the events of the session after a cursor are compacted."""

    async def is_refused() -> bool:
        try:
            async with client.subscribe_session("s", cursors={"s": cursor}) as stream:
                await anext(stream)
                return False
        except CursorCompacted:
            return True

    await becomes(is_refused)


async def following(programs: Programs, *words: str, target: str) -> Program:
    """Starts the command, and waits until it is subscribed."""
    program = await programs.start("session", "s", *words, target=target)
    await program.reports("watching")
    return program


async def test_c15_session_prints_a_snapshot_and_the_rest(programs: Programs, folder: Path) -> None:
    async with scripted(folder) as (server, client):
        active = await begun(client, "g")
        waiting = await client.run_accepted("s", "hello")
        program = await following(programs, "--count", "2", target=server.address)
        await program.prints(text(active, "begun "))
        await open_gate(client, "g")
        await program.exits(0)
    assert program.out.lines == [
        f"snapshot {active.run_id} {waiting.run_id}",
        text(active, "begun "),
        text(active, "ended"),
        end(active),
        text(waiting, "hello"),
        end(waiting),
    ]


async def test_c15_session_that_does_not_exist_yet_begins_empty(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        program = await following(programs, "--count", "1", target=server.address)
        await say(client, session="other")
        handle = await client.run_accepted("s", "hello", allow_missing=True)
        await program.exits(0)
    assert program.out.lines == ["snapshot -", text(handle, "hello"), end(handle)]


async def test_c15_session_resumes_by_cursor_across_a_crash_and_a_restart_of_its_own(
    programs: Programs, folder: Path
) -> None:
    file = programs.folder / "cursor"
    async with restartable(folder) as (server, client):
        words = ("--cursor-file", str(file), "--count")
        program = await following(programs, *words, "2", target=server.address)
        one = await client.run_accepted("s", "one", allow_missing=True)
        await program.prints(end(one))
        await server.kill()
        await program.reports("reconnecting UNAVAILABLE")
        await server.start()
        two = await client.run_accepted("s", "two")
        await program.exits(0)
        three = await client.run_accepted("s", "three")
        await three.completed(10)
        four = await client.run_accepted("s", "four")
        later = await programs.start("session", "s", *words, "2", target=server.address)
        await later.exits(0)
    assert program.out.lines == [
        "snapshot -",
        *(text(one, "one"), end(one)),
        *(text(two, "two"), end(two)),
    ]
    assert later.out.lines == [text(three, "three"), end(three), text(four, "four"), end(four)]


async def test_c15_session_resumes_in_the_middle_of_a_run(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        program = await following(programs, "--count", "1", target=proxy.address)
        handle = await begun(client, "g")
        await program.prints(text(handle, "begun "))
        proxy.cut()
        await program.reports("reconnecting UNAVAILABLE")
        await open_gate(client, "g")
        await program.exits(0)
    lines = program.out.lines
    assert lines == ["snapshot -", text(handle, "begun "), text(handle, "ended"), end(handle)]


async def test_c15_large_snapshot_is_complete_after_broken_connections(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    word = "x" * 60_000
    async with scripted(folder) as (server, client):
        prompt = script({"text": word, "repeat": 90}, {"text": "."}, {"wait": "g"})
        active = await client.run_accepted("s", prompt, allow_missing=True)
        said = 0
        async for event in active.events():
            if isinstance(event.body, TextDelta):
                said += len(event.body.text)
            if said == 90 * len(word) + 1:
                break
        waiting = await client.run_accepted("s", "hello")
        proxy.target = server.address
        # Within the first message of the snapshot, and within a later one.
        proxy.cuts = [200_000, 4_500_000]
        program = await following(programs, target=proxy.address)
        await program.prints(".\n")
    assert not proxy.cuts
    first, *lines = program.out.lines
    assert first == f"snapshot {active.run_id} {waiting.run_id}"
    assert "".join(line.removeprefix(text(active, "")) for line in lines) == 90 * word + "."


async def test_c15_session_reopens_a_silent_stream_and_keeps_one_with_marks(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with restartable(folder, "--progress-interval", "300ms") as (server, client):
        proxy.target = server.address
        words = ("--silence", "2", "--count", "1")
        program = await following(programs, *words, target=proxy.address)
        handle = await begun(client, "g")
        await client.wait_run(handle.run_id, timeout=3)  # longer than --silence
        assert not any(line.startswith("reconnecting") for line in program.err.lines)
        proxy.silence()
        await program.reports("reconnecting UNAVAILABLE")
        await open_gate(client, "g")
        proxy.speak()
        await program.exits(0)
    assert program.out.lines[-2:] == [text(handle, "ended"), end(handle)]


async def test_c15_session_begins_with_a_snapshot_again_after_compaction(
    programs: Programs, folder: Path
) -> None:
    file = programs.folder / "cursor"
    async with restartable(folder) as (server, client):
        words = ("--cursor-file", str(file), "--count", "1")
        program = await following(programs, *words, target=server.address)
        one = await client.run_accepted("s", "one", allow_missing=True)
        await program.exits(0)
        assert program.out.lines == ["snapshot -", text(one, "one"), end(one)]
        kept = file.read_text()
        two = await client.run_accepted("s", "two")
        await two.completed(10)
        await server.stop()
        await server.start("--event-retention", "1ms")
        await becomes_session_compacted(client, kept)
        await server.stop()
        await server.start()

        later = await programs.start("session", "s", *words, target=server.address)
        assert await later.reports("events after ") == f"events after {kept} are gone"
        await later.reports("watching")
        three = await client.run_accepted("s", "three")
        await later.exits(0)
    assert later.out.lines == ["snapshot -", text(three, "three"), end(three)]


async def test_c15_session_ends_when_it_is_deleted(programs: Programs, folder: Path) -> None:
    file = programs.folder / "cursor"
    async with scripted(folder) as (server, client):
        await client.create_session("s")
        words = ("--cursor-file", str(file))
        program = await following(programs, *words, target=server.address)
        await client.delete_session("s")
        await program.exits(0)
    assert program.out.lines == ["snapshot -", "deleted"]
    assert file.read_text() == ""
