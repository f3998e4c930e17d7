"""The end of the transcript that a session had before a chat of it began."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from runlane.cli.output import field, finish_text, one_line
from runlane.cli.run_view import artifact_text
from runlane.cli.terminal import for_terminal
from runlane.client import Client
from runlane.types import (
    Artifact,
    Attachment,
    FinishReason,
    Message,
    Part,
    Result,
    Role,
    Text,
    ToolCall,
    ToolResult,
)

MAX_LINES = 40
MAX_LINE_CHARS = 2_000
"""Lines of a text that are shown, and characters of a line; a transcript shall not scroll by for
minutes."""

Line = tuple[str, str]
"""A text and its style."""


_WHOLE = (None, FinishReason.STOP, FinishReason.TOOL_CALLS)
"""The ends of a message that need no mark."""


@dataclass(frozen=True, slots=True)
class Past:
    """The finished turns among the latest ones. `earlier` is the number of those before."""

    turns: Sequence[Sequence[Message]]
    earlier: int

    @property
    def run_ids(self) -> frozenset[str]:
        """The runs whose messages these are."""
        return frozenset(message.run_id for turn in self.turns for message in turn)


async def read_past(
    client: Client, session_id: str, turns: int, unfinished: Container[str]
) -> Past:
    """Reads the latest turns of a session, without those of runs that the stream will show."""
    messages = [each async for each in client.list_messages(session_id, latest_turns=turns)]
    grouped = [tuple(of_turn) for _, of_turn in groupby(messages, lambda each: each.turn)]
    finished = [turn for turn in grouped if _has_ended(turn, unfinished)]
    return Past(finished, max(messages[0].turn - 1, 0) if messages else 0)


def _has_ended(turn: Sequence[Message], unfinished: Container[str]) -> bool:
    if any(message.run_id in unfinished for message in turn):
        return False
    return turn[-1].role is not Role.USER and any(message.finish_reason for message in turn)


def past_lines(past: Past, session_id: str) -> Iterator[Line]:
    """The lines of the turns, as a chat shows them when they happen."""
    if past.earlier:
        turns = "turn" if past.earlier == 1 else "turns"
        yield f"… {past.earlier} earlier {turns}: runlane messages {field(session_id)}", "dim"
    for turn in past.turns:
        for message in turn:
            for part in message.parts:
                yield from _cut(list(_lines_of(message.role, part)))
            if message.finish_reason not in _WHOLE:
                yield finish_text(message.finish_reason), "dim"


def _cut(lines: list[Line]) -> list[Line]:
    if len(lines) <= MAX_LINES:
        return lines
    return [*lines[:MAX_LINES], (f"  … {len(lines) - MAX_LINES} more lines", "dim")]


def _lines_of(role: Role, part: Part) -> Iterator[Line]:
    match part:
        case Text(text) if role is Role.USER:
            yield from ((f"> {line}", "bold cyan") for line in _split(text))
        case Text(text):
            yield from ((line, "") for line in _split(text))
        case ToolCall(name=name, arguments_json=arguments):
            yield f"· {field(name)} {one_line(arguments)}", "dim"
        case ToolResult(name=name, content=content, is_error=is_error):
            outcome = "failed" if is_error else "returned"
            yield f"· {field(name)} {outcome}: {one_line(content)}", "dim"
        case Attachment(name=name, mime_type=mime_type):
            yield f"> [{field(name) or 'attachment'}, {field(mime_type)}]", "bold cyan"
        case Artifact():
            yield artifact_text(part), "dim"
        case Result(json=content):
            yield f"result: {one_line(content)}", "dim"
        case _:
            pass


def _split(text: str) -> list[str]:
    lines = for_terminal(text).splitlines() or [""]
    return [line if len(line) <= MAX_LINE_CHARS else f"{line[:MAX_LINE_CHARS]}…" for line in lines]
