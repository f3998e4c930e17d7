"""Output of a program for a terminal, as the text of an error."""

from __future__ import annotations

import pytest

from runlane_server.agents.text import without_terminal_codes


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("plain: no key\n\tat line 3", "plain: no key\n\tat line 3"),
        ("\x1b[1;31mError:\x1b[0m no key\x1b[K", "Error: no key"),
        ("\x1b[38;2;255;0;0mred\x1b[39m \x9b31mred", "red red"),
        ("\x1b]0;title\x07a \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \x9d0;t\x9cb", "a link b"),
        ("\x1bP1;q~~\x1b\\a\x1b_apc\x1b\\b\x1b^pm\x1b\\c", "abc"),
        ("\x1b(Ba\x1b7b\x1b8c\x1b=d\x1bce", "abcde"),
        ("end\x1b", "end"),
        ("end\x1b[3", "end"),
        ("end\x1b]0;title never ends", "end"),
        ("10%\r50%\r100%\r\ndone\r", "100%\ndone"),
        ("╭─────╮\n│ tool v1 │\n╰─────╯\n=====\n\nfailed", "│ tool v1 │\nfailed"),
        ("a\0b\x08c\x7fd\u202ee\u200bf\ufeffg", "abcdefg"),
        ("é 日本 😀 \ufffd", "é 日本 😀 \ufffd"),
        ("\x1b[2J\x1b[H\n---\n", ""),
    ],
)
def test_only_the_words_are_kept(written: str, text: str) -> None:
    assert without_terminal_codes(written) == text


@pytest.mark.parametrize("part", ["\x1b", "\x1b]", "\x1b[", "\x1b[1;", "\r", "\x1b[0 ", "\x9d"])
def test_hostile_repetition_takes_linear_time(part: str) -> None:
    # Quadratic time would take minutes, and the test would time out.
    assert without_terminal_codes(part * 200_000 + "x")[-1:] in {"", "x"}
