"""Changes the access file: adds tokens and removes them, and leaves the rest as it is written."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from runlane_server.access.caller import NAME_FORM, TENANT_FORM, Role, is_name, is_tenant
from runlane_server.access.entries import BadEntry, Entries, Places, parse
from runlane_server.access.tokens import Token, make


class CannotEdit(Exception):
    """The file is as it was; the message says why, in one line."""


def add(path: Path, name: str, *, tenant: str, role: Role, expires: datetime | None = None) -> str:
    """Writes a new token into the file, which is made if need be; returns the token.

    Nobody can find it out from the file again. Raises CannotEdit.
    """
    if not is_name(name):
        raise CannotEdit(f"NAME is {NAME_FORM}")
    if not is_tenant(tenant):
        raise CannotEdit(f"--tenant is {TENANT_FORM}")
    text, token_id, sha256 = make()
    lines = [
        "[[token]]",
        *(f'{key} = "{value}"' for key, value in (("name", name), ("tenant", tenant))),
        f'role = "{role.value}"',
        f'id = "{token_id}"',
        f'sha256 = "{sha256}"',
    ]
    if expires is not None:
        lines.append(f"expires = {expires.astimezone(UTC).isoformat(timespec='seconds')}")

    def added(before: str, entries: Entries) -> str:
        if any(token.caller.name == name for token in entries.tokens):
            raise CannotEdit(f"{path}: there is a token {name!r} already; revoke it first")
        gap = "\n\n" if before.strip() else ""
        return before.rstrip() + gap + "\n".join(lines) + "\n"

    with _edited(path) as edit:
        edit(added)
    return text


def remove(path: Path, name: str) -> None:
    """Takes a token out of the file. Raises CannotEdit."""

    def removed(before: str, entries: Entries) -> str:
        known = [token.caller.name for token in entries.tokens]
        if name not in known:
            raise CannotEdit(f"{path}: there is no token {name!r}")
        block = Places(before).block("token", known.index(name))
        after = before if block is None else _without(before, *block)
        left = [token for token in entries.tokens if token.caller.name != name]
        # The lines were found by their looks; what a parser makes of the rest is the proof.
        if not _says(after, replace(entries, tokens=left), path.parent):
            raise CannotEdit(f"{path}: remove the token {name!r} by hand; it is written unusually")
        return after

    with _edited(path) as edit:
        edit(removed)


def tokens(path: Path) -> list[Token]:
    """The tokens in the file. Raises CannotEdit."""
    return list(_read(path)[1].tokens)


def _without(text: str, first: int, end: int) -> str:
    lines = text.splitlines(keepends=True)
    # What stands right above the next table is a comment on that one.
    while end > first and end < len(lines) and lines[end - 1].lstrip().startswith("#"):
        end -= 1
    return "".join(lines[:first] + lines[end:])


def _says(text: str, entries: Entries, folder: Path) -> bool:
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
    """Nobody else edits the file meanwhile; what is made of it replaces it at once."""
    path = path.resolve()  # a link stays one

    def edit(change: Callable[[str, Entries], str]) -> None:
        before, entries = _read(path) if path.exists() else ("", Entries())
        after = change(before, entries)
        parse(after, path.parent)
        _replace(path, after)

    try:
        # The folder is what is locked: the file is another one after each edit.
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
    """Writes a file that nobody but its owner, and those who could before, can read."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            _like_before(file.fileno(), path)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)  # noqa: PTH105
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)  # noqa: PTH108
        raise


def _like_before(file: int, path: Path) -> None:
    """A server that could read the file still can, whoever edits it. New ones have mode 0600."""
    try:
        before = path.stat()
    except FileNotFoundError:
        return
    os.fchmod(file, before.st_mode & 0o640 | 0o600)
    with suppress(PermissionError):
        os.fchown(file, before.st_uid, before.st_gid)
