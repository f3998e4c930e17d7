"""Edits the access file in place: adds and removes tokens and grants, and keeps everything else.

Edits work on lines, and `entries.parse` then proves the result. A library for such edits was tried:
tomlkit 0.15 moves all `[[token]]` tables of a file together, which separates comments from their
tables as soon as another table stands between two tokens.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from runlane_server.access.caller import NAME_FORM, TENANT_FORM, Role, is_name, is_tenant
from runlane_server.access.entries import (
    TOOL_FORM,
    BadEntry,
    Entries,
    LineIndex,
    is_tool,
    parse,
)
from runlane_server.access.grants import Grant
from runlane_server.access.tokens import Token, make
from runlane_server.core.agents import NAME_FORM as AGENT_FORM
from runlane_server.core.agents import is_agent_name


class CannotEdit(Exception):
    """The edit failed and the file is unchanged; the message is one line."""


def add(path: Path, name: str, *, tenant: str, role: Role, expires: datetime | None = None) -> str:
    """Adds a new token to the file, which is created if missing; returns the token.

    The file holds only a hash, so this is the only time the token is known. Raises CannotEdit.
    """
    if not is_name(name):
        raise CannotEdit(f"NAME must be {NAME_FORM}")
    if not is_tenant(tenant):
        raise CannotEdit(f"--tenant must be {TENANT_FORM}")
    text, token_id, sha256 = make()
    lines = [
        "[[token]]",
        *(f'{key} = "{value}"' for key, value in (("name", name), ("tenant", tenant))),
        f'role = "{role.value}"',
        f'id = "{token_id}"',
        f'sha256 = "{sha256}"',
    ]
    if expires is not None:
        lines.append(f"expires = {_iso(expires.timestamp())}")

    _append(path, "token", name, lines)
    return text


def remove(path: Path, name: str) -> None:
    """Removes a token from the file. Raises CannotEdit."""
    _remove(path, "token", name)


def tokens(path: Path) -> list[Token]:
    """Returns the tokens in the file. Raises CannotEdit."""
    return list(_read(path)[1].tokens)


def add_grant(path: Path, grant: Grant) -> None:
    """Adds a standing approval to the file, which is created if missing. Raises CannotEdit."""
    for option, fits, form in (
        ("NAME", is_name(grant.name), NAME_FORM),
        ("--tenant", is_tenant(grant.tenant), TENANT_FORM),
        ("--agent", is_agent_name(grant.agent), AGENT_FORM),
        ("--tool", is_tool(grant.tool), TOOL_FORM),
        ("--set-by", is_name(grant.set_by), NAME_FORM),
    ):
        if not fits:
            raise CannotEdit(f"{option} must be {form}")
    texts = ("name", "tenant", "agent", "tool", "set_by")
    lines = [
        "[[grant]]",
        *(f"{key} = {_toml(getattr(grant, key))}" for key in texts),
        *(f"{key} = {_iso(getattr(grant, key))}" for key in ("set_at", "expires")),
    ]
    if grant.arguments:
        given = grant.arguments.items()
        shown = (f"{_toml(key)} = {_toml(json.loads(text))}" for key, text in given)
        lines.append(f"arguments = {{ {', '.join(shown)} }}")
    _append(path, "grant", grant.name, lines)


def remove_grant(path: Path, name: str) -> None:
    """Removes a standing approval from the file. Raises CannotEdit."""
    _remove(path, "grant", name)


def grants(path: Path) -> list[Grant]:
    """Returns the standing approvals in the file. Raises CannotEdit."""
    return list(_read(path)[1].grants)


def _append(path: Path, kind: str, name: str, lines: Sequence[str]) -> None:
    def append(before: str, entries: Entries) -> str:
        if name in _names(entries, kind):
            raise CannotEdit(f"{path}: {kind} {name!r} already exists; {_REMOVES[kind]} it first")
        gap = "\n\n" if before.strip() else ""
        return before.rstrip() + gap + "\n".join(lines) + "\n"

    with _edited(path) as edit:
        edit(append)


def _remove(path: Path, kind: str, name: str) -> None:
    def cut(before: str, entries: Entries) -> str:
        names = _names(entries, kind)
        if name not in names:
            raise CannotEdit(f"{path}: there is no {kind} {name!r}")
        block = LineIndex(before).block(kind, names.index(name))
        after = before if block is None else _without(before, *block)
        # The lines were found by pattern; parsing the result proves that only this is gone.
        if not _parses_to(after, _left(entries, kind, name), path.parent):
            raise CannotEdit(
                f"{path}: cannot locate the lines of {kind} {name!r}; remove it by hand"
            )
        return after

    with _edited(path) as edit:
        edit(cut)


_REMOVES = {"token": "revoke", "grant": "remove"}


def _names(entries: Entries, kind: str) -> list[str]:
    if kind == "grant":
        return [grant.name for grant in entries.grants]
    return [token.caller.name for token in entries.tokens]


def _left(entries: Entries, kind: str, name: str) -> Entries:
    """The entries without one."""
    if kind == "grant":
        return replace(entries, grants=[one for one in entries.grants if one.name != name])
    return replace(entries, tokens=[one for one in entries.tokens if one.caller.name != name])


def _toml(value: object) -> str:
    """A text, a number, a truth value, or a list of these.

    Strings of JSON that are not reduced to ASCII are strings of TOML too, but for DEL. The others
    would end a line for `LineIndex`.
    """
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _without(text: str, first: int, end: int) -> str:
    lines = text.splitlines(keepends=True)
    # Comments right above the next table belong to that table.
    while end > first and end < len(lines) and lines[end - 1].lstrip().startswith("#"):
        end -= 1
    return "".join(lines[:first] + lines[end:])


def _parses_to(text: str, entries: Entries, folder: Path) -> bool:
    try:
        return parse(text, folder) == entries
    except BadEntry:
        return False


def _read(path: Path) -> tuple[str, Entries]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, parse(text, path.parent)
    except OSError as error:
        raise CannotEdit(f"{path}: {error.strerror}") from None
    except (BadEntry, UnicodeDecodeError) as error:
        raise CannotEdit(f"{path}: {error}") from None


@contextmanager
def _edited(path: Path) -> Iterator[Callable[[Callable[[str, Entries], str]], None]]:
    """Locks out other edits, and replaces the file atomically."""
    path = path.resolve()  # so that a symbolic link is kept

    def edit(change: Callable[[str, Entries], str]) -> None:
        before, entries = _read(path) if path.exists() else ("", Entries())
        after = change(before, entries)
        try:
            parse(after, path.parent)
        except BadEntry as error:
            raise CannotEdit(f"{path}: {error}") from None
        _replace(path, after)

    try:
        # The lock is on the folder, since each edit replaces the file.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield edit
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CannotEdit(f"{path}: {error.strerror}") from None


def _replace(path: Path, text: str) -> None:
    """Replaces a file atomically. Only its owner and its previous readers can read the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            _copy_mode(file.fileno(), path)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)  # noqa: PTH105
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)  # noqa: PTH108
        raise


def _copy_mode(file: int, path: Path) -> None:
    """Keeps owner, group and read access, for a server of another user. New files get mode 0600."""
    try:
        before = path.stat()
    except FileNotFoundError:
        return
    os.fchmod(file, before.st_mode & 0o640 | 0o600)
    with suppress(PermissionError):
        os.fchown(file, before.st_uid, before.st_gid)
