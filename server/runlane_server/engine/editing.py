"""Changes of what callers have said about a session: its title, its labels, its agent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from runlane_server.core.errors import EditConflict, SessionNotFound
from runlane_server.core.model import Micros, Session, SessionKey
from runlane_server.store.base import Store

MAX_EDITS = 100
"""Attempts to change a session that others change at the same time."""


@dataclass(frozen=True, slots=True)
class SessionChange:
    """The new values of a session; None leaves the old one."""

    title: str | None = None
    metadata: Mapping[str, str] | None = None
    agent: str | None = None

    def applied_to(self, session: Session, at: Micros) -> Session:
        """The changed session."""
        return replace(
            session,
            title=session.title if self.title is None else self.title,
            metadata=session.metadata if self.metadata is None else self.metadata,
            agent=session.agent if self.agent is None else self.agent,
            updated_at=max(session.updated_at, at),
        )


async def edit_session(
    store: Store, key: SessionKey, change: SessionChange, etag: str, now: Callable[[], Micros]
) -> tuple[Session, Session]:
    """Changes a session in the store; returns it as it was and as it is.

    With an `etag`, it changes only the session that had it. A change to the values that the session
    has writes nothing. Raises SessionNotFound and EditConflict.
    """
    for _ in range(MAX_EDITS):
        before = await store.get_session(key)
        if before is None:
            raise SessionNotFound.of(key.session_id)
        if etag not in {"", before.etag}:
            break
        after = change.applied_to(before, now())
        if after.etag == before.etag:
            return before, before
        if await store.edit_session(key, before, after):
            return before, after
    raise EditConflict(
        f"session {key.session_id!r} was changed since it was read; read it again",
        metadata={"session_id": key.session_id},
    )
