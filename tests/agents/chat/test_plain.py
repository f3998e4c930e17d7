"""Chunks that are not parsed are read as if they were."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from runlane_server.agents.chat import plain
from runlane_server.agents.chat.plain import Odd, PlainAnswer

TEXTS = (
    *("word ", "<think>", "</think>", "", "ä🙂", "stop", "content"),
    *('"', "\\", "\n", "\x00", "\x7f", "\u2028", '","content":"', '"}', "}]}"),
)
"""Texts that are written with and without escapes, and some that look like JSON."""

SEEDS = 400


def _chunk(rng: random.Random) -> str:
    """A chunk that is plain, nearly plain, or no JSON at all."""
    delta: dict[str, Any] = {"content": rng.choice(TEXTS)}
    chunk: dict[str, Any] = {
        "id": "1",
        "created": 17,
        "model": rng.choice(("m", "m", "m", "n")),
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }
    _twist(rng, chunk, delta)
    return _spelled(rng, json.dumps(chunk, ensure_ascii=rng.random() < 0.5))


def _twist(rng: random.Random, chunk: dict[str, Any], delta: dict[str, Any]) -> None:
    match rng.randrange(24):
        case 0:
            delta["reasoning"] = rng.choice(TEXTS)
        case 1:
            chunk["content"] = delta["content"]
        case 2:
            chunk["choices"].append({"delta": {"content": "other"}})
        case 3:
            chunk["choices"][0]["finish_reason"] = "stop"
        case 4:
            chunk["usage"] = {"prompt_tokens": 1, "completion_tokens": 2}
        case 5:
            delta["role"] = "content"
        case 6:
            chunk["choices"] = []
        case 7:
            del delta["content"]
            chunk["content"] = "word "


def _spelled(rng: random.Random, data: str) -> str:
    match rng.randrange(24):
        case 0:
            data = data.replace('"content"', r'"cont\u0065nt"', 1)
        case 1:
            data = data.replace('": "', '":"')
        case 2:
            data = data.replace("word ", 'word","content":"x', 1)
        case 3:
            data = data[:-1]
    return data


def _readings(answer: PlainAnswer, chunks: list[str]) -> list[object]:
    """The texts that chunks add, up to the first odd one, and the answer then."""
    found: list[object] = []
    for data in chunks:
        try:
            found.append(answer.take(data))
        except Odd:
            found.append(Odd)
            break
    state = answer.model, answer.usage, answer.finish_reason, answer.has_text, answer.deltas
    return [*found, state, answer.replayed()]


def test_frames_change_nothing_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = "<think>", "</think>"
    for seed in range(SEEDS):
        rng = random.Random(seed)  # noqa: S311
        kinds = [_chunk(rng) for _ in range(5)]
        chunks = rng.choices(kinds, k=30)
        found = _readings(PlainAnswer(tags), chunks)
        with monkeypatch.context() as without_frames:
            without_frames.setattr(plain, "MAX_FRAMES", 0)
            expected = _readings(PlainAnswer(tags), chunks)
        assert found == expected, (seed, chunks)


@pytest.mark.parametrize(
    "choice",
    [
        r'{"delta": {"cont\u0065nt": "a"}}',
        '{"delta": {"content": "a"}}',
        '{"delta": {"reasoning": "a"}}',
        '{"delta": {}}, {"delta": {"content": "a"}}',
    ],
)
@pytest.mark.parametrize("around", ['{"content": "TEXT", CHOICES}', '{CHOICES, "content": "TEXT"}'])
def test_only_the_content_of_the_first_choice_is_read(choice: str, around: str) -> None:
    chunk = around.replace("CHOICES", f'"choices": [{choice}]')
    answer = PlainAnswer(("", ""))
    first, second = (answer.take(chunk.replace("TEXT", text)) for text in "ab")
    assert first == second


def _parsed(monkeypatch: pytest.MonkeyPatch, answer: PlainAnswer, chunks: list[str]) -> int:
    """How many chunks of an answer are parsed."""
    calls: list[str] = []
    parse = PlainAnswer._parse

    def counted(answer: PlainAnswer, data: str) -> list[Any]:
        calls.append(data)
        return parse(answer, data)

    monkeypatch.setattr(PlainAnswer, "_parse", counted)
    for data in chunks:
        answer.take(data)
    return len(calls)


def _of(text: str, **others: object) -> str:
    choice = {"delta": {"content": text}, "finish_reason": None}
    return json.dumps({"model": "m", **others, "choices": [choice]})


@pytest.mark.parametrize(("noise", "parsed"), [("", 1), ("{n}", 100)])
def test_only_the_first_of_equal_chunks_is_parsed(
    noise: str, parsed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = PlainAnswer(("", ""))
    chunks = [_of(f"word{n} ", noise=noise.format(n=n)) for n in range(100)]
    assert _parsed(monkeypatch, answer, chunks) == parsed
    assert answer.deltas == 1
    assert answer._frames <= plain.MAX_FRAMES


@pytest.mark.parametrize("escaped", ["\n", '"', "\\", "\t", "\u2028", "", "\n\n"])
def test_a_text_with_an_escape_has_only_its_own_chunk_parsed(
    escaped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = PlainAnswer(("", ""))
    chunks = [_of(text) for _ in range(100) for text in ("word ", escaped)]
    assert _parsed(monkeypatch, answer, chunks) == 101


@pytest.mark.parametrize(
    "between",
    [
        {"model": "n"},
        {"usage": {"prompt_tokens": 1, "completion_tokens": 2}},
        {"choices": [{"delta": {"content": "\n"}, "finish_reason": "stop"}]},
    ],
)
def test_a_chunk_is_parsed_again_after_one_that_says_something_else(
    between: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"model": "m", "usage": {"prompt_tokens": 5, "completion_tokens": 6}}
    first, other = _of("word ", **said), _of("\n", **between)
    if "choices" in between:
        other = json.dumps({"model": "m", **between})
    answer = PlainAnswer(("", ""))
    assert _parsed(monkeypatch, answer, [first, other, first]) == 3
    assert answer.model == "m"
    assert answer.usage.input_tokens == 5
