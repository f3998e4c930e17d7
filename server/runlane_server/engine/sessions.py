"""Sessions: created, forked, changed and deleted for their callers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from runlane_server.access.admission import Admission
from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.access.stored_bytes import StoredBytes
from runlane_server.core import lane as rules
from runlane_server.core.errors import (
    CorruptRecord,
    SessionBeingDeleted,
    SessionExists,
    SessionMissing,
)
from runlane_server.core.model import NO_LABELS, Micros, Session, SessionKey
from runlane_server.engine.agent_table import AgentTable
from runlane_server.engine.editing import SessionChange, edit_session
from runlane_server.engine.forking import ForkAdmission, ForkRequest, Forks
from runlane_server.engine.lanes import Lanes
from runlane_server.store.base import IdleSession, NewSession, SessionTaken, Store
from runlane_server.store.weight import SESSION_BYTES, session_growth, session_weight


class Sessions:
    """The sessions of a store. `check_open` raises Draining when none may be created or changed."""

    def __init__(
        self,
        lanes: Lanes,
        store: Store,
        agents: AgentTable,
        admission: Admission,
        stored: StoredBytes,
        *,
        now: Callable[[], Micros],
        new_id: Callable[[], str],
        check_open: Callable[[], None],
    ) -> None:
        self._lanes = lanes
        self._store = store
        self._agents = agents
        self._admission = admission
        self._stored = stored
        self._forks = Forks(store, now)
        self._now = now
        self._new_id = new_id
        self._check_open = check_open
        self.deleted = asyncio.Event()
        """Set by a deletion: something may be left to remove."""

    async def create(
        self,
        session_id: str = "",
        *,
        title: str = "",
        metadata: Mapping[str, str] = NO_LABELS,
        agent: str = "",
        allowed_agents: frozenset[str] | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Session:
        """Creates a session; generates a missing id.

        `agent` is the agent of its runs that name none; `allowed_agents` are those that the caller
        may use, None: all. Raises SessionExists, SessionBeingDeleted, AgentNotFound,
        PermissionDenied, Draining and QuotaExceeded.
        """
        self._check_open()
        if agent:
            self._agents.names.limited_to(allowed_agents).choose(agent)
        refusal = self._admission.session_refusal(tenant)
        if refusal is not None:
            raise refusal
        key = SessionKey(tenant, session_id or self._new_id())
        at = self._now()
        made = NewSession(key, at, title, metadata, agent)
        try:
            await self._store.create_session(made)
        except SessionTaken:
            if not await self.exists(key):  # also if the removal has ended since
                raise SessionBeingDeleted.of(key.session_id) from None
            raise SessionExists(f"session {key.session_id!r} exists already") from None
        self._stored.add(tenant, SESSION_BYTES + session_weight(title, metadata))
        return made.as_session()

    async def fork(
        self,
        session_id: str,
        new_session_id: str = "",
        *,
        at_turn: int = 0,
        allowed_agents: frozenset[str] | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Session:
        """Creates a session that begins with a copy of the transcript of another one.

        The copy ends with turn `at_turn`; 0: the last one that has finished. Title, labels and
        agent are those of the source, which stays as it is. A missing id is generated; with an id,
        a repeated call returns the session that the first one created. `allowed_agents` are those
        that the caller may use, None: all.

        Raises SessionMissing, SessionNotFound, SessionExists, TurnNotFound, TurnNotFinished,
        AgentNotFound, PermissionDenied, Draining and QuotaExceeded.
        """
        if not session_id:
            raise SessionMissing.of("session_id", "is missing")
        self._check_open()
        new = SessionKey(tenant, new_session_id or self._new_id())
        return await self._forks.fork(
            ForkRequest(SessionKey(tenant, session_id), new, at_turn),
            ForkAdmission(
                self._admission, self._stored, self._agents.names.limited_to(allowed_agents), tenant
            ),
        )

    async def update(
        self,
        session_id: str,
        change: SessionChange,
        *,
        etag: str = "",
        allowed_agents: frozenset[str] | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Session:
        """Changes a session; with an `etag`, only if it is still the session that was read.

        Raises SessionMissing, SessionNotFound, EditConflict, AgentNotFound, PermissionDenied,
        Draining and QuotaExceeded.
        """
        if not session_id:
            raise SessionMissing.of("session_id", "is missing")
        self._check_open()
        if change.agent:
            self._agents.names.limited_to(allowed_agents).choose(change.agent)
        refusal = self._admission.session_refusal(tenant)
        if refusal is not None:
            raise refusal
        key = SessionKey(tenant, session_id)
        try:
            before, after = await edit_session(self._store, key, change, etag, self._now)
        finally:
            # Also if the store did not confirm it, and if the caller has gone away.
            self._lanes.invalidate(key)
        self._stored.add(tenant, session_growth(before, after))
        return after

    async def delete(self, session_id: str, *, tenant: str = DEFAULT_TENANT) -> None:
        """Deletes an idle session with its runs and transcript. Terminal events stay in the log.

        It is gone when this returns. The rows of a large one are removed afterwards, and its id is
        taken until then; see `Store.remove_deleted`.

        A session whose records cannot be read is deleted with its open runs, which end as failed.
        Raises SessionMissing, SessionNotFound and SessionBusy.
        """
        if not session_id:
            raise SessionMissing.of("session_id", "is missing")
        key = SessionKey(tenant, session_id)
        await self._remove(key)

    async def delete_unused(self, session: IdleSession) -> None:
        """Deletes a session as `delete` does, unless it was used since it was read.

        Raises SessionNotFound, and SessionBusy if it was used.
        """
        await self._remove(session.key, (session.version, session.accept_seq))

    async def exists(self, key: SessionKey) -> bool:
        """Whether a session is stored, even if it cannot be read."""
        try:
            return await self._store.get_session(key) is not None
        except CorruptRecord:
            return True

    async def _remove(self, key: SessionKey, since: tuple[int, int] | None = None) -> None:
        try:
            await self._lanes.post(key, lambda lane, _: rules.remove(lane, unchanged_since=since))
        except CorruptRecord:
            await self._store.discard(key, self._now())
            self._agents.forget_session(key)
        self.deleted.set()
