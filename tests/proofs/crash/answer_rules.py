"""Things that must agree after answers, a cancel, an expiry and a kill in the same instant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from runlane import (
    AnswerReceipt,
    CancelReceipt,
    FinishReason,
    InputAnswered,
    InputExpired,
    InputRequest,
    InputRequested,
    InputState,
    InputWithdrawn,
    Message,
    Role,
    Run,
    RunComplete,
    RunEvent,
    RunState,
)

FAR = "far later"
"""The answer to a question that nobody closed in the instant."""

DEFAULT = "default"

S = InputState


@dataclass(frozen=True, slots=True)
class Case:
    """A round: one run with one question."""

    number: int
    leaves: bool
    expires: bool
    has_default: bool
    cancels: bool
    answers: int
    max_attempts: int

    @property
    def session_id(self) -> str:
        """The session of the round."""
        return f"s{self.number:06}"

    @property
    def reason(self) -> str:
        """The reason of its cancel."""
        return f"cancel {self.number}"


@dataclass(slots=True)
class Given:
    """An answer, and the reply to it: a receipt, or INPUT_CLOSED."""

    answer_id: str
    value: str
    receipt: AnswerReceipt | None = None
    was_closed: bool = False


@dataclass(slots=True)
class Story:
    """A round as everybody saw it."""

    case: Case
    run: Run
    given: Sequence[Given]
    was_cancel_sent: bool
    receipt: CancelReceipt | None
    requests: Sequence[InputRequest]
    events: Sequence[RunEvent]
    streamed: Sequence[RunEvent]
    messages: Sequence[Message] = field(default_factory=list)

    @property
    def request(self) -> InputRequest:
        """The question."""
        return self.requests[0]

    @property
    def end(self) -> RunComplete:
        """The end of the run."""
        assert self.run.run_complete is not None
        return self.run.run_complete

    @property
    def outcome(self) -> str:
        """How the round ended."""
        return f"{self.request.state}, run {self.run.state} {self.end.finish_reason}"


def violations(story: Story) -> list[str]:
    """The things that do not agree."""
    if len(story.requests) != 1:
        return [f"{story.case.session_id}: has {len(story.requests)} questions"]
    rules = (_request, _events, _answers, _cancel, _end, _transcript)
    found = chain.from_iterable(rule(story) for rule in rules)
    return [f"{story.case.session_id}: {what}; {story.outcome}; {story.case}" for what in found]


def _request(story: Story) -> Iterator[str]:
    """The question was closed once, by what the round had."""
    case, state = story.case, story.request.state
    if state is S.OPEN:
        yield "the question is open and the run has ended"
    if state is S.EXPIRED and not case.expires:
        yield "a question without a timeout expired"
    if state is S.WITHDRAWN and story.run.state is RunState.COMPLETED:
        yield "the run completed without its answer"


def _events(story: Story) -> Iterator[str]:
    """The events tell the same, and the stream of the session has each of them once (R45, R50)."""
    if [event.index for event in story.events] != list(range(1, len(story.events) + 1)):
        yield f"the run has the events {[event.index for event in story.events]}"
    ends = [event.body for event in story.events if isinstance(event.body, RunComplete)]
    if ends != [story.end] or story.events[-1].body != story.end:
        yield f"the run has the ends {ends}"
    if list(story.streamed) != list(story.events):
        streamed = [(e.index, type(e.body).__name__) for e in story.streamed]
        yield f"the stream of the session has {streamed}"
    bodies = [event.body for event in story.events]
    asked = {b.input_request.input_request_id for b in bodies if isinstance(b, InputRequested)}
    if asked != {story.request.input_request_id}:
        yield f"the events ask {asked}"
    closed = [b for b in bodies if isinstance(b, InputAnswered | InputWithdrawn | InputExpired)]
    kind = {S.ANSWERED: InputAnswered, S.WITHDRAWN: InputWithdrawn, S.EXPIRED: InputExpired}
    if [type(body) for body in closed] != [kind.get(story.request.state)]:
        yield f"the question was closed by {closed}"


def _answers(story: Story) -> Iterator[str]:
    """One answer wins, and everybody who answered has it (R41, R42)."""
    winner = story.request.answer
    accepted = [given for given in story.given if given.receipt and given.receipt.accepted]
    if len(accepted) > 1:
        yield f"{len(accepted)} answers were accepted"
    for given in accepted:
        if winner is None or (winner.answer_id, winner.value) != (given.answer_id, given.value):
            yield f"{given.value!r} was accepted, and the request has {winner}"
    if story.request.state is S.ANSWERED and (winner is None or winner.authenticated_by == DEFAULT):
        yield f"the question is answered by {winner}"
    if story.request.state is S.ANSWERED and len(accepted) != 1:
        yield f"the question is answered, and nobody has that receipt: {story.given}"
    for given in story.given:
        if given.receipt and given.receipt.input_request.answer != winner:
            yield f"{given.value!r} got back {given.receipt.input_request.answer}, not {winner}"
        if given.was_closed and story.request.state is S.ANSWERED:
            yield f"{given.value!r} was refused as closed"


def _cancel(story: Story) -> Iterator[str]:
    """The receipt names the run exactly if the run ended cancelled (R19, R20)."""
    is_cancelled = story.run.state is RunState.CANCELLED
    named = story.receipt is not None and bool(story.receipt.cancelled)
    if is_cancelled and not story.was_cancel_sent:
        yield "the run was cancelled, and nobody cancelled it"
    if is_cancelled and story.end.cancel_reason != story.case.reason:
        yield f"the run was cancelled for {story.end.cancel_reason!r}"
    if named and not is_cancelled:
        yield f"the receipt {story.receipt} names a run that was not cancelled"
    if story.receipt is not None and is_cancelled and not named:
        yield "the run was cancelled, and the receipt is empty"


def _end(story: Story) -> Iterator[str]:
    """The run ends as its question did."""
    case, run, end, state = story.case, story.run, story.end, story.request.state
    answer = story.request.answer
    if run.state is RunState.COMPLETED:
        value = None if answer is None else answer.value
        expected = DEFAULT if state is S.EXPIRED else value
        if end.text != f"a {expected}":
            yield f"the run says {end.text!r}, and the answer is {expected!r}"
    elif run.state is RunState.FAILED:
        assert end.error is not None
        has_expired = state is S.EXPIRED and not case.has_default
        # An agent that left is lost only after its question was closed.
        is_at_work = not case.leaves or state in {S.ANSWERED, S.EXPIRED}
        may_be_lost = case.max_attempts == 1 and is_at_work
        if not (
            (end.error.reason == "INPUT_EXPIRED" and has_expired)
            or (end.error.reason == "INTERRUPTED" and may_be_lost)
        ):
            yield f"the run failed: {end.error}"
    if state is S.EXPIRED and not case.has_default and run.state is RunState.COMPLETED:
        yield "the run completed although its question expired without a default"


def _transcript(story: Story) -> Iterator[str]:
    """The transcript has the turn once, with the text and the reason of its end (R14 to R16)."""
    users = [message for message in story.messages if message.role is Role.USER]
    if len(users) != 1:
        yield f"the prompt is {len(users)} times in the transcript"
    last = story.messages[-1]
    if last.message_id != story.end.message_id or last.text != story.end.text:
        yield f"the transcript ends with {last.text!r}, and the run with {story.end.text!r}"
    if last.finish_reason != story.end.finish_reason:
        yield f"the transcript ends {last.finish_reason}, and the run {story.end.finish_reason}"
    if story.run.state is RunState.CANCELLED and last.finish_reason is not FinishReason.CANCELED:
        yield f"the last message of a cancelled run ends {last.finish_reason}"
