"""Edits a text in the person's editor."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import click

from runlane.cli.output import field
from runlane.cli.terminal import echo


def read_stdin(name: str) -> str:
    """Reads the value of a parameter from stdin. Raises UsageError."""
    # sys.stdin is None if it is closed (`<&-`).
    if sys.stdin is None:
        raise click.UsageError(f"{name} is missing; give it as an argument or on stdin")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.UsageError("stdin is not UTF-8; attach binary files with --attach") from error


_VARIABLES = ("VISUAL", "EDITOR")

_EDITORS = ("sensible-editor", "vim", "nano", "vi")


def _editor() -> str:
    """The editor of the person, or one of the system. A blank variable counts as none: with it the
    draft itself would be the program."""
    given = (os.environ.get(name, "") for name in _VARIABLES)
    found = next((editor for editor in given if editor.strip()), None)
    return found or next(filter(shutil.which, _EDITORS), "vi")


class Draft:
    """A text in a file of its own, which only `discard` removes: what a person wrote must outlast
    a failed call."""

    def __init__(self, text: str) -> None:
        descriptor, name = tempfile.mkstemp(prefix="runlane-", suffix=".md")
        self._path = Path(name)
        self._before = text.encode()
        with os.fdopen(descriptor, "wb") as file:
            file.write(self._before)

    def edit(self) -> str | None:
        """Opens VISUAL or EDITOR on it; returns the new text, None if it is the same.

        Raises ClickException if the editor fails, and UsageError if it left what is not UTF-8.
        """
        # An editor such as sensible-editor reads the variables too.
        blank = {name: "" for name in _VARIABLES if os.environ.get(name, "").isspace()}
        try:
            click.edit(filename=str(self._path), editor=_editor(), env=blank)
            after = self._path.read_bytes()
        except ValueError as error:  # a quote without an end
            raise click.ClickException(f"VISUAL or EDITOR: {error}") from error
        except OSError as error:
            raise click.ClickException(f"{field(self._path)}: {error.strerror}") from error
        if after.endswith(b"\n") and not self._before.endswith(b"\n"):
            # Editors end the last line.
            after = after.removesuffix(b"\n").removesuffix(b"\r")
        if after == self._before:
            return None
        try:
            return after.decode()
        except UnicodeDecodeError as error:
            raise click.UsageError(f"{field(self._path)}: is not UTF-8") from error

    def discard(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)

    def rescue(self) -> None:
        """Says where the text stays, if the person changed it."""
        try:
            is_changed = self._path.read_bytes() != self._before
        except OSError:  # the editor removed it, and the error that led here matters more
            return
        if not is_changed:
            self.discard()
        else:
            echo(f"your text is kept in {field(self._path)}", err=True)
