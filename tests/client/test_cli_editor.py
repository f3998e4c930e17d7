"""Editors that fail leave a clear error, and the text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from runlane.cli.editor import Draft

APPENDS = """sh -c 'printf more >> "$0"'"""


@pytest.fixture
def draft(monkeypatch: pytest.MonkeyPatch) -> Iterator[Draft]:
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    draft = Draft("text")
    yield draft
    draft.discard()


@pytest.mark.parametrize(
    ("editor", "error"),
    [
        ("rm", "No such file"),
        ("false", "Editing failed"),
        ("no-such-editor", "Editing failed"),
        ("vi '", "VISUAL or EDITOR: No closing quotation"),
        ("''", "Editing failed"),
    ],
)
def test_an_editor_that_fails_is_reported(
    draft: Draft, monkeypatch: pytest.MonkeyPatch, editor: str, error: str
) -> None:
    monkeypatch.setenv("VISUAL", editor)
    with pytest.raises(click.ClickException, match=error):
        draft.edit()
    draft.rescue()


@pytest.mark.parametrize("visual", ["", "   ", "\t"])
def test_a_blank_editor_is_none(draft: Draft, monkeypatch: pytest.MonkeyPatch, visual: str) -> None:
    monkeypatch.setenv("VISUAL", visual)
    monkeypatch.setenv("EDITOR", APPENDS)
    assert draft.edit() == "textmore"


def test_blank_editors_leave_that_of_the_system(
    draft: Draft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "sensible-editor"
    program.write_text('#!/bin/sh\nprintf "more$VISUAL$EDITOR" >> "$1"\n')
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("VISUAL", "EDITOR"):
        monkeypatch.setenv(name, "  ")
    assert draft.edit() == "textmore"
