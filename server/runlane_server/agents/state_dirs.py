"""The directories that agents keep for sessions: one for each session of each tenant.

    ROOT/TENANT/SESSION/        of a session, with the notes of the server
        session.json            the store and the ids, which its name does not show as a whole
        home/                   of the agent: HOME and working directory of its programs
    ROOT/.removed/              what is being removed

All have mode 0700. The server removes a directory after its session: at once if the session
is deleted on this node, else at the next sweep. Servers of one store may share ROOT. A server with
another store uses the directories of sessions that it has too, but removes none that it did not
create.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import structlog

from runlane_server.agents.command.removal import Remover
from runlane_server.agents.program_files import read_file, replace_file
from runlane_server.core.model import SessionKey

HOME = "home"
"""Name of the agent's own directory within that of the session."""

SLUG_CHARS = 40
"""Length of the readable part of a name."""

SWEEP_INTERVAL = 600.0
"""Seconds between two looks for directories of sessions that were deleted elsewhere."""

MAX_IDS = 1 << 16
"""Size limit of the file with the ids, in bytes."""

_IDS = "session.json"
_REMOVED = ".removed"
_UNSAFE = re.compile(r"[^a-z0-9_-]+")

log = structlog.get_logger()


class StateDirs:
    """The directories below `root`, which is created if it does not exist. `store` is the name of
    the store that has the sessions. Raises OSError."""

    def __init__(self, root: Path, store: str = "") -> None:
        self._store = store
        self._root = root.absolute()
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remover = Remover()

    def open(self, key: SessionKey) -> Path:
        """The directory of a session, which is created if it does not exist. Raises OSError."""
        path = self._path(key)
        for one in (path.parent, path, path / HOME):
            _make_private(one)
        ids = path / _IDS
        if not _is_file(ids):
            replace_file(ids, json.dumps([self._store, *key]).encode())
        return path

    def remove(self, key: SessionKey) -> None:
        """Removes the directory of a session: its name is free at once, its content soon."""
        path = self._path(key)
        if not path.is_dir():
            return
        with suppress(OSError):  # there may be none any more: others remove it too
            trash = self._root / _REMOVED
            trash.mkdir(mode=0o700, exist_ok=True)
            gone = Path(tempfile.mkdtemp(dir=trash)) / path.name
            path.rename(gone)
            self._remover.remove(gone.parent)

    async def keep_swept(self, exists: Callable[[SessionKey], Awaitable[bool]]) -> None:
        """Removes directories of sessions that no longer exist, again and again; never returns."""
        while True:
            await self.sweep(exists)
            await asyncio.sleep(SWEEP_INTERVAL)

    async def sweep(self, exists: Callable[[SessionKey], Awaitable[bool]]) -> None:
        """Removes the directories of sessions that no longer exist, and what was left half removed.

        A failure of `exists` ends the sweep: a directory is removed only if that is certain.
        """
        for left in await asyncio.to_thread(_children, self._root / _REMOVED):
            self._remover.remove(left)
        for key in await asyncio.to_thread(lambda: list(self._keys())):
            try:
                gone = not await exists(key)
            except Exception as error:  # noqa: BLE001 - after any error nothing may be removed
                log.warning("state directories not swept", error=str(error))
                return
            if gone:
                log.info("state directory of a deleted session removed", session_id=key.session_id)
                self.remove(key)

    def close(self) -> None:
        """Ends the threads once they have removed everything."""
        self._remover.close()

    def _path(self, key: SessionKey) -> Path:
        return self._root / safe_name(key.tenant) / safe_name(key.session_id)

    def _keys(self) -> Iterator[SessionKey]:
        """The sessions of this store that have a directory."""
        for tenant in _children(self._root):
            for path in _children(tenant) if tenant.name != _REMOVED else ():
                with suppress(OSError, ValueError, TypeError, RecursionError):
                    store, *ids = json.loads(read_file(path / _IDS, MAX_IDS))
                    if store == self._store:
                        yield SessionKey(*map(str, ids))


def safe_name(text: str) -> str:
    """A file name for a text of any characters: a readable part, and a digest of the whole."""
    slug = _UNSAFE.sub("_", text.lower())[:SLUG_CHARS]
    return f"{slug}-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"


def _make_private(path: Path) -> None:
    """Creates a directory unless it exists. Raises OSError, also if a link stands there."""
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise NotADirectoryError(f"{path} is not a directory of this server")


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _children(path: Path) -> list[Path]:
    try:
        return sorted(one for one in path.iterdir() if one.is_dir() and not one.is_symlink())
    except OSError:
        return []
