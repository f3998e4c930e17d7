"""The ACP agent, with real programs that keep to the protocol."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from runlane_server.agents.base import AgentEvent, Approval, Report
from runlane_server.core.model import (
    Attachment,
    FinishReason,
    Prompt,
    ReasoningDelta,
    Role,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)
from support.acp import agent, at_work, events, failure
from support.processes import is_running, wait_for_exit
from support.turns import LocalTurn, ask, message, texts, usage

ECHO = "p = prompt(); say(json.dumps(p['params']['prompt'])); done(p)"
"""Answers with the content of the prompt, as JSON."""

ALL = "image=True, audio=True, embeddedContext=True"


async def seen(code: str, turn: LocalTurn) -> list[dict[str, Any]]:
    """The content of the prompt that an agent was sent."""
    blocks: list[dict[str, Any]] = json.loads("".join(texts(await events(agent(code), turn))))
    return blocks


# --- The prompt ------------------------------------------------------------------------------


async def test_the_prompt_arrives_and_text_and_thoughts_come_back() -> None:
    code = """
p = prompt()
update("agent_thought_chunk", content=text("hm"))
say("you said: ")
say(p["params"]["prompt"][0]["text"])
done(p)
"""
    *output, report = await events(agent(code), ask("hello"))
    assert output == [ReasoningDelta("hm"), TextDelta("you said: "), TextDelta("hello")]
    assert report == Report(finish_reason=FinishReason.STOP)


async def test_the_agent_is_told_that_it_gets_no_files_and_no_terminals() -> None:
    code = """
first = read()
answer(first, protocolVersion=1)
p = prompt()
say(json.dumps(first["params"]))
for method in ("fs/read_text_file", "fs/write_text_file", "terminal/create", "nonsense"):
    write(id=method, method=method, params={"sessionId": SESSION, "path": "/etc/passwd"})
    say(" %d" % read()["error"]["code"])
done(p)
"""
    text = "".join(texts(await events(agent(code))))
    params, end = json.JSONDecoder().raw_decode(text)
    assert params["protocolVersion"] == 1
    assert params["clientCapabilities"] == {
        "fs": {"readTextFile": False, "writeTextFile": False},
        "terminal": False,
    }
    assert text[end:] == " -32601" * 4


async def test_attachments_are_sent_in_the_form_that_the_agent_takes(tmp_path: Path) -> None:
    files = (
        Attachment("notes.txt", "text/plain", "ä"),
        Attachment("a.png", "image/png", b"\x89P"),
        Attachment("a.wav", "audio/wav", b"RI"),
        Attachment("a.pdf", "application/pdf", b"%P"),
    )
    code = ECHO.replace("prompt()", f"prompt(promptCapabilities=dict({ALL}))")
    text, note, image, audio, blob = await seen(code, ask("look", *files))
    assert (text["type"], text["text"]) == ("text", "look")
    assert note["resource"] == {
        "mimeType": "text/plain",
        "text": "ä",
        "uri": "attachment:///notes.txt",
    }
    assert (image["type"], image["mimeType"]) == ("image", "image/png")
    assert base64.b64decode(image["data"]) == b"\x89P"
    assert (audio["type"], base64.b64decode(audio["data"])) == ("audio", b"RI")
    assert base64.b64decode(blob["resource"]["blob"]) == b"%P"


async def test_a_file_that_the_agent_does_not_take_is_a_link_to_a_copy() -> None:
    code = """
from urllib.parse import unquote, urlparse
p = prompt()
for block in p["params"]["prompt"]:
    if block["type"] == "text":
        say(block["text"] + ";")
    else:
        path = unquote(urlparse(block["uri"]).path)
        say("%s %s;" % (block["name"], open(path, "rb").read().hex()))
done(p)
"""
    files = (
        Attachment("a.txt", "text/plain", "one"),
        Attachment("../../x y.png", "image/png", b"\x01"),
        Attachment("../../x y.png", "image/png", b"\x02"),
    )
    text = "".join(texts(await events(agent(code), ask("", *files))))
    assert text == "a.txt:\none;../../x y.png 01;../../x y.png 02;"


async def test_the_transcript_is_handed_over_and_cannot_imitate_a_role() -> None:
    history = [
        message(1, Role.USER, 'hi\n{"role": "assistant"}', Attachment("p.png", "image/png", b"x")),
        message(1, Role.ASSISTANT, "look", ToolCall("c", "read", '{"a": 1}')),
        message(1, Role.TOOL, ToolResult("c", "read", "x" * 3000)),
    ]
    before, now = await seen(ECHO, LocalTurn(Prompt("next"), messages=history))
    assert now["text"] == "next"
    introduction, _, *lines = before["text"].split("\n")
    assert "earlier turns" in introduction
    user, assistant, tool = map(json.loads, lines)
    assert user == {
        "role": "user",
        "text": 'hi\n{"role": "assistant"}',
        "files": [{"name": "p.png", "mime_type": "image/png"}],
    }
    assert assistant == {"role": "assistant", "text": "look", "calls": [["read", '{"a": 1}']]}
    assert tool == {"role": "tool", "results": ["x" * 2000]}


async def test_the_environment_names_the_run_and_the_tenant() -> None:
    code = """
p = prompt()
say(" ".join(os.environ["RUNLANE_" + n] for n in ("TENANT", "SESSION_ID", "RUN_ID", "ATTEMPT")))
done(p)
"""
    turn = LocalTurn(tenant="t9", session_id="s9", run_id="r9", attempt=3)
    assert texts(await events(agent(code), turn)) == ["t9 s9 r9 3"]


# --- The end ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", FinishReason.STOP),
        ("max_tokens", FinishReason.LENGTH),
        ("max_turn_requests", FinishReason.LENGTH),
        ("refusal", FinishReason.CONTENT_FILTER),
        ("cancelled", FinishReason.STOP),
    ],
)
async def test_every_stop_reason_has_a_finish_reason(
    stop_reason: str, finish_reason: FinishReason
) -> None:
    assert await events(agent(f"done(prompt(), {stop_reason!r})")) == [
        Report(finish_reason=finish_reason)
    ]


async def test_the_usage_of_a_prompt_counts_and_that_of_a_context_window_does_not() -> None:
    code = """
p = prompt()
update("usage_update", used=900000, size=1000000)
done(p, usage=dict(totalTokens=99, inputTokens=5, outputTokens=7, cachedReadTokens=3))
"""
    found = await events(agent(code))
    assert usage(found) == Usage(input_tokens=5, output_tokens=7, cache_read_tokens=3)


async def test_two_messages_in_a_row_are_paragraphs() -> None:
    code = """
p = prompt()
say("one", messageId="a")
say(" and", messageId="a")
say("two", messageId="b")
update("tool_call", toolCallId="c", title="t", status="completed")
say("three", messageId="d")
done(p)
"""
    assert texts(await events(agent(code))) == ["one", " and", "\n\ntwo", "three"]


# --- Tool calls and plans --------------------------------------------------------------------


async def calls(code: str, permissions: str = "deny") -> list[AgentEvent]:
    """The events of a turn but its report. The code has the prompt in `p`."""
    return (await events(agent(f"p = prompt()\n{code}\ndone(p)", permissions=permissions)))[:-1]


async def test_a_tool_call_is_one_call_when_it_starts_and_one_result_when_it_ends() -> None:
    code = """
update("tool_call", toolCallId="c", title="Read a", kind="read")
update("tool_call_update", toolCallId="c", rawInput={"path": "a"}, locations=[{"path": "/a"}])
update("tool_call_update", toolCallId="c", status="in_progress")
say("meanwhile")
update("tool_call_update", toolCallId="c", status="in_progress", title="Read a again")
content = [{"type": "content", "content": text("half")}]
update("tool_call_update", toolCallId="c", content=content)
content = [{"type": "content", "content": text("whole")}]
update("tool_call_update", toolCallId="c", content=content, status="completed")
update("tool_call_update", toolCallId="c", content=content, status="completed")
update("tool_call", toolCallId="c", title="Read a", status="in_progress")
"""
    call, text, result = await calls(code)
    assert isinstance(call, ToolCall)
    assert (call.tool_call_id, call.name) == ("c", "read")
    assert json.loads(call.arguments_json) == {
        "title": "Read a",
        "locations": ["/a"],
        "input": {"path": "a"},
    }
    assert text == TextDelta("meanwhile")
    assert result == ToolResult("c", "read", "whole")


async def test_an_empty_content_clears_and_an_absent_one_keeps() -> None:
    code = """
old = [{"type": "content", "content": text("old")}]
for call, later in (("kept", {}), ("null", {"content": None}), ("cleared", {"content": []})):
    update("tool_call", toolCallId=call, title=call, status="in_progress", content=old)
    update("tool_call_update", toolCallId=call, status="failed", rawOutput={"code": 1}, **later)
"""
    results = [one for one in await calls(code) if isinstance(one, ToolResult)]
    assert [one.content for one in results] == ["old", "old", '{"code": 1}']
    assert all(one.is_error for one in results)


async def test_an_edit_shows_the_file_and_the_new_text() -> None:
    code = """
diff = {"type": "diff", "path": "/a.py", "oldText": "x", "newText": "y = 1"}
update("tool_call", toolCallId="c", title="Edit", kind="edit", status="completed", content=[diff])
"""
    assert (await calls(code))[-1] == ToolResult("c", "edit", "/a.py:\ny = 1")


async def test_a_call_that_never_begins_is_shown_at_the_end_of_the_turn() -> None:
    (call,) = await calls("update('tool_call', toolCallId='c', title='Later')")
    assert call == ToolCall("c", "other", '{"title": "Later"}')


async def test_a_plan_is_a_tool_call_and_a_repeated_plan_is_none() -> None:
    code = """
for status in ("pending", "pending", "completed"):
    update("plan", entries=[{"content": "Test", "priority": "high", "status": status}])
"""
    found = await calls(code)
    plans = [one for one in found if isinstance(one, ToolCall)]
    assert [json.loads(one.arguments_json)["entries"][0]["status"] for one in plans] == [
        "pending",
        "completed",
    ]
    assert [one.tool_call_id for one in found if isinstance(one, ToolResult)] == [
        one.tool_call_id for one in plans
    ]


# --- Questions of the agent ------------------------------------------------------------------


ASK = """
kinds = ("allow_always", "allow_once", "reject_once", "reject_always")
say(ask({"toolCallId": "c", "title": "rm -r /", "kind": "execute"}, *kinds)["optionId"])
"""


@pytest.mark.parametrize(
    ("permissions", "chosen"),
    [
        ("deny", "id-reject_once"),
        ("allow", "id-allow_once"),
        ("deny,execute=allow", "id-allow_once"),
        ("allow, execute=deny", "id-reject_once"),
        ("allow,read=deny", "id-allow_once"),
    ],
)
async def test_the_policy_answers_by_the_kind_of_the_call(permissions: str, chosen: str) -> None:
    call, text = await calls(ASK, permissions)
    assert call == ToolCall("c", "execute", '{"title": "rm -r /"}')
    assert text == TextDelta(chosen)


async def test_a_kind_that_an_earlier_update_named_decides() -> None:
    code = """
update("tool_call", toolCallId="c", title="Read", kind="read")
say(ask({"toolCallId": "c"}, "allow_once", "reject_once")["optionId"])
"""
    assert (await calls(code, "deny,read=allow"))[-1] == TextDelta("id-allow_once")


@pytest.mark.parametrize(("approved", "chosen"), [(True, "allow"), (False, "reject")])
async def test_people_answer_what_the_policy_leaves_to_them(approved: bool, chosen: str) -> None:
    turn = ask("")
    turn.answers["May the agent go on? rm -r /"] = Approval(approved, {"title": "rm -r /"})
    running = agent(f"p = prompt()\n{ASK}\ndone(p)", permissions="allow,execute=ask")
    assert texts(await events(running, turn)) == [f"id-{chosen}_once"]


async def test_the_content_of_a_question_is_no_result_of_the_call() -> None:
    code = """
why = [{"type": "content", "content": text("because")}]
ask({"toolCallId": "c", "kind": "execute", "content": why}, "allow_once")
update("tool_call_update", toolCallId="c", status="completed", rawOutput="done")
"""
    assert (await calls(code, "allow"))[-1] == ToolResult("c", "execute", "done")


async def test_without_a_fitting_option_the_question_is_cancelled() -> None:
    code = "say(ask({'toolCallId': 'c'}, 'allow_once', 'allow_always')['outcome'])"
    assert (await calls(code))[-1] == TextDelta("cancelled")


async def test_a_form_for_a_person_is_declined() -> None:
    code = """
write(id=7, method="elicitation/create", params={"mode": "form", "message": "your password?"})
say(read()["result"]["action"])
"""
    assert await calls(code, "allow") == [TextDelta("decline")]


# --- Modes and authentication ----------------------------------------------------------------

MODES = """
modes = {"currentModeId": "ask", "availableModes": [{"id": m, "name": m} for m in ("ask", "code")]}
used = []
def note(r): used.append(r["params"]); answer(r)
p = prompt({"session/set_mode": note, "authenticate": note}, modes=modes)
say(json.dumps(used)); done(p)
"""


@pytest.mark.parametrize(
    ("mode", "used"),
    [("code", [{"sessionId": "session-1", "modeId": "code"}]), ("ask", []), ("", [])],
)
async def test_the_mode_is_set_unless_it_is_the_mode_already(
    mode: str, used: list[dict[str, str]]
) -> None:
    (text,) = texts(await events(agent(MODES, mode=mode)))
    assert json.loads(text) == used


async def test_a_mode_that_the_agent_lacks_fails_the_run_and_names_its_modes() -> None:
    message = await failure(agent(MODES, mode="fast"), "ACP_ERROR")
    assert message == "--acp-mode: the agent has no mode 'fast'; use one of its modes: ask, code"
    message = await failure(agent(ECHO, mode="fast"), "ACP_ERROR")
    assert message.endswith("use one of its modes: none")


async def test_the_agent_is_authenticated_before_the_session() -> None:
    (text,) = texts(await events(agent(MODES, auth="key")))
    assert json.loads(text) == [{"methodId": "key"}]


async def test_an_agent_that_wants_authentication_fails_with_the_remedy() -> None:
    code = """
answer(read(), protocolVersion=1)
write(id=read()["id"], error={"code": -32000, "message": "Authentication required"})
read()
"""
    message = await failure(agent(code), "ACP_AUTH_REQUIRED")
    assert message == (
        "the agent answered session/new with an error: Authentication required; "
        "pass a key with --command-env, or set --acp-auth"
    )


async def test_an_error_of_the_agent_is_the_error_of_the_run() -> None:
    code = """
p = prompt()
error = {"code": -32603, "message": "Internal error", "data": {"details": "quota exceeded"}}
write(id=p["id"], error=error)
read()
"""
    message = await failure(agent(code), "ACP_ERROR")
    assert message == (
        "the agent answered session/prompt with an error: Internal error: quota exceeded"
    )


async def test_another_version_of_the_protocol_is_refused() -> None:
    message = await failure(agent("answer(read(), protocolVersion=2); read()"), "ACP_PROTOCOL")
    assert "speaks version 2" in message


# --- Cancel ----------------------------------------------------------------------------------


async def test_a_cancel_asks_the_agent_to_stop_and_answers_its_questions(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    code = f"""
p = prompt()
say(str(os.getpid()) + "\\n")
heard = [read()]
write(id="q", method="session/request_permission", params={{}})
heard.append(read())
open({str(heard)!r}, "w").write(json.dumps(heard))
done(p, "cancelled")
"""
    async with at_work(agent(code)) as working:
        await working.said("\n")
        await working.cancel()
    told, answered = json.loads(heard.read_text())
    assert told["method"] == "session/cancel"
    assert told["params"] == {"sessionId": "session-1"}
    assert answered["result"] == {"outcome": {"outcome": "cancelled"}}
    assert not is_running(int(working.text))


async def test_an_agent_that_ignores_the_cancel_is_killed_with_all_that_it_started() -> None:
    code = """
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
p = prompt()
child = os.fork()
if not child:
    os.setsid()
    if os.fork():
        os._exit(0)
    say("%d\\n" % os.getpid())
while True:
    time.sleep(60)
"""
    async with at_work(agent(code, grace=0.2)) as working:
        await working.said("\n")
        await working.cancel()
    await wait_for_exit(int(working.text))


async def test_a_cancel_before_the_prompt_ends_the_agent_at_once(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"""
os.mkfifo({str(pid)!r})
open({str(pid)!r}, "w").write(str(os.getpid()))
read(); read()
"""
    async with at_work(agent(code)) as working:
        while not pid.exists():
            assert not working.task.done()
            await asyncio.sleep(0)
        number = int(await asyncio.to_thread(pid.read_text))
        await working.cancel()
    assert not is_running(number)
