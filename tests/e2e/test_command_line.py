"""The command `runlane` against a real server: its output and its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from runlane import RunState
from support.server import ServerProcess
from support.staging import SECONDS, at_latch, say, script
from support.terminal import CTRL_C, Terminal, at_terminal
from support.wire import Wire

RUNLANE = str(Path(sys.executable).with_name("runlane"))
"""The installed command."""


def environment(address: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RUNLANE_")}
    return {**kept, "RUNLANE_SERVER": address}


async def start_command(server: ServerProcess, *arguments: str) -> Process:
    """Starts the command with its output in pipes."""
    return await asyncio.create_subprocess_exec(
        *(RUNLANE, *arguments),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env=environment(server.address),
    )


async def finish_command(process: Process, stdin: str = "") -> tuple[int | None, str, str]:
    """Waits for the end of the command: its exit code, stdout and stderr."""
    try:
        async with asyncio.timeout(SECONDS):
            out, err = await process.communicate(stdin.encode())
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode, out.decode(), err.decode()


async def command(
    server: ServerProcess, *arguments: str, stdin: str = ""
) -> tuple[int | None, str, str]:
    return await finish_command(await start_command(server, *arguments), stdin)


async def fields(server: ServerProcess, *arguments: str) -> list[list[str]]:
    """The output of a command that succeeds with an empty stderr, by lines and fields."""
    code, out, err = await command(server, *arguments)
    assert (code, err) == (0, "")
    return [line.split("\t") for line in out.splitlines()]


def on_terminal(server: ServerProcess, *arguments: str) -> AbstractAsyncContextManager[Terminal]:
    return at_terminal([RUNLANE, *arguments], environment(server.address))


# --- Run ----------------------------------------------------------------------------------------


async def test_run_prints_the_answer_and_exits_with_the_outcome(server: ServerProcess) -> None:
    failing = script(say("half"), {"fail": "no luck", "reason": "LUCK"})
    given, piped, dashed, failed = await asyncio.gather(
        command(server, "run", "in a new\nsession"),
        command(server, "run", "-s", "s", stdin="by itself"),
        command(server, "run", "-s", "t", "-", stdin="tab\t ä"),
        command(server, "run", "-s", "u", failing),
    )
    assert given[:2] == (0, "in a new\nsession\n")
    assert re.fullmatch(r"session [0-9a-f-]{36}\n", given[2])
    assert piped == (0, "by itself\n", "")
    assert dashed == (0, "tab\t ä\n", "")
    assert failed == (1, "half\n", "failed: LUCK: no luck\n")


async def test_run_streams_until_another_client_cancels(server: ServerProcess, wire: Wire) -> None:
    process = await start_command(server, "run", "-s", "s", script(*at_latch("g")))
    assert process.stdout is not None
    async with asyncio.timeout(SECONDS):
        assert await process.stdout.readexactly(3) == b"<g>"
    await wire.client.cancel("s", reason="by an operator")
    assert await finish_command(process) == (130, "\n", "cancelled: by an operator\n")


async def test_ctrl_c_cancels_the_followed_run(server: ServerProcess, wire: Wire) -> None:
    async with on_terminal(server, "run", "-s", "s", script(*at_latch("g"))) as terminal:
        await terminal.shows("<g>")
        terminal.type(CTRL_C)
        assert await terminal.wait() == 130
        assert "cancelled: interrupted at the terminal" in terminal.screen
        assert "Traceback" not in terminal.screen
    (run,) = [run async for run in wire.client.list_runs("s")]
    assert run.state is RunState.CANCELLED


async def test_a_terminal_shows_the_position_in_the_queue(
    server: ServerProcess, wire: Wire
) -> None:
    active = await wire.start_blocked("s", "g")
    async with on_terminal(server, "run", "-s", "s", "mine") as terminal:
        await terminal.shows("queued behind 1")
        await active.cancel()
        assert await terminal.wait() == 0
        assert "mine\r\n" in terminal.screen
    await wire.start_blocked("s", "g")
    async with on_terminal(server, "run", "-s", "s", "not mine") as terminal:
        await terminal.shows("queued behind 1")
        terminal.type(CTRL_C)
        assert await terminal.wait() == 130
        assert "not mine" not in terminal.screen
    # Ctrl-C cancelled only the followed run, not the one before it.
    assert (await wire.client.get_session("s")).busy


async def test_a_terminal_shows_that_a_run_continues_after_a_crash(
    server: ServerProcess, wire: Wire
) -> None:
    async with on_terminal(server, "run", "-s", "s", script(*at_latch("g"))) as terminal:
        await terminal.shows("<g>")
        await server.kill()
        await terminal.shows("reconnecting: ")
        await server.start()
        assert await terminal.wait() == 1
        assert "connected again" in terminal.screen
        assert "failed: INTERRUPTED: " in terminal.screen


async def test_run_as_json_and_detached(server: ServerProcess, wire: Wire) -> None:
    active = await wire.start_blocked("s", "g")
    printed, detached, refused = await asyncio.gather(
        command(server, "run", "-s", "t", "--json", "hello"),
        command(server, "run", "-s", "s", "--detach", "later"),
        command(server, "run", "-s", "s", "--when-busy", "reject", "now"),
    )
    events = [json.loads(line) for line in printed[1].splitlines()]
    assert printed[0] == 0
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert [event["type"] for event in (events[0], events[-1])] == ["accepted", "run_complete"]
    assert (events[-1]["state"], events[-1]["text"]) == ("completed", "hello")
    assert (refused[0], refused[1], refused[2].count("\n")) == (1, "", 1)
    later = await wire.client.attach(detached[1].strip())
    assert detached == (0, f"{later.run_id}\n", "")
    assert later.run.state is RunState.QUEUED
    again, early = await asyncio.gather(
        command(
            server, *("run", "-s", "s", "--detach", "--json", "--run-id", later.run_id, "later")
        ),
        command(server, "wait", later.run_id, "--timeout", "1ms"),
    )
    assert again[0] == 0
    assert (json.loads(again[1])["run_id"], json.loads(again[1])["accept_seq"]) == (later.run_id, 2)
    assert early == (1, "", f"run {later.run_id} has not ended: it is queued\n")
    waiting = await start_command(server, "wait", later.run_id)
    await active.cancel()
    ended = await command(server, "wait", "--json", active.run_id)
    assert ended[0] == 130
    assert json.loads(ended[1])["cancelled"] is True
    assert await finish_command(waiting) == (0, "later\n", "")


# --- Cancel -------------------------------------------------------------------------------------


async def test_cancel_prints_the_covered_runs(server: ServerProcess, wire: Wire) -> None:
    active = await wire.start_blocked("s", "g")
    waiting = [await wire.accept("s", say("x")) for _ in range(3)]
    ids = [handle.run_id for handle in waiting]
    fence = "fence 4 in session s\n"
    assert await command(server, "cancel", "--run", ids[1]) == (
        0,
        f"s\t3\t{ids[1]}\tqueued\n",
        fence,
    )
    code, out, err = await command(server, "cancel", "s", "--scope", "waiting", "--json")
    receipt = json.loads(out)
    assert (code, err) == (0, "")
    assert [run["run_id"] for run in receipt["cancelled"]] == [ids[0], ids[2]]
    assert receipt["fence_accept_seq"] == 4
    assert await command(server, "cancel", "s", "--reason", "maintenance") == (
        0,
        f"s\t1\t{active.run_id}\tactive\n",
        fence,
    )
    assert (await wire.end(active)).cancel_reason == "maintenance"
    assert await command(server, "cancel", "s") == (0, "", "nothing to cancel\n")
    others = [await wire.start_blocked(session, "g") for session in ("t", "u")]
    code, out, _ = await command(server, "cancel", "--all")
    assert code == 0
    assert {line.split("\t")[2] for line in out.splitlines()} == {h.run_id for h in others}


# --- Read ---------------------------------------------------------------------------------------


JSON_LISTINGS = (("sessions", ()), ("runs", ("-n", "0")), ("messages", ("s",)))


async def test_listings_in_a_pipe_and_as_json(server: ServerProcess, wire: Wire) -> None:
    assert await fields(server, "sessions", "create", "s", "--title", "a\tb") == [["s"]]
    one = await wire.accept("s", say("first\nline"), {"usage": {"input_tokens": 7}})
    await wire.end(one)
    two = await wire.start_blocked("s", "g")
    await wire.accept("s", say("third"))
    sessions, runs, latest, active, messages = await asyncio.gather(
        fields(server, "sessions"),
        fields(server, "runs", "-s", "s"),
        fields(server, "runs", "-n", "1"),
        fields(server, "runs", "--state", "active"),
        fields(server, "messages", "s"),
    )
    assert [session[1:] for session in sessions] == [["s", "busy", "1", "7", "a\\tb"]]
    assert [run[1:3] + run[4:5] for run in runs] == [
        ["s", "3", "queued"],
        ["s", "2", "active"],
        ["s", "1", "completed"],
    ]
    assert [len(run) for run in runs] == [9, 9, 9]
    assert (runs[2][3], runs[1][5]) == (one.run_id, "")
    assert [run[2] for run in latest] == ["3"]
    assert [run[3] for run in active] == [two.run_id]
    assert messages[0][1:5] == ["1", one.run_id, "user", ""]
    assert messages[1][3:] == ["assistant", "stop", "first\\nline"]
    sessions_, runs_, messages_ = await asyncio.gather(
        *(command(server, name, "--json", *more) for name, more in JSON_LISTINGS)
    )
    assert json.loads(sessions_[1])["active_run_id"] == two.run_id
    assert [json.loads(line)["accept_seq"] for line in runs_[1].splitlines()] == [3, 2, 1]
    message = json.loads(messages_[1].splitlines()[1])
    assert (message["role"], message["parts"]) == (
        "assistant",
        [{"type": "text", "text": "first\nline"}],
    )
    code, out, err = await command(server, "sessions", "delete", "s")
    assert (code, out, err.count("\n")) == (1, "", 1)
    await wire.client.cancel("s")
    await wire.end(two)
    assert await fields(server, "sessions", "delete", "s") == []
    assert await fields(server, "sessions") == []


async def test_watch_prints_terminal_events_across_a_restart(
    server: ServerProcess, wire: Wire
) -> None:
    first = await wire.accept("s", say("one"))
    await wire.end(first)
    watching = await start_command(server, "watch", "--from-beginning")
    assert watching.stdout is not None
    async with asyncio.timeout(SECONDS):
        fields_ = (await watching.stdout.readline()).decode().rstrip("\n").split("\t")
    assert fields_[1:] == ["s", "1", first.run_id, "completed", "stop", "one"]
    assert await server.stop() == 0
    await server.start()
    second = await wire.accept("s", {"fail": "no luck"})
    async with asyncio.timeout(SECONDS):
        fields_ = (await watching.stdout.readline()).decode().rstrip("\n").split("\t")
    assert fields_[1:] == ["s", "2", second.run_id, "failed", "error", ""]
    watching.send_signal(signal.SIGINT)
    code, out, err = await finish_command(watching)
    assert (code, out) == (0, "")
    lost, again, last = err.splitlines()
    assert (lost, again) == ("reconnecting: the server is shutting down", "connected again")
    third = await wire.accept("t", say("three"))
    await wire.end(third)
    watching = await start_command(server, "watch", "--json", "--cursor", last.split()[-1])
    assert watching.stdout is not None
    async with asyncio.timeout(SECONDS):
        assert json.loads(await watching.stdout.readline())["run_id"] == third.run_id
    watching.send_signal(signal.SIGINT)
    assert (await finish_command(watching))[0] == 0


async def test_q_leaves_watch_and_top(server: ServerProcess) -> None:
    for name, text in (("watch", "no active or waiting runs"), ("top", "busy sessions")):
        async with on_terminal(server, name) as terminal:
            await terminal.shows(text)
            terminal.type(b"q")
            assert await terminal.wait() == 0


async def test_a_run_is_found_by_the_beginning_of_its_id(server: ServerProcess, wire: Wire) -> None:
    failing = await wire.accept("s", say("half"), {"fail": "no luck", "reason": "LUCK"})
    await wire.end(failing)
    start = failing.run_id[:20]
    assert (await command(server, "wait", start))[:2] == (1, "half\n")
    shown = dict(await fields(server, "show", start))
    expected = {"run": failing.run_id, "state": "failed", "error": "LUCK", "message": "no luck"}
    assert shown.items() >= {**expected, "text": "half", "session": "s", "seq": "1"}.items()
    code, out, _ = await command(server, "show", "--json", start)
    assert (code, json.loads(out)["run_id"]) == (0, failing.run_id)
    (listed,) = await fields(server, "runs")
    assert listed[7] == "LUCK"
    for run_id in ("twins-000001", "twins-000002"):
        await wire.client.run_accepted("s", "p", run_id=run_id)
    code, out, err = await command(server, "show", "twins-00000")
    assert (code, out) == (2, "")
    assert err == "Error: 'twins-00000' is the beginning of 2 run ids; give more of it\n"
    code, out, err = await command(server, "cancel", "--run", "nobody-knows")
    assert (code, err) == (1, "Error: there is no run 'nobody-knows'\n")


async def test_session_is_named_by_a_unique_prefix(server: ServerProcess) -> None:
    for session in ("notes-of-monday", "notes-of-tuesday", "notes-of"):
        await command(server, "run", "-s", session, "hello")
    _, out, _ = await command(server, "messages", "notes-of-m")
    assert out.count("hello") == 2
    # An id is no prefix, although others begin with it.
    assert (await command(server, "messages", "notes-of"))[0] == 0
    assert await command(server, "cancel", "notes-of-t") == (0, "", "nothing to cancel\n")
    ambiguous = "'notes-of-' is the beginning of 2 session ids; give more of it"
    for arguments in (("messages",), ("cancel",), ("sessions", "delete")):
        code, _, err = await command(server, *arguments, "notes-of-")
        assert (code, ambiguous in err) == (2, True)
    assert (await command(server, "sessions", "delete", "notes-of-t", "notes-of-m"))[0] == 0
    code, _, err = await command(server, "cancel", "notes-of-t")
    assert (code, err) == (1, "Error: there is no session 'notes-of-t'\n")
    # Too short for a prefix.
    assert (await command(server, "messages", "notes-o"))[0] == 1
    # A run may mean a new session.
    await command(server, "run", "-s", "notes-o", "hello")
    _, out, _ = await command(server, "sessions")
    assert [line.split("\t")[1] for line in out.splitlines()] == ["notes-o", "notes-of"]


async def test_watch_on_a_terminal_shows_active_and_ended_runs(
    server: ServerProcess, wire: Wire
) -> None:
    async with on_terminal(server, "watch") as terminal:
        await terminal.shows("no active or waiting runs")
        active = await wire.start_blocked("s", "g")
        await terminal.shows(active.run_id[:13])
        await terminal.shows("active")
        await active.cancel()
        await terminal.shows("cancelled")
        terminal.type(CTRL_C)
        assert await terminal.wait() == 0
        assert "resume with --cursor " in terminal.screen


async def test_listings_on_a_narrow_terminal_do_not_break_ids(
    server: ServerProcess, wire: Wire
) -> None:
    handle = await wire.accept("a session with a rather long name", say("x " * 100))
    await wire.end(handle)
    async with on_terminal(server, "runs") as terminal:
        assert await terminal.wait() == 0
        assert handle.run_id[:13] in terminal.screen
        assert handle.run_id not in terminal.screen
        assert "completed" in terminal.screen
        # A header and the run, wrapped to the width of the screen.
        assert terminal.screen.count("\n") < 8


# --- Errors ------------------------------------------------------------------------------------


# --- Names that are misspelt ----------------------------------------------------------------------

NO_SESSION = (1, "", "Error: there is no session 'nosuch'\n")


async def test_a_list_of_an_unknown_session_is_an_error(server: ServerProcess) -> None:
    listings = (
        ("queue", "nosuch"),
        ("queue", "list", "nosuch", "--json"),
        ("runs", "-s", "nosuch"),
        ("runs", "--json", "--total", "-s", "nosuch"),
        ("answer", "-s", "nosuch"),
        ("messages", "nosuch"),
    )
    for listing in listings:
        code, out, err = await command(server, *listing)
        assert (code, out, err.removeprefix("0 in all\n")) == NO_SESSION, listing


async def test_a_known_session_without_runs_is_an_empty_list(
    server: ServerProcess, wire: Wire
) -> None:
    await wire.client.create_session("idle")
    for listing in (("queue", "idle"), ("runs", "-s", "idle"), ("answer", "-s", "idle")):
        assert await command(server, *listing) == (0, "", ""), listing


async def test_a_follower_of_an_unknown_session_says_that_it_waits(server: ServerProcess) -> None:
    followers = (
        (("follow", "nosuch"), b"no run or session nosuch; waiting"),
        (("follow", "nosuch", "--json"), b"no run or session nosuch; waiting"),
        (("watch", "-s", "nosuch"), b"no session nosuch; waiting"),
    )
    for arguments, said in followers:
        process = await start_command(server, *arguments)
        assert process.stderr is not None
        async with asyncio.timeout(SECONDS):
            assert (await process.stderr.readline()).startswith(said)
        process.send_signal(signal.SIGINT)
        await finish_command(process)


# --- Edits in an editor ---------------------------------------------------------------------------


def editor(folder: Path, code: str) -> str:
    """A command that changes `text`, the content of the file that it is called with."""
    program = folder / "editor.py"
    program.write_text(
        "import pathlib, subprocess, sys\n"
        "file = pathlib.Path(sys.argv[1])\n"
        f"text = file.read_text()\n{code}\nfile.write_text(text)\n"
    )
    return f"{sys.executable} {program}"


def taken(file: Path) -> str:
    """The content of a file, which is removed."""
    text = file.read_text()
    file.unlink()
    return text


async def test_r46_the_whole_prompt_of_a_waiting_run_is_edited_in_an_editor(
    server: ServerProcess, wire: Wire, tmp_path: Path
) -> None:
    active = await wire.start_blocked("s", "g")
    waiting = await wire.client.run_accepted("s", "x" * 1_000)

    def edited(change: str, run_id: str = waiting.run_id) -> AbstractAsyncContextManager[Terminal]:
        settings = environment(server.address) | {"EDITOR": editor(tmp_path, change)}
        return at_terminal([RUNLANE, "queue", "edit", run_id], settings)

    async with edited("assert text == 1_000 * 'x'; text += 'y\\n'") as terminal:
        assert await terminal.wait() == 0, terminal.screen
    assert (await fields(server, "show", waiting.run_id, "--prompt")) == [[1_000 * "x" + "y"]]
    async with edited("") as terminal:
        assert await terminal.wait() == 0
        assert "not changed" in terminal.screen
    theirs = f"subprocess.run([{RUNLANE!r}, 'queue', 'edit', '--prompt', 'b', {waiting.run_id!r}])"
    async with edited(f"{theirs}; text = 'mine'") as terminal:
        assert await terminal.wait() == 1
        assert "is at revision 2" in terminal.screen
        (kept,) = re.findall(r"kept in (\S+)", terminal.screen)
    assert taken(Path(kept)) == "mine"
    assert (await wire.client.get_prompt(waiting.run_id)).text == "b"
    async with edited("text = 'late'", active.run_id) as terminal:
        assert await terminal.wait() == 1
        assert "has left the queue; it is active" in terminal.screen
    piped = await command(server, "queue", "edit", "--prompt", "-", waiting.run_id, stdin="piped")
    assert piped == (0, f"{waiting.run_id}\n", "")
    assert (await wire.client.get_prompt(waiting.run_id)).text == "piped"


async def test_an_error_is_one_line(server: ServerProcess) -> None:
    cases = [
        (("messages", "none"), 1, "there is no session 'none'"),
        (("cancel", "none"), 1, "there is no session 'none'"),
        (("cancel", "--run", "none"), 1, "there is no run 'none'"),
        (("wait", "none"), 1, "there is no run 'none'"),
        (("run", "-s", "a\nb", "x"), 2, "session_id: contains a control character"),
        (("watch", "--cursor", "x"), 2, "cursor: was not issued by this service for this store"),
    ]
    results = await asyncio.gather(*(command(server, *arguments) for arguments, _, _ in cases))
    assert results == [(code, "", f"Error: {why}\n") for _, code, why in cases]
    await server.kill()
    for code, out, err in await asyncio.gather(
        command(server, "sessions"), command(server, "run", "x")
    ):
        assert (code, out) == (1, "")
        assert err.startswith(f"Error: cannot reach {server.address}: ")
        assert err.count("\n") == 1
