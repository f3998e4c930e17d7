"""People see the request of an agent for a permission, and their answer decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from runlane_server.agents.base import Approval
from runlane_server.agents.questions import Asked, question_of
from runlane_server.core.input import Question
from support.acp import agent, events
from support.turns import LocalTurn, texts


@dataclass
class Asking(LocalTurn):
    """A turn in which a person approves each question that the server would accept."""

    asked: list[Question] = field(default_factory=list)
    arguments: list[Mapping[str, Any]] = field(default_factory=list)
    changes: Mapping[str, Any] = field(default_factory=dict)

    async def ask(self, text: str, *, key: str = "", **fields: Any) -> Any:
        """Keeps the question."""
        self.asked.append(question_of(Asked(text, key, **fields)))
        self.arguments.append(fields["arguments"])
        return Approval(True, {**fields["arguments"], **self.changes})


async def asking(code: str, **changes: Any) -> tuple[Asking, list[str]]:
    """Runs an agent whose permissions people answer, with changed arguments if there are any."""
    turn = Asking(changes=changes)
    running = agent(f"p = prompt()\n{code}\ndone(p)", permissions="allow,execute=ask,edit=ask")
    return turn, texts(await events(running, turn))


async def test_people_see_what_earlier_reports_said_of_the_call() -> None:
    code = """
diff = [{"type": "diff", "path": "/a", "oldText": "x", "newText": "y"}]
update("tool_call", toolCallId="c", title="Edit", kind="edit", locations=[{"path": "/a"}])
update("tool_call_update", toolCallId="c", rawInput=["a", 1], content=diff)
say(ask({"toolCallId": "c"}, "allow_once", "reject_once")["optionId"])
"""
    turn, chosen = await asking(code)
    assert chosen == ["id-allow_once"]
    assert turn.asked[0].tool_name == "edit"
    assert turn.asked[0].text == "May the agent go on? Edit"
    assert turn.arguments == [
        {
            "title": "Edit",
            "locations": ["/a"],
            "input": ["a", 1],
            "content": [{"type": "diff", "path": "/a", "oldText": "x", "newText": "y"}],
        }
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rawInput='ls'", "rawInput='rm'"),
        ("rawInput=['ls']", "rawInput=['rm']"),
        ("rawInput=1", "rawInput=0"),
        ("locations=[{'path': '/a'}]", "locations=[{'path': '/b'}]"),
        (
            "content=[{'type': 'diff', 'path': '/a', 'newText': 'x'}]",
            "content=[{'type': 'diff', 'path': '/a', 'newText': 'y'}]",
        ),
        (
            "content=[{'type': 'content', 'content': text('x' * 9999 + 'x')}]",
            "content=[{'type': 'content', 'content': text('x' * 9999 + 'y')}]",
        ),
    ],
)
@pytest.mark.parametrize("where", ["earlier", "question"])
async def test_calls_that_differ_are_different_questions(one: str, other: str, where: str) -> None:
    code = ""
    for call, fields in (("c", one), ("d", other)):
        if where == "earlier":
            code += f"""
update("tool_call", toolCallId={call!r}, title="Do", kind="execute")
update("tool_call_update", toolCallId={call!r}, {fields})
ask(dict(toolCallId={call!r}), "allow_once")
"""
        else:
            code += f"""
ask(dict(toolCallId={call!r}, title="Do", kind="execute", {fields}), "allow_once")
"""
    turn, _ = await asking(code)
    assert len(turn.asked) == 2
    assert turn.asked[0].digest != turn.asked[1].digest


async def test_the_content_of_the_question_comes_before_that_of_earlier_reports() -> None:
    code = """
old, new = ([{"type": "diff", "path": "/a", "newText": one}] for one in ("old", "new"))
update("tool_call", toolCallId="c", title="Edit", kind="edit", content=old, rawInput={"a": 1})
ask({"toolCallId": "c", "content": new, "rawInput": {"a": 2}}, "allow_once")
"""
    turn, _ = await asking(code)
    assert turn.arguments[0]["content"] == [{"type": "diff", "path": "/a", "newText": "new"}]
    assert turn.arguments[0]["input"] == {"a": 2}


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_a_question_that_claims_an_end_is_still_about_the_call(status: str) -> None:
    code = f"""
update("tool_call", toolCallId="c", title="Do", kind="execute", rawInput="rm")
ask({{"toolCallId": "c", "status": {status!r}}}, "allow_once")
"""
    turn, _ = await asking(code)
    assert turn.arguments == [{"title": "Do", "input": "rm"}]


async def test_a_question_about_a_call_that_has_ended_has_the_kind_that_it_names() -> None:
    code = """
update("tool_call", toolCallId="c", title="Look", kind="read", status="completed")
ask({"toolCallId": "c", "title": "Do", "kind": "execute"}, "allow_once")
"""
    turn, _ = await asking(code)
    assert turn.arguments == [{"title": "Do"}]


async def test_a_call_that_people_cannot_see_as_a_whole_is_rejected() -> None:
    code = """
diff = [{"type": "diff", "path": "/a", "newText": "x" * (256 << 10)}]
call = {"toolCallId": "c", "title": "Edit", "kind": "edit", "content": diff}
say(ask(call, "allow_once", "reject_once")["optionId"])
"""
    turn, chosen = await asking(code)
    assert (turn.asked, chosen) == ([], ["id-reject_once"])


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (("allow_always", "reject_once"), "id-reject_once"),
        (("allow_always", "reject_always"), "id-reject_always"),
        (("allow_always",), "cancelled"),
        (("allow_always", "allow_once"), "id-allow_once"),
    ],
)
async def test_the_answer_of_a_person_allows_no_later_call(
    offered: tuple[str, ...], chosen: str
) -> None:
    code = f"""
outcome = ask({{"toolCallId": "c", "title": "Do", "kind": "execute"}}, *{offered!r})
say(outcome.get("optionId", outcome["outcome"]))
"""
    turn, found = await asking(code)
    assert len(turn.asked) == 1
    assert found == [chosen]


async def test_the_setting_may_allow_later_calls() -> None:
    _, found = await asking("say(ask({'toolCallId': 'c'}, 'allow_always')['optionId'])")
    assert found == ["id-allow_always"]


async def test_a_call_that_is_approved_with_other_arguments_is_rejected() -> None:
    """The protocol cannot tell the agent what the person changed."""
    code = """
call = {"toolCallId": "c", "title": "Do", "kind": "execute", "rawInput": "rm"}
say(ask(call, "allow_once", "reject_once")["optionId"])
"""
    _, chosen = await asking(code, input="ls")
    assert chosen == ["id-reject_once"]
