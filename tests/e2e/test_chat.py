"""`runlane chat` on a terminal, against a real server."""

from __future__ import annotations

import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from e2e.test_command_line import command, on_terminal
from runlane import Approval, Client, RunState
from support.server import ServerProcess
from support.staging import at_latch, say, script
from support.terminal import Terminal

ESC, CTRL_D = b"\x1b", b"\x04"

ASK: dict[str, Any] = {
    "text": "Deploy?\u202e \u200b\x1b]0;pwned\x07",
    "tool_name": "deploy",
    "arguments": {"target": "prod", "note": "n" * 300},
}

HOSTILE = "\x1b]0;pwned\x07\u202eabc\u200b\x9b31m"


@asynccontextmanager
async def chatting(server: ServerProcess, *arguments: str) -> AsyncIterator[Terminal]:
    """A chat with session s, once it shows the session."""
    async with on_terminal(server, "chat", *arguments, "s") as screen:
        await screen.shows("Ctrl-D leaves")
        await screen.shows("a new session")
        yield screen


async def leave(screen: Terminal) -> None:
    screen.type(CTRL_D)
    assert await screen.wait() == 0


def typed(steps: str) -> bytes:
    return f"{steps}\r".encode()


async def test_prompts_wait_while_one_streams_and_esc_cancels_the_active_run(
    server: ServerProcess, client: Client
) -> None:
    async with chatting(server) as screen:
        screen.type(typed(script(say("streaming "), *at_latch("one"))))
        await screen.shows("streaming <one>")
        screen.type(typed(script(say("the second answer"))))
        await screen.shows("queued: [{")
        screen.type(b"typed while it streams")
        await screen.shows("typed while it streams")
        screen.type(ESC)
        await screen.shows("which was active; fence 2")
        await screen.shows("the second answer")
        latest = (await client.list_runs("s").page()).items[0]
        await client.wait_run(latest.run_id)
        runs = [run async for run in client.list_runs("s")]
        assert [run.state for run in runs] == [RunState.COMPLETED, RunState.CANCELLED]
        await screen.shows("cancelled: cancelled in a chat")
        screen.type(b"\x03")  # empties the input, and does not leave
        screen.type(ESC)
        await screen.shows("no run is active")
        await leave(screen)


async def test_questions_are_shown_whole_and_answered_by_a_line(
    server: ServerProcess, client: Client
) -> None:
    async with chatting(server) as screen:
        screen.type(typed(script({"ask": ASK})))
        await screen.shows("y and Enter approves")
        shown = screen.screen.replace("\r", "").replace("\n", "")
        assert "Deploy?\\u202e \\u200b\\x1b]0;pwned\\x07" in shown
        assert shown.count("n" * 300) == 2  # in the prompt, and in the question
        screen.type(b"yes\r")
        await screen.shows("answered")
        (asked,) = [one async for one in client.list_input_requests(session_id="s")]
        assert asked.answer is not None
        assert asked.answer.value == Approval(approved=True)
        assert len([run async for run in client.list_runs("s")]) == 1  # "yes" is no prompt as well
        screen.type(typed(script({"ask": {"text": "Which?", "choices": ["red", "green"]}})))
        await screen.shows("2. green")
        screen.type(b"7\r")
        await screen.shows("that is not one of the choices")
        screen.type(b"2\r")
        latest = (await client.list_runs("s").page()).items[0]
        await client.wait_run(latest.run_id)
        asked, _ = [one async for one in client.list_input_requests(session_id="s")]
        assert asked.answer is not None
        assert asked.answer.value == "green"
        await leave(screen)


async def test_prompt_that_begins_with_y_approves_nothing(
    server: ServerProcess, client: Client
) -> None:
    async with chatting(server) as screen:
        screen.type(typed(script({"ask": ASK})))
        await screen.shows("y and Enter approves")
        screen.type(b"you may wait\r")
        await screen.shows("queued: you may wait")
        (asked,) = [one async for one in client.list_input_requests(session_id="s")]
        assert asked.answer is None
        await leave(screen)
        assert "continues: runlane follow s" in screen.screen


async def test_cancel_and_answer_that_fail_say_so(server: ServerProcess) -> None:
    async with chatting(server) as screen:
        screen.type(typed(script({"ask": ASK})))
        await screen.shows("y and Enter approves")
        await server.kill()
        await screen.shows("reconnecting: ")
        screen.type(b"y\r")
        await screen.shows("not answered: ")
        screen.type(ESC)
        await screen.shows("not cancelled: ")
        await leave(screen)


async def test_chat_survives_a_restart_of_the_server(server: ServerProcess) -> None:
    async with chatting(server) as screen:
        screen.type(typed(script(say("before the restart"))))
        await screen.shows("before the restart")
        await server.stop()
        await screen.shows("reconnecting: ")
        screen.type(typed(script(say("while it was away"))))
        await screen.shows("sending: [{")
        await server.start()
        await screen.shows("connected again")
        await screen.shows("while it was away")
        await leave(screen)


async def test_prompt_for_a_draining_server_waits_and_the_stream_is_not_called_lost(
    server: ServerProcess, client: Client
) -> None:
    async with chatting(server) as screen:
        screen.type(typed(script(say("streaming "), *at_latch("one"))))
        await screen.shows("streaming <one>")
        server.send(signal.SIGTERM)
        await server.logs('"draining"')
        screen.type(typed("later"))
        await screen.shows("not sent yet: the server is shutting down")
        assert "reconnecting" not in screen.screen
        screen.type(ESC)
        await screen.shows("which was active")
        await server.wait()
        await leave(screen)


async def test_others_are_shown_and_cannot_steer_the_terminal(
    server: ServerProcess, client: Client
) -> None:
    async with chatting(server) as screen:
        await client.run_accepted("s", script(say(HOSTILE), say("\nthe end")), allow_missing=True)
        await screen.shows("the end")
        await client.update_session("s", title=f"{HOSTILE} title")
        await screen.shows("title: ")
        await leave(screen)
        for unsafe in ("\x1b]0;pwned", "\u202e", "\u200b", "\x9b"):
            assert unsafe not in screen.screen


async def test_prompts_of_others_are_shown_also_of_runs_that_end_at_once(
    server: ServerProcess, client: Client
) -> None:
    async with chatting(server) as screen:
        for n in range(8):
            await (await client.run_accepted("s", f"short {n}", allow_missing=True)).completed()
        await screen.shows("> short 7")
        await leave(screen)
        assert "(run " not in screen.screen
        assert all(f"> short {n}" in screen.screen for n in range(8))


async def test_chat_is_for_people(server: ServerProcess) -> None:
    code, out, err = await command(server, "chat", "s", "--json")
    assert (code, out) == (2, "")
    assert "use `runlane follow SESSION --json`" in err
    code, out, err = await command(server, "chat", "s")
    assert (code, out) == (2, "")
    assert "a chat needs a terminal" in err


async def test_the_latest_turns_of_a_session_are_shown_first_and_once(
    server: ServerProcess, client: Client
) -> None:
    for name in ("alpha", "beta", "gamma"):
        handle = await client.run_accepted("s", script(say(f"<{name}>")), allow_missing=True)
        await handle.completed()
    long = "\n".join(f"line {n}" for n in range(100)) + "y" * 3_000
    await (await client.run_accepted("s", script(say(long)))).completed()
    steps = [say("begun "), *at_latch("open")]
    active = await client.run_accepted("s", script(*steps))
    async with on_terminal(server, "chat", "--turns", "4", "s") as screen:
        await screen.shows("begun <open>")
        shown = screen.screen
        assert "1 earlier turn: runlane messages s" in shown
        assert "<alpha>" not in shown
        assert shown.index("<beta>") < shown.index("<gamma>") < shown.index("begun <open>")
        answered = re.findall(r"(?<!n)line (\d+)", shown)  # in the prompt it follows a \\n
        assert "39" in answered
        assert "y" * 3_000 not in shown.replace("\r", "").replace("\n", "")
        assert "60 more lines" in shown
        assert "40" not in answered
        await client.cancel("s", run_id=active.run_id)
        await screen.shows("cancelled")
        screen.type(typed(script(say("<delta>"))))
        await screen.shows("<delta>")
        await leave(screen)
        assert screen.screen.count("<gamma>") == 2  # prompt and answer


async def test_a_prompt_of_this_chat_is_shown_whole_when_its_run_starts(
    server: ServerProcess, client: Client
) -> None:
    async with chatting(server) as screen:
        screen.type(typed(script(*at_latch("one"))))
        await screen.shows("<one>")
        screen.type(typed(script(say("x" * 300))))
        await screen.shows("queued: [{")
        screen.type(ESC)
        await screen.shows("which was active")
        latest = (await client.list_runs("s").page()).items[0]
        await client.wait_run(latest.run_id)
        await leave(screen)
        shown = screen.screen.replace("\r", "").replace("\n", "")
        assert shown.count("x" * 300) == 2  # prompt and answer


async def test_r46_up_edits_the_prompt_that_was_queued_last(
    server: ServerProcess, client: Client
) -> None:
    up = b"\x1b[A"
    async with chatting(server) as screen:
        screen.type(typed(script(*at_latch("one"))))
        await screen.shows("<one>")
        screen.type(b"first\r")
        await screen.shows("queued: first")
        screen.type(("w" * 300).encode() + b"\r")
        await screen.shows("queued: w")
        screen.type(up)
        await screen.shows("a queued prompt:")
        screen.type(b" more\r")
        await screen.shows("changed the queued prompt")
        latest = (await client.list_runs("s").page()).items[0]
        prompt = await client.get_prompt(latest.run_id)
        assert (prompt.text, prompt.run.revision) == ("w" * 300 + " more", 1)
        await client.update_run(latest.run_id, prompt="theirs")
        screen.type(up)
        await screen.shows("a queued prompt:", times=2)
        await client.update_run(latest.run_id, prompt="again")
        screen.type(b" mine\r")
        await screen.shows("not changed: ")
        await screen.shows("theirs mine")
        screen.type(b"\x03")
        await leave(screen)
        assert (await client.get_prompt(latest.run_id)).text == "again"
