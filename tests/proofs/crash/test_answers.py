"""Answers, cancels, expiries and kills in the same instant: a short run, and the checks of it.
`make answers` plays a thousand rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proofs.crash.answer_rules import Case, Given, Story, violations
from proofs.crash.answers import play
from proofs.crash.test_checker import BY, at, ended, messages_of
from runlane import (
    AnswerReceipt,
    CancelledRun,
    CancelReceipt,
    InputAnswered,
    InputKind,
    InputRequest,
    InputRequested,
    InputState,
    InputWithdrawn,
    RunEvent,
    RunState,
    Started,
)
from runlane.inputs import InputAnswer
from runlane.types import EventBody

ROUNDS = 30

COVERED = CancelledRun("s000001", "r", 1, RunState.INPUT_REQUIRED)


@pytest.mark.sqlite("it kills the only server of a file")
@pytest.mark.timeout(300)
async def test_answer_cancel_expiry_and_kill_in_the_same_instant_agree(tmp_path: Path) -> None:
    """R19, R20, R40 to R45 and R50: thirty questions."""
    figures, wrong = await play("sqlite", ROUNDS, "suite", tmp_path)
    print(figures)
    assert wrong == []
    assert figures["rounds"] == ROUNDS
    assert figures["kills"]


# --- The checks can fail -------------------------------------------------------------------------


def answer(value: str = "answer 0") -> InputAnswer:
    return InputAnswer(f"s000001 {value}", value, "", "none", "ipv4:127.0.0.1:1", at(1), "digest")


def request(state: InputState, given: InputAnswer | None) -> InputRequest:
    return InputRequest(
        *("id", "s000001", "r", "k", InputKind.TEXT, "well?", "", "", (), "", state),
        *(at(1), None, at(2), "digest", given),
    )


def told(
    run: Any, asked: InputRequest, closed: EventBody, given: list[Given], **more: Any
) -> Story:
    """A story in which everything agrees."""
    bodies = [Started(1), InputRequested(replace(asked, state=InputState.OPEN)), closed]
    events = [RunEvent(n, at(n), body) for n, body in enumerate([*bodies, run.run_complete], 1)]
    case = Case(1, False, False, False, True, len(given), 1)
    sound: dict[str, Any] = {
        "was_cancel_sent": True,
        "receipt": CancelReceipt("s000001", (), 0),
    } | more
    return Story(
        case, run, given, **sound, requests=[asked], events=events, streamed=list(events),
        messages=messages_of(run),
    )  # fmt: skip


def answered() -> Story:
    """Two answers; the first was accepted, and the run completed with it."""
    run = ended("r", 1)
    assert run.run_complete is not None
    run = replace(run, run_complete=replace(run.run_complete, text="a answer 0"))
    asked = request(InputState.ANSWERED, answer())
    given = [
        Given("s000001 answer 0", "answer 0", AnswerReceipt(asked, True)),
        Given("s000001 answer 1", "answer 1", AnswerReceipt(asked, False)),
    ]
    return told(run, asked, InputAnswered("id"), given)


def withdrawn() -> Story:
    """A cancel that came before an answer."""
    run = ended("r", 1, cancelled=True)
    assert run.run_complete is not None
    run = replace(run, run_complete=replace(run.run_complete, cancel_reason="cancel 1"))
    asked = request(InputState.WITHDRAWN, None)
    given = [Given("s000001 answer 0", "answer 0", was_closed=True)]
    receipt = CancelReceipt("s000001", (COVERED,), 1)
    return told(run, asked, InputWithdrawn("id"), given, receipt=receipt)


def test_a_sound_story_has_no_violation() -> None:
    assert violations(answered()) == []
    assert violations(withdrawn()) == []


def two_accepted(story: Story) -> None:
    story.given[1].receipt = AnswerReceipt(story.request, True)


def another_answer_returned(story: Story) -> None:
    other = replace(story.request, answer=answer("answer 1"))
    story.given[1].receipt = AnswerReceipt(other, False)


def answer_lost(story: Story) -> None:
    story.requests = [replace(story.request, state=InputState.WITHDRAWN, answer=None)]


def answer_without_a_receipt(story: Story) -> None:
    story.given[0].receipt = None


def refused_although_answered(story: Story) -> None:
    story.given[1].receipt, story.given[1].was_closed = None, True


def asked_twice(story: Story) -> None:
    story.requests = [story.request, story.request]


def left_open(story: Story) -> None:
    story.requests = [replace(story.request, state=InputState.OPEN)]


def event_missing(story: Story) -> None:
    story.events = [*story.events[:2], *story.events[3:]]


def event_missing_in_the_stream(story: Story) -> None:
    story.streamed = story.streamed[:-1]


def event_twice_in_the_stream(story: Story) -> None:
    story.streamed = [*story.streamed, story.streamed[-1]]


def text_of_another_answer(story: Story) -> None:
    story.run = replace(story.run, run_complete=replace(story.end, text="a answer 1"))


def receipt_untrue(story: Story) -> None:
    story.receipt = CancelReceipt("s000001", (COVERED,), 1)


def prompt_twice(story: Story) -> None:
    story.messages = [story.messages[0], *story.messages]


@pytest.mark.parametrize(
    "doctor",
    [
        *(two_accepted, another_answer_returned, answer_lost, answer_without_a_receipt),
        *(refused_although_answered, asked_twice, left_open, event_missing),
        *(event_missing_in_the_stream, event_twice_in_the_stream, text_of_another_answer),
        *(receipt_untrue, prompt_twice),
    ],
    ids=lambda value: value.__name__,
)
def test_a_doctored_story_has_a_violation(doctor: Callable[[Story], None]) -> None:
    story = answered()
    doctor(story)
    assert violations(story)


def receipt_empty(story: Story) -> None:
    story.receipt = CancelReceipt("s000001", (), 1)


def cancelled_by_nobody(story: Story) -> None:
    story.was_cancel_sent, story.receipt = False, None


def another_reason(story: Story) -> None:
    story.run = replace(story.run, run_complete=replace(story.end, cancel_reason=BY))


def completed(story: Story) -> None:
    story.run = replace(story.run, state=RunState.COMPLETED)


@pytest.mark.parametrize(
    "doctor",
    [receipt_empty, cancelled_by_nobody, another_reason, completed],
    ids=lambda value: value.__name__,
)
def test_a_doctored_story_of_a_cancel_has_a_violation(doctor: Callable[[Story], None]) -> None:
    story = withdrawn()
    doctor(story)
    assert violations(story)
