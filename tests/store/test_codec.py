"""The hand-written encoder produces the same text as the library's."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from runlane_server.core.artifact import ArtifactKind, ArtifactPiece
from runlane_server.core.model import (
    NO_USAGE,
    CustomEvent,
    EventBody,
    FinishReason,
    Part,
    Reasoning,
    RunComplete,
    RunError,
    RunState,
    Started,
    StepResult,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)
from runlane_server.store.codec import (
    LARGE_CHARS,
    decode_body,
    decode_complete,
    decode_parts,
    encode_body,
    encode_complete,
    encode_parts,
)

NASTY = 'q"uote \\ back\n\t\x00\x1f\x7f\u2028 ünïcode \N{GRINNING FACE} </script> {"a":[1]}'


TEXT_PIECE = ArtifactPiece("a", NASTY, "text/csv", ArtifactKind.TEXT, NASTY, True, False)
DATA_PIECE = ArtifactPiece("a", "", "image/png", ArtifactKind.DATA, b"\x00\x01\xff")


def dumps(value: object) -> str:
    """The library's own words."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize("started_at", [None, 5])
@pytest.mark.parametrize("error", [None, RunError("REASON", NASTY)])
@pytest.mark.parametrize("usage", [NO_USAGE, Usage(1, 2, 3, 4, 5)])
@pytest.mark.parametrize("result", ["", json.dumps(NASTY)])
def test_complete(
    started_at: int | None, error: RunError | None, usage: Usage, result: str
) -> None:
    complete = RunComplete(
        session_id=NASTY,
        run_id="r" + NASTY,
        accept_seq=7,
        state=RunState.FAILED,
        finish_reason=FinishReason.ERROR,
        message_id="m" + NASTY,
        text="t" + NASTY,
        text_truncated=error is not None,
        error=error,
        folded_into=NASTY,
        usage=usage,
        attempt=2,
        cancel_reason="c" + NASTY,
        accepted_at=1_700_000_000_000_000,
        started_at=started_at,
        ended_at=1_700_000_000_000_009,
        result=result,
    )
    text = encode_complete(complete)
    fields = complete._asdict()
    fields["error"] = None if error is None else [error.reason, error.message]
    fields["usage"] = [
        usage.input_tokens,
        usage.output_tokens,
        usage.cache_read_tokens,
        usage.cache_write_tokens,
        usage.requests,
    ]
    if not result:
        del fields["result"]  # as an earlier version wrote it
    assert text == dumps(fields)
    assert decode_complete(text) == complete


@pytest.mark.parametrize(
    ("body", "kind", "fields"),
    [
        (TextDelta(NASTY), "text_delta", [NASTY]),
        (Started(3), "started", [3]),
        (ToolResult("i", "n", NASTY, True), "tool_result", ["i", "n", NASTY, True]),
        (StepResult(NASTY, "[1]"), "step", [NASTY, "[1]"]),
        (CustomEvent(NASTY, "[1]"), "custom", [NASTY, "[1]"]),
        (TEXT_PIECE, "artifact", ["a", NASTY, "text/csv", "text", NASTY, True, False]),
        (DATA_PIECE, "artifact", ["a", "", "image/png", "data", "AAH/", False, True]),
    ],
)
def test_body(body: EventBody, kind: str, fields: list[object]) -> None:
    assert encode_body(body) == (kind, dumps(fields))
    assert decode_body(kind, dumps(fields)) == body


def test_parts() -> None:
    parts: tuple[Part, ...] = (Text(NASTY), Reasoning(NASTY), ToolCall("i", "n", "{}"), Text(""))
    text = encode_parts(parts)
    assert text == dumps(
        [["text", NASTY], ["reasoning", NASTY], ["tool_call", "i", "n", "{}"], ["text", ""]]
    )
    assert decode_parts(text) == parts
    assert encode_parts(()) is None


LARGE: tuple[Part, ...] = (
    *(Text(NASTY + "x" * LARGE_CHARS) for _ in range(2)),
    Reasoning("]"),
    ToolCall("1", "look", NASTY),
    ToolResult("1", "look", "],[", is_error=True),
)


def test_a_large_message_is_decoded_as_a_small_one_is() -> None:
    text = encode_parts(LARGE)
    assert text is not None
    assert len(text) > LARGE_CHARS
    assert decode_parts(text) == LARGE


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: text + "]",
        lambda text: "x" + text[1:],
        lambda text: text[:-2] + ",]",
        lambda text: text[:-1] + "}",
        lambda text: text.replace("],[", "];[", 1),
    ],
)
def test_a_large_message_that_is_damaged_is_refused(damage: Callable[[str], str]) -> None:
    text = encode_parts(LARGE)
    assert text is not None
    with pytest.raises(ValueError, match=r"."):
        decode_parts(damage(text))
