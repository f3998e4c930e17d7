"""A planted fault: a server whose source has one piece replaced."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import runlane_server

SOURCE = Path(runlane_server.__file__).parent


@dataclass(frozen=True, slots=True)
class Edit:
    """Replaces `old` by `new` in a file; without `old`, appends `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault: the rules that it breaks, and the changes of the source."""

    name: str
    rules: tuple[int, ...]
    edits: tuple[Edit, ...]
    durable: bool = False
    sound: tuple[int, ...] = (2, 12)
    """Rules that still hold: they show that the server works at all."""
    case: str = ""
    """The beginning of the name of a case that must find it; empty: any case of its rules."""

    def build(self, folder: Path) -> Path:
        """Writes the faulty server; returns the folder for the import path."""
        shutil.copytree(
            SOURCE, folder / "runlane_server", ignore=shutil.ignore_patterns("__pycache__")
        )
        for edit in self.edits:
            path = folder / "runlane_server" / edit.file
            text = path.read_text()
            assert not edit.old or text.count(edit.old) == 1, f"{edit.file}: {edit.old}"
            path.write_text(text.replace(edit.old, edit.new) if edit.old else text + edit.new)
        return folder
