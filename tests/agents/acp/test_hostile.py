"""Programs that do not keep to the protocol: each costs its own run at most."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from runlane_server.agents.acp import connection, opening
from runlane_server.agents.acp.connection import MAX_LINE, MAX_NOISE
from runlane_server.agents.base import Report
from runlane_server.core.model import FinishReason, TextDelta, ToolCall
from support.acp import agent, at_work, events, failure
from support.processes import is_running, resident_bytes, wait_for_exit
from support.turns import ask, texts

DONE = Report(finish_reason=FinishReason.STOP)


# --- What it writes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "Debugger listening on port 9229",
        "",
        "[]",
        "7",
        "null",
        '{"jsonrpc": "2.0"}',
        '{"id": 99, "result": {"stopReason": "end_turn"}}',
        '{"id": true, "result": {"stopReason": "end_turn"}}',
        '{"id": 1, "result": {"stopReason": "end_turn"}}',
        '{"id": null, "error": {"code": -32700, "message": "Parse error"}}',
        '{"id": [1], "method": "session/request_permission"}',
        '{"id": 1.5, "method": "fs/read_text_file"}',
        '{"method": 7}',
        '{"method": "session/update"}',
        '{"method": "session/update", "params": []}',
        '{"method": "session/update", "params": {"sessionId": "session-1", "update": {}}}',
        '{"method": "session/update", "params": {"sessionId": "session-1", "update": '
        '{"sessionUpdate": "news", "x": 1}}}',
        '{"method": "session/update", "params": {"sessionId": "session-1", "update": '
        '{"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": 7}}}}',
        '{"method": "session/update", "params": {"sessionId": "another", "update": '
        '{"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": "x"}}}}',
        '{"method": "session/update", "params": {"sessionId": "session-1", "update": '
        '{"sessionUpdate": "tool_call", "toolCallId": 7}}}',
        '{"method": "_vendor/news", "params": {"a": 1}}',
        "[" * 100_000,
        '{"a": ' * 20_000,
        '{"id": ' + "9" * 5000 + "}",
        "\\xff\\x00\\xfe",
    ],
    ids=range(25),
)
async def test_a_line_that_is_no_message_for_us_is_ignored(line: str) -> None:
    code = f"""
p = prompt()
say("one")
sys.stdout.flush()
os.write(1, {line!r}.encode("latin-1") + b"\\n")
say("two")
done(p)
"""
    assert await events(agent(code)) == [TextDelta("one"), TextDelta("two"), DONE]


async def test_a_program_that_is_no_acp_agent_fails_the_run() -> None:
    code = "while True: os.write(1, b'y\\n' * 10000)"
    assert "no messages of the protocol" in await failure(agent(code), "ACP_PROTOCOL")


async def test_an_endless_line_fails_the_run_and_is_not_collected() -> None:
    code = "p = prompt()\nwhile True: os.write(1, b'x' * 65536)"
    assert "a line of more than 4 MiB" in await failure(agent(code), "ACP_PROTOCOL")


async def test_a_message_just_below_the_limit_arrives() -> None:
    size = MAX_LINE - 1000
    code = f"p = prompt(); say('x' * {size}); done(p)"
    assert [len(text) for text in texts(await events(agent(code)))] == [size]


async def test_noise_just_below_the_limit_is_ignored() -> None:
    count = MAX_NOISE // 1024 - 1
    code = f"p = prompt()\nfor _ in range({count}): os.write(1, b'x' * 1023 + b'\\n')\ndone(p)"
    assert await events(agent(code)) == [DONE]


async def test_much_on_stderr_does_not_hold_the_agent() -> None:
    code = "p = prompt(); sys.stderr.write('e' * (4 << 20)); sys.stderr.flush(); done(p)"
    assert await events(agent(code)) == [DONE]


async def test_a_flood_of_ignored_messages_lets_others_use_the_event_loop(tmp_path: Path) -> None:
    written = tmp_path / "written"
    code = f"""
import fcntl
fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)
p = prompt()
say("go")
params = {{"sessionId": "another", "update": {{}}}}
line = json.dumps({{"method": "session/update", "params": params}}).encode() + b"\\n"
os.write(1, line * (900_000 // len(line)))
say("end")
open({str(written)!r}, "w").close()
done(p)
"""
    running = agent(code)
    generator = running.run(ask(""))
    assert await anext(generator) == TextDelta("go")
    while not written.exists():
        await asyncio.sleep(0)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    assert await anext(generator) == TextDelta("end")
    counting.cancel()
    # The whole flood was there to be read, some 9000 lines in 14 reads.
    assert turns > 100
    await generator.aclose()
    await running.close()


async def test_an_agent_that_asks_and_never_reads_fails_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "MAX_UNREAD", 1 << 16)
    code = """
p = prompt()
while True: write(id="x" * 1000, method="terminal/create", params={})
"""
    assert "does not read the answers" in await failure(agent(code), "ACP_PROTOCOL")


async def test_replies_behind_a_large_unread_prompt_take_little_time(tmp_path: Path) -> None:
    written = tmp_path / "written"
    code = f"""
import fcntl
fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)
answer(read(), protocolVersion=1)
answer(read(), sessionId=SESSION)
say("go")
for n in range(300): write(id=n, method="terminal/create", params={{}})
say("end")
open({str(written)!r}, "w").close()
p = prompt()
done(p)
"""
    running = agent(code)
    generator = running.run(ask("x" * (12 << 20)))
    assert await anext(generator) == TextDelta("go")
    while not written.exists():
        await asyncio.sleep(0)
    before = time.thread_time()
    assert await anext(generator) == TextDelta("end")
    assert time.thread_time() - before < 0.1
    assert [one async for one in generator] == [DONE]
    await running.close()


async def test_a_refusal_repeats_the_beginning_of_the_method() -> None:
    code = """
p = prompt()
write(id="q", method="m" * 100_000, params={})
say(read()["error"]["message"])
done(p)
"""
    assert texts(await events(agent(code))) == ["m" * 100 + " is not available"]


async def test_a_request_whose_id_is_long_is_not_answered() -> None:
    code = """
p = prompt()
for size in (1025, 1024): write(id="i" * size, method="terminal/create", params={})
say(str(len(read()["id"])))
done(p)
"""
    assert texts(await events(agent(code))) == ["1024"]


@pytest.mark.parametrize("part", ["[],", '{"a":1},'])
async def test_a_message_of_too_many_parts_fails_the_run_before_it_is_parsed(part: str) -> None:
    code = f"""
p = prompt()
sys.stdout.write('{{"method": "x", "params": {{"a": [' + {part!r} * 200_000 + '1]}}}}\\n')
sys.stdout.flush()
read()
"""
    assert "more than 200000 objects and lists" in await failure(agent(code), "ACP_PROTOCOL")


async def test_too_many_unfinished_tool_calls_fail_the_run() -> None:
    code = """
p = prompt()
for n in range(1001): update("tool_call", toolCallId=str(n), title="t", status="in_progress")
read()
"""
    assert "1000 unfinished tool calls" in await failure(agent(code), "ACP_PROTOCOL")


async def test_odd_fields_of_a_tool_call_do_not_fail_the_run() -> None:
    code = """
p = prompt()
update("tool_call", toolCallId="c", title="t", kind="dance", status="dancing", rawInput=[1],
       content=[{"type": "hologram"}, {"type": "content", "content": text("kept")}])
update("tool_call_update", toolCallId="unknown", status="completed")
update("tool_call_update", toolCallId="c", status="completed")
done(p)
"""
    found = await events(agent(code))
    call = found[2]
    assert isinstance(call, ToolCall)
    assert call.name == "other"
    assert json.loads(call.arguments_json) == {"title": "t", "input": [1]}
    assert "kept" in repr(found[3])


async def test_a_question_that_is_invalid_gets_an_error() -> None:
    code = """
p = prompt()
write(id="q", method="session/request_permission", params={"options": 7})
say(str(read()["error"]["code"]))
done(p)
"""
    assert texts(await events(agent(code))) == ["-32602"]


# --- What it answers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "part"),
    [
        (["{}"], "initialize is invalid: protocolVersion"),
        (['{"protocolVersion": "one"}'], "initialize is invalid: protocolVersion"),
        (['{"protocolVersion": 1}', "{}"], "session/new is invalid: sessionId"),
        (['{"protocolVersion": 1}', "[]"], "session/new is invalid: sessionId"),
        (['{"protocolVersion": 1}', '{"sessionId": "s"}', "{}"], "session/prompt is invalid"),
        (
            ['{"protocolVersion": 1}', '{"sessionId": "s"}', '{"stopReason": "bored"}'],
            "session/prompt is invalid: stopReason",
        ),
    ],
)
async def test_an_invalid_answer_fails_the_run_and_names_the_field(
    answers: Sequence[str], part: str
) -> None:
    code = f"for one in {answers!r}: write(id=read()['id'], result=json.loads(one))\nread()"
    assert part in await failure(agent(code), "ACP_PROTOCOL")


@pytest.mark.parametrize("error", ["null", "7", "{}", '{"code": "x", "message": 7, "data": []}'])
async def test_an_odd_error_is_an_error(error: str) -> None:
    code = f"write(id=read()['id'], error=json.loads({error!r})); read()"
    assert "no message" in await failure(agent(code), "ACP_ERROR")


@pytest.mark.parametrize("method", ["initialize", "session/new"])
async def test_an_agent_that_never_gets_ready_fails_the_run(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "READY_TIMEOUT", 0.3)
    code = {"initialize": "", "session/new": "answer(read(), protocolVersion=1); "}
    message = await failure(agent(code[method] + "read(); read()", grace=0.2), "ACP_TIMEOUT")
    assert message == f"the agent did not answer {method} within 0.3 s"


async def test_an_answer_after_the_cancel_is_not_output() -> None:
    code = """
p = prompt()
say("before\\n")
read()
for _ in range(1000): say("after")
done(p)
"""
    async with at_work(agent(code)) as working:
        await working.said("\n")
        await working.cancel()
    assert working.text == "before\n"


# --- How it ends -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit(3)", "the command exited with code 3"),
        ("sys.stderr.write('no key'); sys.exit(1)", "the command exited with code 1: no key"),
        ("sys.exit(0)", "the agent exited before it answered"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "the command was ended by SIGKILL"),
    ],
)
@pytest.mark.parametrize("when", ["", "p = prompt(); say('x'); "])
async def test_an_agent_that_exits_in_mid_turn_fails_the_run(
    when: str, code: str, message: str
) -> None:
    assert await failure(agent(when + code), "COMMAND_FAILED") == message


async def test_an_agent_that_closes_its_output_and_stays_is_ended() -> None:
    code = "prompt(); os.close(1); time.sleep(600)"
    message = await failure(agent(code, grace=0.2), "COMMAND_FAILED")
    assert message == "the agent closed its output before it answered"


async def test_an_agent_that_stays_after_its_answer_is_ended_with_its_shells() -> None:
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
p = prompt()
child = os.fork()
if not child:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True: time.sleep(60)
say("%d %d" % (os.getpid(), child))
done(p)
while True: time.sleep(60)
"""
    (text,) = texts(await events(agent(code, grace=0.2)))
    for pid in map(int, text.split()):
        await wait_for_exit(pid)
        assert not is_running(pid)


async def test_an_agent_that_writes_faster_than_it_is_read_waits() -> None:
    code = """
p = prompt()
say("%d\\n" % os.getpid())
while True: say("x" * 1000)
"""
    running = agent(code, grace=0.4)
    generator = running.run(ask(""))
    first = await anext(generator)
    assert isinstance(first, TextDelta)
    before = resident_bytes(int(first.text))
    own = resident_bytes(os.getpid())
    for _ in range(2000):
        await anext(generator)
    assert resident_bytes(int(first.text)) - before < 8 << 20
    assert resident_bytes(os.getpid()) - own < 32 << 20
    await generator.aclose()
    await running.close()
