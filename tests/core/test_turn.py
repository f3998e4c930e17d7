"""Events become the messages of a turn."""

from __future__ import annotations

import pytest

from runlane_server.core.model import (
    Accepted,
    EventBody,
    FinishReason,
    Folded,
    Part,
    Reasoning,
    ReasoningDelta,
    Role,
    Started,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
)
from runlane_server.core.turn import (
    CUT_OFF,
    PART_CHARS,
    DraftMessage,
    InvalidAgentEvent,
    TurnDraft,
    close,
    final_text,
)

A, B = ToolCall("a", "look", "{}"), ToolCall("b", "listen", "{}")
SEEN_A, SEEN_B = ToolResult("a", "look", "a tree"), ToolResult("b", "listen", "a song")
CUT_A = ToolResult("a", "look", CUT_OFF, is_error=True)
CUT_B = ToolResult("b", "listen", CUT_OFF, is_error=True)
FOLDED = Folded("f", "r")
PROMPT_F = DraftMessage(Role.USER, run_id="f")

STOP, CALLS, CANCELED = FinishReason.STOP, FinishReason.TOOL_CALLS, FinishReason.CANCELED


def said(*bodies: EventBody) -> tuple[DraftMessage, ...]:
    draft = TurnDraft()
    for body in bodies:
        draft.add(body)
    return draft.messages()


def answer(*parts: Part, reason: FinishReason | None = None) -> DraftMessage:
    return DraftMessage(Role.ASSISTANT, parts, finish_reason=reason)


def results(*parts: Part) -> DraftMessage:
    return DraftMessage(Role.TOOL, parts)


def test_adjacent_deltas_of_a_kind_merge_into_one_part() -> None:
    assert said(
        ReasoningDelta("h"),
        ReasoningDelta("m"),
        TextDelta("o"),
        TextDelta("k"),
        ReasoningDelta("?"),
    ) == (answer(Reasoning("hm"), Text("ok"), Reasoning("?")),)


def test_empty_deltas_leave_no_trace() -> None:
    assert said(TextDelta(""), ReasoningDelta("")) == ()
    assert said(TextDelta("a"), ReasoningDelta(""), TextDelta("b")) == (
        answer(Text("a"), Text("b")),
    )


def test_accepted_and_started_events_add_no_message() -> None:
    assert said(Accepted(1), Started(1)) == ()


def test_results_form_a_tool_message_and_later_text_a_new_answer() -> None:
    assert said(TextDelta("see"), A, B, SEEN_A, SEEN_B, TextDelta("done")) == (
        answer(Text("see"), A, B),
        results(SEEN_A, SEEN_B),
        answer(Text("done")),
    )


def test_text_between_calls_keeps_its_place() -> None:
    assert said(A, TextDelta("and"), B) == (answer(A, Text("and"), B),)


def test_r26_a_folded_prompt_is_a_user_message_of_its_own_run() -> None:
    assert said(TextDelta("one"), FOLDED, TextDelta("two")) == (
        answer(Text("one")),
        PROMPT_F,
        answer(Text("two")),
    )


def test_r26_two_prompts_folded_at_one_step_are_adjacent() -> None:
    assert said(FOLDED, Folded("g", "r")) == (PROMPT_F, DraftMessage(Role.USER, run_id="g"))


def test_reading_the_messages_does_not_close_the_last_one() -> None:
    draft = TurnDraft()
    draft.add(TextDelta("so "))
    assert draft.messages() == draft.messages() == (answer(Text("so ")),)
    draft.add(TextDelta("far"))
    assert draft.messages() == (answer(Text("so far")),)


@pytest.mark.parametrize("length", [PART_CHARS, PART_CHARS + 1, 3 * PART_CHARS])
def test_a_long_text_is_split_into_parts(length: int) -> None:
    text = "".join(chr(ord("a") + n % 26) for n in range(length))
    (message,) = said(TextDelta(text[:7]), TextDelta(text[7:]))
    texts = [part.text for part in message.parts if isinstance(part, Text)]
    assert "".join(texts) == text == final_text([message])
    assert len(texts) == -(-length // PART_CHARS)
    assert max(map(len, texts)) == PART_CHARS


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        ((), SEEN_A),
        ((A, SEEN_A), SEEN_A),
        ((A,), SEEN_B),
        ((A,), A),
        ((A, SEEN_A), A),
        ((A, SEEN_A, TextDelta("so")), A),
    ],
)
def test_invalid_tool_events_raise_and_change_nothing(
    before: tuple[EventBody, ...], wrong: EventBody
) -> None:
    draft = TurnDraft()
    for body in (TextDelta("well"), *before):
        draft.add(body)
    was = draft.messages()
    with pytest.raises(InvalidAgentEvent):
        draft.add(wrong)
    assert draft.messages() == was
    draft.add(TextDelta(", then"))
    assert draft.messages() == said(TextDelta("well"), *before, TextDelta(", then"))


# --- The end ------------------------------------------------------------------------------------


def test_r15_cancelled_before_the_first_message_adds_an_empty_answer() -> None:
    """The prompt is already written; only an empty assistant message is added."""
    assert close((), CANCELED) == (answer(reason=CANCELED),)


def test_r16_cancelled_mid_stream_keeps_the_text() -> None:
    assert close(said(ReasoningDelta("hm"), TextDelta("so f")), CANCELED) == (
        answer(Reasoning("hm"), Text("so f"), reason=CANCELED),
    )


def test_r16_open_calls_get_an_error_result() -> None:
    assert close(said(TextDelta("see"), A, B), CANCELED) == (
        answer(Text("see"), A, B, reason=CANCELED),
        results(CUT_A, CUT_B),
    )


def test_r16_open_calls_get_errors_and_finished_ones_keep_their_results() -> None:
    assert close(said(A, B, SEEN_B), CANCELED) == (
        answer(A, B, reason=CANCELED),
        results(CUT_A, SEEN_B),
    )


def test_r16_cancelled_after_all_results_adds_an_answer() -> None:
    """The message with the calls is complete; another one carries the finish reason."""
    assert close(said(A, SEEN_A), CANCELED) == (
        answer(A, reason=CALLS),
        results(SEEN_A),
        answer(reason=CANCELED),
    )


def test_r16_cancelled_after_a_folded_prompt_adds_an_answer() -> None:
    assert close(said(TextDelta("one"), FOLDED), CANCELED) == (
        answer(Text("one"), reason=STOP),
        PROMPT_F,
        answer(reason=CANCELED),
    )


def test_r16_the_error_of_an_open_call_precedes_a_folded_prompt() -> None:
    assert close(said(A, FOLDED), CANCELED) == (
        answer(A, reason=CALLS),
        results(CUT_A),
        PROMPT_F,
        answer(reason=CANCELED),
    )


def test_r16_a_late_result_is_moved_behind_its_call() -> None:
    """Models refuse a history with anything between a call and its result."""
    closed = close(said(A, FOLDED, TextDelta("well"), B, SEEN_A, SEEN_B, TextDelta("done")), STOP)
    assert closed == (
        answer(A, reason=CALLS),
        results(SEEN_A),
        PROMPT_F,
        answer(Text("well"), B, reason=CALLS),
        results(SEEN_B),
        answer(Text("done"), reason=STOP),
    )


def test_r16_overlapping_calls_share_one_tool_message() -> None:
    assert close(said(A, B, SEEN_A, TextDelta("and"), SEEN_B), STOP) == (
        answer(A, B, reason=CALLS),
        results(SEEN_A, SEEN_B),
        answer(Text("and"), reason=STOP),
    )


def test_only_the_last_answer_carries_the_finish_reason_of_the_turn() -> None:
    closed = close(said(TextDelta("one"), FOLDED, A, SEEN_A, TextDelta("two")), FinishReason.LENGTH)
    reasons = [message.finish_reason for message in closed if message.role is Role.ASSISTANT]
    assert reasons == [STOP, CALLS, FinishReason.LENGTH]


def test_final_text_is_the_text_of_the_last_answer() -> None:
    assert final_text(()) == ""
    assert (
        final_text(said(TextDelta("one"), A, SEEN_A, ReasoningDelta("hm"), TextDelta("two")))
        == "two"
    )
    assert final_text(said(TextDelta("one"), A, SEEN_A)) == "one"
    assert final_text(close(said(TextDelta("one"), A, SEEN_A), CANCELED)) == ""
