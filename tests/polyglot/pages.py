"""The pages of the documentation: what a reader is asked to do, and what appears then."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

WRITE = re.compile(r"Write this to `([^`]+)`:$")

NOT_RUN = re.compile(r"<!-- not run: (.+) -->$")
"""Right before a block: the walk skips it, for this reason. Readers do not see it."""

FAILURE = re.compile(r"^(?:ERROR:|Error: |exit status [1-9])", re.MULTILINE)
"""Marks an expected output whose command must fail."""

ANYTHING = "..."


@dataclass(frozen=True, slots=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class File:
    """A file to write; its path is relative to the reader's folder."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Commands:
    """Commands to type."""

    text: str


@dataclass(frozen=True, slots=True)
class Expected:
    """Output to see."""

    text: str

    @property
    def of_failure(self) -> bool:
        """Whether its command must fail."""
        return FAILURE.search(self.text) is not None

    @property
    def lines(self) -> list[str]:
        """Its lines."""
        return self.text.splitlines()


@dataclass(frozen=True, slots=True)
class Shown:
    """A block that is only read: a picture, or one that the page marks as not run."""

    reason: str
    language: str


Step: TypeAlias = Prose | File | Commands | Expected | Shown

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def steps_of(page: str) -> Iterator[Step]:
    """The steps of a page, in order."""
    end = 0
    last: Step | None = None
    for block in _BLOCK.finditer(page):
        prose = _paragraphs(page[end : block.start()])
        yield from map(Prose, prose)
        if isinstance(last, Shown) and not prose and block[1] == "text":
            step: Step = last  # The output of what is not run.
        else:
            step = _step(block[1], block[2], prose[-1] if prose else "")
        yield step
        end, last = block.end(), step
    yield from map(Prose, _paragraphs(page[end:]))


def _step(language: str, text: str, before: str) -> Step:
    if named := WRITE.search(before):
        return File(named[1], text)
    if marked := NOT_RUN.search(before):
        return Shown(marked[1], language)
    if language == "mermaid":
        return Shown("a picture", language)
    assert language in {"sh", "text"}, f"the page does not say what to do with this:\n{text}"
    return Commands(text) if language == "sh" else Expected(text)


def _paragraphs(text: str) -> list[str]:
    """The paragraphs, each in one line."""
    return [" ".join(each.split()) for each in re.split(r"\n\s*\n", text) if each.strip()]


# --- Values that differ each time -----------------------------------------------------------------

_DIFFERS: Mapping[str, str] = {
    "any": r"\.\.\.",
    "run": r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "short": r"\b[0-9a-f]{8}-[0-9a-f]{4}\b",
    "time": r"\d{4}[-/]\d\d[-/]\d\d[ T]\d\d:\d\d:\d\d(?:\.\d+)?Z?",
    "clock": r"\b\d\d:\d\d:\d\d\b",
    "bytes": r"\b\d+ bytes",
    "cursor": r"\bA[\w-]{23,}={0,2}",
    "number": r"\d+\.\d+",
    "space": r"[ \t]+",
}
_TAKES: Mapping[str, str] = {
    **_DIFFERS,
    "any": r".*",
    # It is longer if two runs began in the same millisecond.
    "short": r"[0-9a-f]{8}-[0-9a-f]{4}[0-9a-f-]*",
}
_TOKEN = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _DIFFERS.items()))

KEPT = ("run", "short", "cursor")
"""Kinds that later commands may contain: the walk replaces the page's value by its own."""


class Samples:
    """The example values of a page, and the values that the walk got instead."""

    def __init__(self) -> None:
        self._own: dict[str, str] = {}

    def exchanged(self, command: str) -> str:
        """The command with the values of this walk."""
        for sample, own in self._own.items():
            command = command.replace(sample, own)
        return command

    def learn(self, expected: Sequence[str], said: Sequence[str]) -> bool:
        """Whether the lines match; remembers their values for the page's examples.

        A line of the page that is `...` stands for any number of lines.
        """
        patterns = [_pattern(line) for line in expected]
        whole = "".join(pattern for pattern, _ in patterns)
        found = re.fullmatch(whole, "".join(f"{line}\n" for line in said))
        if found is None:
            return False
        samples = [sample for _, some in patterns for sample in some]
        for sample, own in zip(samples, found.groups(), strict=True):
            self._own.setdefault(sample, own)
        return True


def _pattern(line: str) -> tuple[str, list[str]]:
    """The pattern for a line, with a group for each example value in it."""
    if (line := line.strip()) == ANYTHING:
        return r"(?:.*\n)*?", []
    parts: list[str] = []
    samples: list[str] = []
    end = 0
    for token in _TOKEN.finditer(line):
        parts.append(re.escape(line[end : token.start()]))
        kind = str(token.lastgroup)
        parts.append(f"({_TAKES[kind]})" if kind in KEPT else f"(?:{_TAKES[kind]})")
        samples += [token[0]] if kind in KEPT else []
        end = token.end()
    parts.append(re.escape(line[end:]))
    return rf"[ \t]*{''.join(parts)}[ \t]*\n", samples


def found_in_order(expected: Sequence[str], said: Sequence[str], samples: Samples) -> int | None:
    """The number of lines up to the last expected one, None if one is missing. Skips others.

    A line that is expected several times in a row may appear any number of times.
    """
    at = 0
    for line, _ in groupby(expected):
        if line.strip() == ANYTHING:
            continue
        while at < len(said) and not samples.learn([line], [said[at]]):
            at += 1
        if at == len(said):
            return None
        at += 1
    return at
