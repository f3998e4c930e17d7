"""The SQL files of a store: its migrations, and its statements by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_MIGRATION = re.compile(r"^(\d{4})_\w+\.sql$")


@dataclass(frozen=True, slots=True)
class Migration:
    """A step of the schema. Steps are numbered from 1."""

    number: int
    sql: str


def migrations(dialect: str) -> tuple[Migration, ...]:
    """The migrations in `<dialect>/sql/NNNN_<name>.sql`, in order."""
    folder = files(__package__) / dialect / "sql"
    found = [
        Migration(int(match[1]), entry.read_text("utf-8"))
        for entry in folder.iterdir()
        if (match := _MIGRATION.match(entry.name))
    ]
    found.sort(key=lambda migration: migration.number)
    if [migration.number for migration in found] != list(range(1, len(found) + 1)):
        raise AssertionError(f"the migrations of {dialect} are not numbered 1, 2, 3, ...")
    return tuple(found)


def statements(dialect: str, file: str = "statements") -> dict[str, str]:
    """The statements in `<dialect>/sql/<file>.sql`, in order, each below its `-- name:` line."""
    text = (files(__package__) / dialect / "sql" / f"{file}.sql").read_text("utf-8")
    _, *pieces = _NAME.split(text)
    names, bodies = pieces[::2], pieces[1::2]
    if len(set(names)) != len(names):
        raise AssertionError(f"two statements of {dialect} have the same name")
    return {name: _bare(body) for name, body in zip(names, bodies, strict=True)}


def _bare(body: str) -> str:
    lines = [line for line in body.splitlines() if not line.startswith("--")]
    return "\n".join(lines).strip().removesuffix(";")
