"""Checks transcripts: they agree with the terminal events and with the streamed text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from proofs.crash.event_rules import was_waiting
from proofs.crash.history import History, Rule
from runlane import Message, Role, Run, RunComplete, RunEvent, Started, TextDelta
from support.wire import check_turn, text_of


def _transcript(history: History) -> Iterator[str]:
    """The transcript has the turn that the terminal event describes (R14 to R16, R22)."""
    for run in history.final.runs.values():
        if run.run_complete is None:
            continue
        messages = history.final.messages.get(run.session_id, [])
        try:
            if run.folded_into is None:
                check_turn(run.run_complete, messages)
            else:
                _check_folded(run.run_complete, messages)
        except (AssertionError, IndexError) as error:
            yield f"{run.run_id}: {error!r}"


def _check_folded(complete: RunComplete, messages: Sequence[Message]) -> None:
    own = [message for message in messages if message.run_id == complete.run_id]
    assert [message.role for message in own] == [Role.USER], "the prompt does not stand once"
    if complete.message_id is None:
        return
    (last,) = [message for message in messages if message.message_id == complete.message_id]
    assert last.run_id == complete.folded_into, "its message is of another turn"
    assert last.finish_reason is complete.finish_reason
    assert text_of(last) == complete.text


def _strangers(history: History) -> Iterator[str]:
    """No message is repeated, out of order, or of an unknown run."""
    for session_id, messages in history.final.messages.items():
        for message_id, count in Counter(message.message_id for message in messages).items():
            if count > 1:
                yield f"{session_id} has message {message_id} {count} times"
        for message in messages:
            run = history.final.runs.get(message.run_id)
            if run is None or run.session_id != session_id:
                yield f"{session_id} has a message of {message.run_id}"
        turns = [message.turn for message in messages]
        if turns != sorted(turns):
            yield f"the turns of {session_id} are out of order"


def _streamed(history: History) -> Iterator[str]:
    """The transcript has the streamed text of the last attempt."""
    for run in history.final.runs.values():
        events = history.final.events.get(run.run_id, [])
        if run.folded_into is not None or not events:
            continue
        said, kept = (
            said_in(events),
            _stored_text(run, history.final.messages.get(run.session_id, [])),
        )
        if said != kept and not (kept == "" and was_waiting(run)):
            yield f"{run.run_id} streamed {said!r}, the transcript has {kept!r}"


def said_in(events: Sequence[RunEvent]) -> str:
    """The text of the last attempt."""
    said = ""
    for event in events:
        if isinstance(event.body, Started):
            said = ""
        elif isinstance(event.body, TextDelta):
            said += event.body.text
    return said


def _stored_text(run: Run, messages: Sequence[Message]) -> str:
    return "".join(
        text_of(message)
        for message in messages
        if message.run_id == run.run_id and message.role is Role.ASSISTANT
    )


RULES: Mapping[str, Rule] = {
    "transcript": _transcript,
    "message": _strangers,
    "streamed": _streamed,
}
