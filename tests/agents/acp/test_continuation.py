"""Sessions of the agent that continue between turns, and the directory that they live in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runlane_server.agents.acp.agent_sessions import AgentSession, read_record, write_record
from runlane_server.agents.base import AgentEvent
from runlane_server.core.model import Message, Prompt, Role, SessionKey, Usage
from support.acp import agent, events
from support.turns import LocalTurn, Working, message, texts, usage

REPORTS = """
asked = []
def note(request):
    asked.append([request["method"], request["params"]["sessionId"], request["params"]["cwd"]])
    {before}
    {answer}
p = prompt({{"session/load": note, "session/resume": note}}, **{capabilities})
prompts = [block["text"] for block in p["params"]["prompt"]]
say(json.dumps([asked, p["params"]["sessionId"], os.getcwd(), prompts]))
{then}
done(p, usage=dict(totalTokens=9, inputTokens=5, outputTokens=4))
"""
"""Reports which session was continued where, and its prompt."""

LOAD = "dict(loadSession=True)"
RESUME = "dict(loadSession=True, sessionCapabilities={'resume': {}})"
OK = "answer(request)"
REFUSE = 'write(id=request["id"], error={"code": -32601, "message": "not implemented"})'


def reports(
    capabilities: str = LOAD, answer: str = OK, before: str = "pass", then: str = "pass"
) -> str:
    """The source of such an agent."""
    return REPORTS.format(capabilities=capabilities, answer=answer, before=before, then=then)


class Conversation:
    """Turns of one session, one after the other, each with an agent process of its own."""

    def __init__(self, state: Path | None) -> None:
        self.history: list[Message] = []
        self._state = state
        self._count = 0

    async def turn(
        self, code: str, text: str, *, seen: bool = True, cwd: Path | None = None
    ) -> list[AgentEvent]:
        """The next turn. `seen`: whether it is in the transcript afterwards."""
        self._count += 1
        turn = LocalTurn(Prompt(text), messages=list(self.history), run_id=f"r{self._count}")
        found = await events(agent(code, state=self._state, cwd=cwd), turn)
        if seen:
            self.add(text, "answer")
        return found

    def add(self, text: str, answer: str) -> None:
        """Adds a turn to the transcript, which another agent or node may have executed."""
        number = len(self.history) // 2 + 1
        self.history.append(message(number, Role.USER, text))
        self.history.append(message(number, Role.ASSISTANT, answer))


def _found(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(pattern))


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def report(found: list[AgentEvent]) -> Any:
    """The report of the agent."""
    return json.loads("".join(texts(found)))


@pytest.mark.parametrize(
    ("capabilities", "method"), [(LOAD, "session/load"), (RESUME, "session/resume")]
)
async def test_the_next_turn_continues_the_session_of_the_agent(
    tmp_path: Path, capabilities: str, method: str
) -> None:
    talk = Conversation(tmp_path)
    asked, session, cwd, prompts = report(await talk.turn(reports(capabilities), "one"))
    assert (asked, session, prompts) == ([], "session-1", ["one"])
    asked, session, again, prompts = report(await talk.turn(reports(capabilities), "two"))
    assert asked == [[method, "session-1", cwd]]
    assert (session, again, prompts) == ("session-1", cwd, ["two"])


async def test_an_agent_that_refuses_to_resume_may_load(tmp_path: Path) -> None:
    talk = Conversation(tmp_path)
    code = reports(RESUME, answer=f"{OK} if 'load' in request['method'] else {REFUSE}")
    await talk.turn(code, "one")
    asked, session, _, prompts = report(await talk.turn(code, "two"))
    assert [method for method, *_ in asked] == ["session/resume", "session/load"]
    assert (session, prompts) == ("session-1", ["two"])


async def test_the_replay_of_a_loaded_session_is_no_output(tmp_path: Path) -> None:
    talk = Conversation(tmp_path)
    code = reports(before="say('replayed'); update('plan', entries=[])")
    await talk.turn(code, "one")
    found = await talk.turn(code, "two")
    assert len(texts(found)) == 1
    assert "replayed" not in texts(found)[0]


async def test_a_session_that_the_agent_refuses_is_begun_anew_with_the_transcript(
    tmp_path: Path,
) -> None:
    talk = Conversation(tmp_path)
    code = reports(answer=REFUSE)
    await talk.turn(code, "one")
    asked, _, _, (before, now) = report(await talk.turn(code, "two"))
    assert len(asked) == 1
    assert '{"role": "user", "text": "one"}' in before
    assert now == "two"


@pytest.mark.parametrize("capabilities", ["dict()", LOAD])
async def test_without_a_directory_or_the_ability_each_turn_gets_the_transcript(
    tmp_path: Path, capabilities: str
) -> None:
    state = tmp_path if capabilities == "dict()" else None
    talk = Conversation(state)
    await talk.turn(reports(capabilities), "one")
    asked, _, _, prompts = report(await talk.turn(reports(capabilities), "two"))
    assert asked == []
    assert len(prompts) == 2


async def test_turns_of_others_are_handed_over_and_those_of_the_session_are_not(
    tmp_path: Path,
) -> None:
    talk = Conversation(tmp_path)
    await talk.turn(reports(), "one")
    talk.add("elsewhere", "said")
    asked, _, _, (before, now) = report(await talk.turn(reports(), "three"))
    assert len(asked) == 1
    assert now == "three"
    assert "elsewhere" in before
    assert '"one"' not in before


async def test_a_turn_that_is_missing_from_the_transcript_begins_a_session_anew(
    tmp_path: Path,
) -> None:
    talk = Conversation(tmp_path)
    await talk.turn(reports(), "lost", seen=False)
    asked, _, _, prompts = report(await talk.turn(reports(), "again"))
    assert (asked, prompts) == ([], ["again"])


async def test_another_working_directory_begins_a_session_anew(tmp_path: Path) -> None:
    talk = Conversation(tmp_path / "states")
    await talk.turn(reports(), "one")
    asked, _, cwd, _ = report(await talk.turn(reports(), "two", cwd=tmp_path))
    assert (asked, cwd) == ([], str(tmp_path))
    asked, *_ = report(await talk.turn(reports(), "three", cwd=tmp_path))
    assert asked == [["session/load", "session-1", str(tmp_path)]]


async def test_usage_is_taken_of_a_new_session_only(tmp_path: Path) -> None:
    talk = Conversation(tmp_path)
    assert usage(await talk.turn(reports(), "one")) == Usage(input_tokens=5, output_tokens=4)
    assert usage(await talk.turn(reports(), "two")) == Usage()


@pytest.mark.parametrize(
    ("then", "is_seen"), [("read(); done(p, 'cancelled')", True), ("time.sleep(600)", False)]
)
async def test_a_cancelled_turn_is_seen_if_the_agent_has_answered_the_cancel(
    tmp_path: Path, then: str, is_seen: bool
) -> None:
    running = agent(reports(then=then), state=tmp_path, grace=30.0 if is_seen else 0.4)
    working = Working(running, LocalTurn(Prompt("one")))
    await working.said("]")
    await working.cancel()
    await running.close()
    (home,) = _found(tmp_path, "*/*/home")
    seen = [read_record(path) for path in _found(tmp_path, "*/*/acp-*.json")]
    assert seen == ([AgentSession("session-1", "r1", str(home))] if is_seen else [])


async def test_another_command_line_has_sessions_of_its_own(tmp_path: Path) -> None:
    talk = Conversation(tmp_path)
    await talk.turn(reports(), "one")
    asked, _, _, prompts = report(await talk.turn(reports(then="1"), "two"))
    assert asked == []
    assert len(prompts) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff",
        b'{"agent_session_id": "s", "last_run_id": "r", "cwd": 7}',
        b'{"agent_session_id": "", "last_run_id": "r", "cwd": "/"}',
        b'{"agent_session_id": "s"}',
        b'{"agent_session_id": "s", "last_run_id": "r", "cwd": "/", "more": 1}',
        b"[" * 60_000,
        b'"' + b"x" * (1 << 20) + b'"',
    ],
    ids=range(11),
)
async def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "acp.json"
    path.write_bytes(content)
    assert read_record(path) is None
    record = AgentSession("s", "r", "/")
    write_record(path, record)
    assert read_record(path) == record


async def test_the_agent_works_in_the_directory_of_its_session(tmp_path: Path) -> None:
    code = """
p = prompt()
env = os.environ
say(json.dumps([os.getcwd(), env["HOME"], env["RUNLANE_STATE_DIR"], env["TMPDIR"]]))
open("mark", "a").write("x")
say(open("mark").read())
done(p)
"""
    where = []
    for session in ("a", "b", "a"):
        turn = LocalTurn(tenant="t", session_id=session)
        directory, count = texts(await events(agent(code, state=tmp_path), turn))
        where.append((json.loads(directory), count))
    (first, one), (second, other), (third, two) = where
    assert (one, other, two) == ("x", "x", "xx")
    assert first[0] == first[1] == first[2] == third[0] != second[0]
    assert first[3] not in {first[0], third[3]}
    assert _mode(Path(first[0])) == 0o700
    assert Path(first[0]).is_relative_to(tmp_path)


async def test_the_directory_goes_with_the_session(tmp_path: Path) -> None:
    talk = Conversation(tmp_path)
    running = agent(reports(), state=tmp_path)
    await talk.turn(reports(), "one")
    running.session_deleted(SessionKey("default", "s1"))
    assert not _found(tmp_path, "default-*/*")
    running.session_deleted(SessionKey("default", "s1"))
    await running.close()
