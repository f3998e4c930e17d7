"""Code that a page only excerpts is code of programs that are built and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "test-servers.md"
FOLDERS = {"go": "go", "ts": "typescript", "java": "java"}


def _lines(text: str) -> str:
    """The code without its indentation, which differs by where it stands."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


@pytest.mark.parametrize("language", FOLDERS)
def test_the_helper_of_a_language_is_shown_as_a_program_uses_it(language: str) -> None:
    folder = ROOT / "tests" / "packages" / FOLDERS[language]
    programs = [_lines(path.read_text()) for path in folder.rglob(f"*.{language}")]
    shown = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert shown
    for excerpt in shown:
        assert any(_lines(excerpt) in program for program in programs), excerpt
