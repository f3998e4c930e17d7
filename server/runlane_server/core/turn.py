"""Turns the events of a run into the messages of its turn.

The same code serves a run that completes, one that is cancelled in mid-stream, and one whose node
was lost and whose events are read from the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from runlane_server.core.artifact import ArtifactDraft, ArtifactPiece, InvalidPiece
from runlane_server.core.model import (
    MAX_COMPLETE_TEXT_BYTES,
    EventBody,
    FinishReason,
    Folded,
    KeptPart,
    Part,
    Reasoning,
    ReasoningDelta,
    ResultPart,
    Role,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
)

PART_CHARS = 1 << 18
"""Maximum length of a part's text, so that a page of a transcript can end between two parts."""

CUT_OFF = "The call was cut off by the end of the turn."


class DraftMessage(NamedTuple):
    """A message of a turn that is not yet written to the transcript.

    `run_id` is empty if the message belongs to the run that owns the turn. The prompt of a folded
    run carries the id of that run.
    """

    role: Role
    parts: tuple[Part, ...] = ()
    run_id: str = ""
    finish_reason: FinishReason | None = None


class InvalidAgentEvent(Exception):
    """The agent's events do not form a turn: a result without a call, a reused call id, or a piece
    of an artifact that cannot be appended."""


class TurnDraft:
    """Collects the output of an agent into messages, in order.

    An assistant message collects text, reasoning and tool calls; the results of its calls form a
    tool message. Output after results, or after a folded prompt, begins the next assistant message.

    The text of a message beyond `MAX_COMPLETE_TEXT_BYTES` is needed by no RunComplete, so it may be
    stored part by part while the turn goes on: see `take_surplus`.
    An artifact stands where its first piece came.
    """

    def __init__(self) -> None:
        self._done: list[DraftMessage] = []
        self._role = Role.ASSISTANT
        self._parts: list[Part] = []
        self._pieces: list[str] = []
        self._chars = 0
        self._kind: type[Text | Reasoning] = Text
        self._cut: dict[type[Text | Reasoning], int] = {}
        self._surplus: list[Text | Reasoning] = []
        self._open: dict[str, ToolCall] = {}
        self._seen: set[str] = set()
        self._artifacts: ArtifactDraft | None = None

    def add(self, body: EventBody) -> None:
        """Adds one event. Raises InvalidAgentEvent, and then changes nothing."""
        match body:
            case TextDelta(text):
                self._add_text(Text, text)
            case ReasoningDelta(text):
                self._add_text(Reasoning, text)
            case ToolCall():
                self._add_call(body)
            case ToolResult():
                self._add_result(body)
            case ArtifactPiece():
                self._add_piece(body)
            case Folded(run_id, _):
                self._end_message()
                self._done.append(DraftMessage(Role.USER, run_id=run_id))
            case _:
                pass

    def messages(self) -> tuple[DraftMessage, ...]:
        """The messages so far, including the unfinished one."""
        messages = (*self._done, *self._unfinished())
        artifacts = self._artifacts
        if artifacts is None:
            return messages
        return tuple(
            message._replace(parts=tuple(_joined(part, artifacts) for part in message.parts))
            for message in messages
        )

    def take_surplus(self) -> Sequence[Text | Reasoning]:
        """The full parts since the last call that no RunComplete needs."""
        taken, self._surplus = self._surplus, []
        return taken

    def replace(self, part: Text | Reasoning, kept: KeptPart) -> None:
        """Puts the place of a stored part in place of the part."""
        for n in reversed(range(len(self._parts))):
            if self._parts[n] is part:
                self._parts[n] = kept
                return
        for n in reversed(range(len(self._done))):
            message = self._done[n]
            if any(it is part for it in message.parts):
                parts = tuple(kept if it is part else it for it in message.parts)
                self._done[n] = message._replace(parts=parts)
                return

    def _add_text(self, kind: type[Text | Reasoning], text: str) -> None:
        self._begin(Role.ASSISTANT)
        if kind is not self._kind:
            self._end_part()
            self._kind = kind
        self._pieces.append(text)
        self._chars += len(text)
        if self._chars >= PART_CHARS:
            self._cut_full_parts()

    def _cut_full_parts(self) -> None:
        """Keeps only what does not fill a part: the end of a long turn costs no more than that of a
        short one."""
        text = "".join(self._pieces)
        full = len(text) // PART_CHARS * PART_CHARS
        parts = [self._kind(text[at : at + PART_CHARS]) for at in range(0, full, PART_CHARS)]
        self._parts += parts
        for part in parts:
            if self._cut.get(self._kind, 0) > MAX_COMPLETE_TEXT_BYTES:
                self._surplus.append(part)
            self._cut[self._kind] = self._cut.get(self._kind, 0) + PART_CHARS
        self._drop_pieces()
        if full < len(text):
            self._pieces.append(text[full:])
            self._chars = len(text) - full

    def _add_call(self, call: ToolCall) -> None:
        if call.tool_call_id in self._seen:
            raise InvalidAgentEvent(f"tool call id {call.tool_call_id!r} is used twice")
        self._begin(Role.ASSISTANT)
        self._end_part()
        self._seen.add(call.tool_call_id)
        self._open[call.tool_call_id] = call
        self._parts.append(call)

    def _add_result(self, result: ToolResult) -> None:
        if result.tool_call_id not in self._open:
            raise InvalidAgentEvent(f"no open tool call has the id {result.tool_call_id!r}")
        self._begin(Role.TOOL)
        del self._open[result.tool_call_id]
        self._parts.append(result)

    def _add_piece(self, piece: ArtifactPiece) -> None:
        if self._artifacts is None:
            self._artifacts = ArtifactDraft()
        try:
            is_new = self._artifacts.add(piece)
        except InvalidPiece as error:
            raise InvalidAgentEvent(str(error)) from error
        if is_new:
            self._begin(Role.ASSISTANT)
            self._end_part()
            self._parts.append(piece)

    def _begin(self, role: Role) -> None:
        if role is not self._role:
            self._end_message()
            self._role = role

    def _end_part(self) -> None:
        self._parts += self._unfinished_parts()
        self._drop_pieces()

    def _drop_pieces(self) -> None:
        self._pieces.clear()
        self._chars = 0

    def _end_message(self) -> None:
        self._done += self._unfinished()
        self._parts.clear()
        self._cut.clear()
        self._drop_pieces()
        self._role = Role.ASSISTANT

    def _unfinished(self) -> list[DraftMessage]:
        parts = (*self._parts, *self._unfinished_parts())
        return [DraftMessage(self._role, parts)] if parts else []

    def _unfinished_parts(self) -> list[Part]:
        text = "".join(self._pieces)
        return [self._kind(text[at : at + PART_CHARS]) for at in range(0, len(text), PART_CHARS)]


def close(
    messages: tuple[DraftMessage, ...], finish_reason: FinishReason
) -> tuple[DraftMessage, ...]:
    """Closes a turn so that it is valid history for the next one (R14 to R16).

    The last assistant message carries the finish reason; an empty one is added if there is none.
    The results of a message's calls follow it directly; a call without a result gets an error.
    """
    if len(messages) == 1 and _is_plain_answer(messages[0]):
        role, parts, run_id, _ = messages[0]
        return (DraftMessage(role, parts, run_id, finish_reason),)
    closed, cut_off = _answer_calls(messages)
    if not closed or _needs_closing_message(closed[-1], cut_off):
        closed.append(DraftMessage(Role.ASSISTANT))
    last = max(n for n, message in enumerate(closed) if message.role is Role.ASSISTANT)
    for n, message in enumerate(closed):
        if message.role is Role.ASSISTANT:
            reason = finish_reason if n == last else _reason_within_turn(message)
            closed[n] = message._replace(finish_reason=reason)
    return tuple(closed)


def with_result(messages: tuple[DraftMessage, ...], result: str) -> tuple[DraftMessage, ...]:
    """Adds the structured result to the last assistant message of a closed turn."""
    if not result:
        return messages
    last = max(n for n, message in enumerate(messages) if message.role is Role.ASSISTANT)
    message = messages[last]._replace(parts=(*messages[last].parts, ResultPart(result)))
    return (*messages[:last], message, *messages[last + 1 :])


def result_of(parts: Iterable[Part]) -> str:
    """The structured result in the parts of a message; empty if there is none."""
    return next((part.json for part in parts if isinstance(part, ResultPart)), "")


def final_text(messages: Iterable[DraftMessage]) -> str:
    """The text of the last assistant message, as `text_of` returns it."""
    last: tuple[Part, ...] = ()
    for message in messages:
        if message.role is Role.ASSISTANT:
            last = message.parts
    return text_of(last)


def text_of(parts: Iterable[Part]) -> str:
    """The text of a message; of a long one only the first parts, which together have more than
    `MAX_COMPLETE_TEXT_BYTES`."""
    texts: list[str] = []
    chars = 0
    for part in parts:
        if isinstance(part, Text):
            texts.append(part.text)
            chars += len(part.text)
            if chars > MAX_COMPLETE_TEXT_BYTES:
                break
    return "".join(texts)


def _answer_calls(messages: Iterable[DraftMessage]) -> tuple[list[DraftMessage], frozenset[str]]:
    """Moves each result behind its call, where models expect it.

    Results may arrive late, after more output or a folded prompt. Returns the messages, and the ids
    of the calls that have no result.
    """
    given = list(messages)
    results = {
        part.tool_call_id: part
        for message in given
        for part in message.parts
        if isinstance(part, ToolResult)
    }
    answered: list[DraftMessage] = []
    cut_off: set[str] = set()
    for message in given:
        if message.role is Role.TOOL:
            continue
        answered.append(message)
        calls = _calls(message)
        cut_off.update(call.tool_call_id for call in calls if call.tool_call_id not in results)
        if calls:
            answers = (results.get(call.tool_call_id) or _cut_off(call) for call in calls)
            answered.append(DraftMessage(Role.TOOL, tuple(answers)))
    return answered, frozenset(cut_off)


def _cut_off(call: ToolCall) -> ToolResult:
    return ToolResult(call.tool_call_id, call.name, CUT_OFF, is_error=True)


def _needs_closing_message(last: DraftMessage, cut_off: frozenset[str]) -> bool:
    """Whether the turn needs another assistant message to carry the finish reason.

    It does if the last one was followed by complete results or by a folded prompt.
    """
    if last.role is Role.TOOL:
        return not any(
            isinstance(part, ToolResult) and part.tool_call_id in cut_off for part in last.parts
        )
    return last.role is Role.USER


def _reason_within_turn(message: DraftMessage) -> FinishReason:
    return FinishReason.TOOL_CALLS if _calls(message) else FinishReason.STOP


def _is_plain_answer(message: DraftMessage) -> bool:
    """Whether the message ends a turn without further work, as in most turns."""
    return message.role is Role.ASSISTANT and not _calls(message)


def _joined(part: Part, artifacts: ArtifactDraft) -> Part:
    return artifacts.whole(part.artifact_id) if isinstance(part, ArtifactPiece) else part


def _calls(message: DraftMessage) -> list[ToolCall]:
    return [part for part in message.parts if isinstance(part, ToolCall)]
