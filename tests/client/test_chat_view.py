"""The view of a chat of a session, event by event."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from runlane.cli.chat import view as module
from runlane.cli.chat.transcript import Past
from runlane.cli.chat.view import ChatView
from runlane.cli.terminal import unsafe_text
from runlane.errors import Unavailable
from runlane.inputs import InputKind, InputRequest, InputRequested, InputState, InputWithdrawn
from runlane.session_stream import QueueChanged, SessionChanged, SessionEvent, SessionRunEvent
from runlane.types import (
    FinishReason,
    Folded,
    Message,
    Role,
    Run,
    RunEvent,
    RunState,
    Session,
    Started,
    Text,
    TextDelta,
    Usage,
    WhenBusy,
)

NOW = datetime(2026, 11, 30, tzinfo=UTC)
HOSTILE = "\x1b]0;x\x07\u202e\u200b"


def run(run_id: str, prompt: str) -> Run:
    return Run("s", run_id, 1, RunState.QUEUED, WhenBusy.QUEUE, prompt, NOW)


def session(title: str = "") -> Session:
    return Session("s", title, {}, True, None, 0, Usage(), NOW, NOW)


class Shown:
    """A view, and the lines that it has printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.view = ChatView(lambda text, _: self.lines.append(text), lambda: 20)

    def see(self, body: Any) -> None:
        self.view.show(SessionEvent("s", "c", body))

    def happens(self, run_id: str, body: Any) -> None:
        self.see(SessionRunEvent(run_id, RunEvent(1, NOW, body)))

    @property
    def area(self) -> str:
        return "".join(text for _, text in self.view.area())


def question(**fields: Any) -> InputRequest:
    wanted: dict[str, Any] = {
        "input_request_id": "i",
        "session_id": "s",
        "run_id": "r",
        "key": "k",
        "kind": InputKind.APPROVAL,
        "text": "May I?",
        "tool_name": "deploy",
        "arguments_json": "{}",
        "choices": (),
        "schema_json": "",
        "state": InputState.OPEN,
        "requested_at": NOW,
        "expires_at": None,
        "closed_at": None,
        "question_digest": "",
        "answer": None,
    }
    return InputRequest(**(wanted | fields))


def test_prompt_that_is_known_late_is_shown_before_the_answer() -> None:
    shown = Shown()
    shown.happens("r", Started(1))
    assert shown.lines == []
    shown.see(SessionChanged(session(), run("r", "why?")))
    shown.happens("r", TextDelta("so\nthat"))
    assert (shown.lines, shown.area) == (["> why?", "so"], "that\n")
    shown.view.sending["own"] = "my prompt"
    shown.happens("own", Started(1))
    assert shown.lines[-2:] == ["that", "> my prompt"]
    shown.view.accepted("own")  # its run came first
    assert shown.area == ""


def test_prompt_of_a_run_that_has_ended_already_is_looked_up_before_it_is_shown() -> None:
    shown = Shown()
    shown.happens("r", Started(1))
    brought = SessionEvent("s", "c", SessionChanged(session(), run("r", "why?")))
    idle = SessionEvent("s", "c", SessionChanged(session(), None))
    assert (shown.view.lacking(brought), shown.view.lacking(idle)) == ("", "r")
    shown.view.learn(run("r", "why?"))
    shown.view.show(idle)
    assert shown.lines == ["> why?"]
    joins = SessionEvent("s", "c", SessionRunEvent("r", RunEvent(2, NOW, Folded("j", "r"))))
    assert shown.view.lacking(joins) == "j"
    shown.view.learn(run("j", "and?"))
    assert shown.view.lacking(joins) == ""
    shown.view.show(joins)
    assert shown.lines == ["> why?", "> and?"]


@pytest.mark.parametrize(
    ("reason", "mark"),
    [
        (FinishReason.STOP, []),
        (None, []),
        (FinishReason.CANCELED, ["cancelled"]),
        (FinishReason.ERROR, ["error"]),
        (FinishReason.LENGTH, ["length"]),
    ],
)
def test_earlier_turn_that_did_not_end_well_is_marked(
    reason: FinishReason | None, mark: list[str]
) -> None:
    asked = Message("m", "r", 1, Role.USER, (Text("why?"),), None, "", NOW)
    said = Message("n", "r", 1, Role.ASSISTANT, (Text("so"),), reason, "", NOW)
    shown = Shown()
    shown.view.show_past(Past([(asked, said)], 0), "s")
    assert shown.lines == ["> why?", "so", *mark]


def test_queue_and_unsent_prompts_stand_above_the_input() -> None:
    shown = Shown()
    shown.view.sending["b"] = "second"
    shown.see(QueueChanged(("a",), (run("a", "first"),)))
    assert shown.area == "  queued: first\n  sending: second\n"
    shown.see(QueueChanged(("a", "b"), (run("b", "second"),)))
    assert shown.area == "  queued: first\n  queued: second\n"
    shown.see(QueueChanged(tuple("abcdefg"), tuple(run(name, name) for name in "cdefg")))
    assert shown.area.endswith("… and 2 more\n")


def test_open_line_is_broken_between_words_before_it_fills_the_screen() -> None:
    shown = Shown()
    shown.happens("r", TextDelta("word " * 50))
    assert all(len(line) <= module.OPEN_ROWS * 20 for line in shown.lines)
    assert "".join([*shown.lines, shown.area]).rstrip("\n") == "word " * 50
    shown.happens("r", TextDelta("x" * 100))
    assert len(shown.area) <= module.OPEN_ROWS * 20 + 1


def test_line_approves_only_after_a_while_and_while_the_question_is_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("runlane.cli.chat.view.time.monotonic", lambda: now)
    shown = Shown()
    shown.happens("r", InputRequested(question()))
    assert shown.lines == ["? May I?", "  deploy {}"]
    early = shown.view.is_considered
    now += module.CONSIDER_SECONDS
    assert (early, shown.view.is_considered) == (False, True)
    shown.happens("r", InputRequested(question()))  # another attempt asks the same
    assert len(shown.lines) == 2
    shown.happens("r", InputWithdrawn("i"))
    assert (shown.view.question, shown.view.is_considered) == (None, False)


def test_line_approves_the_next_question_only_a_while_after_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("runlane.cli.chat.view.time.monotonic", lambda: now)
    shown = Shown()
    for name in ("i", "j"):
        shown.happens("r", InputRequested(question(input_request_id=name)))
    now += module.CONSIDER_SECONDS
    assert shown.view.is_considered
    shown.happens("r", InputWithdrawn("i"))
    assert shown.view.question == question(input_request_id="j")
    assert (shown.view.is_considered, shown.area) == (False, "  …\n")
    shown.happens("r", TextDelta("x"))
    now += module.CONSIDER_SECONDS
    shown.happens("r", TextDelta("y"))
    assert shown.view.is_considered


def test_text_answers_the_question_that_was_there_when_typing_began() -> None:
    shown = Shown()
    view = shown.view
    view.typed("a prom")
    wanted = question(kind=InputKind.TEXT)
    shown.happens("r", InputRequested(wanted))
    assert "type the answer" not in shown.area
    view.typed("a prompt")
    assert view.addressee is None
    view.typed("")
    assert "type the answer" in shown.area
    view.typed("a")
    shown.happens("r", InputWithdrawn("i"))
    shown.happens("r", InputRequested(question(input_request_id="j", kind=InputKind.TEXT)))
    view.typed("an answer")
    assert view.addressee == wanted


def test_nothing_of_others_steers_the_terminal() -> None:
    shown = Shown()
    shown.see(QueueChanged(("q",), (run("q", HOSTILE),)))
    shown.see(SessionChanged(session(), run("r", HOSTILE)))
    shown.see(SessionChanged(session(HOSTILE + "t"), None))
    shown.happens("r", Started(1))
    shown.happens("r", TextDelta(HOSTILE))
    asked = question(text=HOSTILE, tool_name=HOSTILE, arguments_json=HOSTILE, choices=(HOSTILE,))
    shown.happens("r", InputRequested(asked))
    shown.view.show_lost(Unavailable(HOSTILE))
    everything = "".join([*shown.lines, shown.area, shown.view.status()])
    assert "\\x1b" in everything
    assert not unsafe_text(everything)
