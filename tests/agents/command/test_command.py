"""The command agent, with real programs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from pathlib import Path

import pytest

from runlane_server.agents.base import AgentError
from runlane_server.agents.command.agent import CommandAgent
from runlane_server.core.errors import StartError
from runlane_server.core.model import Attachment, Prompt, Role, ToolCall, ToolResult
from support.processes import is_running, wait_for_exit
from support.programs import GRACE, answer, at_work, failure, python, shell
from support.turns import LocalTurn, ask, message, texts


def open_files() -> list[Path]:
    """The open file descriptors of this process."""
    return sorted(Path("/proc/self/fd").iterdir())


# --- Input -------------------------------------------------------------------------------


async def test_stdin_has_the_prompt_and_its_text_attachments() -> None:
    attachments = (Attachment("a", "text/plain", "ä"), Attachment("b", "image/png", b"\xff"))
    assert await answer(shell("cat"), ask("ask", *attachments)) == "ask\n\nä"
    assert await answer(shell("cat"), ask("", *attachments)) == "ä"


async def test_the_environment_identifies_the_run() -> None:
    turn = LocalTurn(session_id="s9", run_id="r9", attempt=3)
    code = 'echo "$RUNLANE_SESSION_ID $RUNLANE_RUN_ID $RUNLANE_ATTEMPT"; test -n "$PATH"'
    assert await answer(shell(code), turn) == "s9 r9 3\n"


async def test_with_json_stdin_has_the_whole_turn() -> None:
    turn = LocalTurn(
        Prompt("é", (Attachment("t", "text/plain", "x"), Attachment("b", "a/b", b"\x00\xff"))),
        messages=[
            message(1, Role.USER, "hi", Attachment("p", "image/png", b"\x01")),
            message(1, Role.ASSISTANT, "so", ToolCall("c", "look", "{}")),
            message(1, Role.TOOL, ToolResult("c", "look", "seen", is_error=True)),
        ],
        metadata={"k": "v"},
    )
    code = "import json, sys; print(json.dumps(json.load(sys.stdin)))"
    turn_in = json.loads(await answer(python(code, as_json=True), turn))
    assert {key: turn_in[key] for key in ("session_id", "run_id", "attempt", "prompt")} == {
        "session_id": "s1",
        "run_id": "r1",
        "attempt": 1,
        "prompt": "é",
    }
    assert turn_in["metadata"] == {"k": "v"}
    text, data = turn_in["attachments"]
    assert text == {"name": "t", "mime_type": "text/plain", "text": "x"}
    assert base64.b64decode(data["data"]) == b"\x00\xff"
    assert [m["role"] for m in turn_in["history"]] == ["user", "assistant", "tool"]
    assert [[p["type"] for p in m["parts"]] for m in turn_in["history"]] == [
        ["text", "attachment"],
        ["text", "tool_call"],
        ["tool_result"],
    ]
    assert turn_in["history"][2]["parts"][0]["is_error"] is True


@pytest.mark.parametrize("code", ["print('hi')", "import os; os.close(0); print('hi')"])
async def test_a_program_may_leave_a_large_prompt_unread(
    code: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert await answer(python(code), ask("x" * (1 << 20))) == "hi\n"
    assert not caplog.records  # an error in a callback of the loop is only logged


async def test_a_program_may_close_its_input_early(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    async with at_work(shell(f"exec <&-; echo one; cat {fifo}"), "x" * (1 << 20)) as working:
        await working.said("one\n")
        fifo.write_text("two\n")
        await working.task
    assert working.text == "one\ntwo\n"
    assert not caplog.records


async def test_output_is_read_while_a_large_prompt_is_still_written() -> None:
    prompt = "0123456789abcdef" * (1 << 16)
    assert await answer(shell("cat"), ask(prompt)) == prompt


# --- Output -----------------------------------------------------------------------------


async def test_output_streams_before_the_program_ends(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    async with at_work(shell(f"echo one; cat {fifo}; echo three")) as working:
        await working.said("one\n")
        assert not working.task.done()
        fifo.write_text("two\n")
        await working.said("three\n")
        await working.task
        assert working.text == "one\ntwo\nthree\n"


async def test_a_character_split_between_two_writes_is_joined(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    code = rf"printf 'a\303'; cat {fifo}; printf '\251b'"
    async with at_work(shell(code)) as working:
        await working.said("a")
        fifo.write_text("")
        await working.task
        assert working.text == "aéb"
        assert len(working.events) == 2


async def test_bad_utf8_is_replaced() -> None:
    assert await answer(shell(r"printf 'a\377b\303'")) == "a\ufffdb\ufffd"


async def test_a_slow_consumer_blocks_the_program(tmp_path: Path) -> None:
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    # Writes until the pipe stays full, reports how much that was, and continues.
    code = (
        "import os, select\n"
        "os.set_blocking(1, False)\n"
        "written, reported = 0, False\n"
        "while written < 1 << 24:\n"
        "    if not reported and not select.select([], [1], [], 0.3)[1]:\n"
        f"        open({str(fifo)!r}, 'w').write(str(written)); reported = True\n"
        "        os.set_blocking(1, True)\n"
        "    written += os.write(1, b'x' * 65536)\n"
    )
    agent = python(code)
    async with contextlib.aclosing(agent.run(ask(""))) as events:
        deltas = texts([await anext(events)])
        held = int(await asyncio.to_thread(fifo.read_text))
        assert held < 1 << 20
        deltas += texts([event async for event in events])
    await agent.close()
    assert sum(map(len, deltas)) == 1 << 24


# --- Exit --------------------------------------------------------------------------------


async def test_a_nonzero_exit_fails_the_run_with_the_end_of_stderr() -> None:
    message = await failure(python("import sys; sys.exit('x' * 5000 + 'the end')"))
    assert message.startswith("the command exited with code 1: xxx")
    assert message.endswith("xthe end")
    assert 2000 < len(message) < 2100


async def test_an_error_has_no_terminal_codes() -> None:
    code = r"printf '\033]0;tool\007=====\n\033[31mno key\033[0m\000\377\n' >&2; exit 1"
    assert await failure(shell(code)) == "the command exited with code 1: no key\ufffd"
    assert await failure(shell(r"printf '\033[0m' >&2; exit 1")) == "the command exited with code 1"


async def test_an_endless_line_with_nul_and_bad_utf8_streams_unchanged() -> None:
    text = await answer(shell(r"yes 'a\x' | tr -d '\n' | tr '\\x' '\000\377' | head -c 3000000"))
    assert text == "a\0\ufffd" * 1_000_000


async def test_death_by_a_signal_fails_the_run() -> None:
    assert await failure(shell("kill -ABRT $$")) == "the command was ended by SIGABRT"


async def test_much_output_on_stderr_does_not_block_the_program() -> None:
    code = "import sys; sys.stderr.write('x' * (1 << 20)); print('done')"
    assert await answer(python(code)) == "done\n"


async def test_output_before_a_failure_is_kept() -> None:
    agent = shell("echo before; exit 3")
    async with at_work(agent) as working:
        await asyncio.wait({working.task})
        assert working.text == "before\n"
        assert isinstance(working.task.exception(), AgentError)


async def test_the_turn_lasts_until_the_exit_even_after_stdout_is_closed(tmp_path: Path) -> None:
    done = tmp_path / "done"
    assert await answer(shell(f"echo hi; exec >&-; : > {done}")) == "hi\n"
    assert done.exists()


async def test_background_processes_end_with_the_turn() -> None:
    # The child holds the output open and would do so for an hour.
    text = await answer(shell("sleep 3600 & echo $!"))
    await wait_for_exit(int(text))


# --- Cancel -------------------------------------------------------------------------------------


async def test_a_cancel_sends_sigterm_and_waits_for_the_end(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    # It writes more than a pipe holds while it cleans up, and must not block on that.
    code = (
        "import os, signal, sys, pathlib, time\n"
        "def end(*_):\n"
        "    sys.stdout.write('x' * (1 << 20)); sys.stdout.flush()\n"
        f"    pathlib.Path({str(seen)!r}).write_text('SIGTERM')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "os.write(1, b'ready')\n"  # unlike print, holds no lock when the signal arrives
        "while True: time.sleep(3600)\n"
    )
    async with at_work(python(code)) as working:
        await working.said("ready")
        await working.cancel()
        assert seen.read_text() == "SIGTERM"


async def test_a_program_that_ignores_sigterm_is_killed() -> None:
    agent = shell("trap '' TERM; echo $$; while :; do sleep 1; done", grace=0.1)
    async with at_work(agent) as working:
        await working.said("\n")
        await working.cancel()
        assert not is_running(int(working.text))


async def test_a_second_cancel_kills_at_once() -> None:
    async with at_work(shell("trap '' TERM; echo $$; while :; do sleep 1; done")) as working:
        await working.said("\n")
        working.task.cancel()
        await asyncio.sleep(0)
        await working.cancel()
        await wait_for_exit(int(working.text))


async def test_grandchildren_end_with_a_cancel() -> None:
    async with at_work(shell("sh -c 'echo $$; exec sleep 3600'; echo not reached")) as working:
        await working.said("\n")
        await working.cancel()
        assert "not reached" not in working.text
        await wait_for_exit(int(working.text))


async def test_a_grandchild_that_ignores_sigterm_ends_with_the_program() -> None:
    code = "(trap '' TERM; sh -c 'echo $PPID'; while :; do sleep 1; done) & wait"
    async with at_work(shell(code)) as working:
        await working.said("\n")
        await working.cancel()
        await wait_for_exit(int(working.text))


async def test_a_cancel_before_the_first_step_starts_nothing(tmp_path: Path) -> None:
    started = tmp_path / "started"
    async with at_work(shell(f": > {started}")) as working:
        await working.cancel()
    assert not started.exists()


async def test_a_turn_leaves_no_file_open() -> None:
    async def once() -> None:
        async with at_work(shell("echo ready; cat; sleep 3600"), "x" * (1 << 20)) as working:
            await working.said("ready")
            await working.cancel()
        assert await answer(shell("cat"), ask("hi")) == "hi"

    await once()
    before = open_files()
    await once()
    assert open_files() == before


# --- Start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["/no/such/program"], ["no-such-program-either"]])
def test_a_missing_program_fails_the_start(argv: list[str]) -> None:
    with pytest.raises(StartError, match="program"):
        CommandAgent(argv, kill_grace=GRACE)


async def test_a_program_that_cannot_be_started_fails_the_run(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF and nothing else")
    program.chmod(0o755)
    agent = CommandAgent([str(program)], kill_grace=GRACE)
    message = await failure(agent)
    assert message == f"cannot start {program}: Exec format error"
