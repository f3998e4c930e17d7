"""Forks of sessions: new sessions that begin with a copy of the transcript of another one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from runlane_server.access.admission import Admission
from runlane_server.access.stored_bytes import StoredBytes
from runlane_server.core.agents import AgentNames
from runlane_server.core.errors import (
    QuotaExceeded,
    SessionBeingDeleted,
    SessionExists,
    SessionNotFound,
)
from runlane_server.core.fork import fork_turn
from runlane_server.core.model import Micros, Origin, Session, SessionKey
from runlane_server.store.base import NewSession, SessionTaken, Stale, Store
from runlane_server.store.copies import CopyPlan
from runlane_server.store.fair_queue import FairSlots
from runlane_server.store.weight import SESSION_BYTES, session_weight

MOST_COPIES = 2
"""Copies that a node makes at a time: an accept may wait for a piece of each."""


class ForkAdmission(NamedTuple):
    """Admits forks by the quotas of the tenant and the agents of the caller, before anything is
    written."""

    admission: Admission
    stored: StoredBytes
    agents: AgentNames
    tenant: str

    def session(self, source: Session) -> None:
        """Admits a fork of a session, before its transcript is measured."""
        if source.agent:
            self.agents.choose(source.agent)
        self._raise(self.admission.session_refusal(self.tenant))

    @contextmanager
    def copy(self, source: Session, size: int) -> Iterator[None]:
        """Admits a copy of `size` bytes that is made meanwhile, and counts it from the beginning:
        forks at the same time have to see it."""
        self._raise(self.admission.storage_refusal(self.tenant, size))
        own = session_weight(source.title, source.metadata)
        with self.stored.adding(self.tenant, SESSION_BYTES + own + size):
            yield

    def _raise(self, refusal: QuotaExceeded | None) -> None:
        if refusal is not None:
            raise refusal


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """A request for a fork; `at_turn` is 0 for the last turn that has finished."""

    source: SessionKey
    new: SessionKey
    at_turn: int

    def is_answered_by(self, session: Session) -> bool:
        """Whether a session is what this request, or an earlier one like it, has created."""
        origin = session.origin
        return (
            origin is not None
            and origin.session_id == self.source.session_id
            and self.at_turn in {0, origin.turn}
        )


class Forks:
    """Makes forks. A caller that goes away ends its wait only; a repeated call joins the copy that
    is still at work."""

    def __init__(self, store: Store, now: Callable[[], Micros]) -> None:
        self._store = store
        self._now = now
        self._at_work: dict[ForkRequest, asyncio.Task[Session]] = {}
        self._slots = FairSlots(MOST_COPIES)

    async def fork(self, request: ForkRequest, admit: ForkAdmission) -> Session:
        """Creates a fork, or returns the one that the same request has created.

        Raises SessionExists, SessionNotFound, TurnNotFound, TurnNotFinished, and what `admit`
        raises.
        """
        task = self._at_work.get(request)
        if task is None:
            task = asyncio.create_task(self._make(request, admit), name="fork")
            self._at_work[request] = task
            task.add_done_callback(lambda done: self._on_done(request, done))
        return await asyncio.shield(task)

    def _on_done(self, request: ForkRequest, task: asyncio.Task[Session]) -> None:
        del self._at_work[request]
        if not task.cancelled():
            task.exception()  # its caller may be gone

    async def _make(self, request: ForkRequest, admit: ForkAdmission) -> Session:
        if (earlier := await self._earlier(request)) is not None:
            return earlier
        source = await self._store.get_session(request.source)
        if source is None:
            raise SessionNotFound.of(request.source.session_id)
        admit.session(source)
        turn = fork_turn(await self._store.load_lane(request.source), request.at_turn)
        plan = await self._store.plan_copy(request.source, turn)
        # A session that replaced the source since has another transcript.
        if plan is None or plan.created_at != source.created_at:
            raise SessionNotFound.of(request.source.session_id)
        at = self._now()
        made = NewSession(request.new, at, source.title, source.metadata, source.agent)
        try:
            with admit.copy(source, plan.size):
                await self._copy(plan, made)
        except SessionTaken:
            # By the same request on another node, or after an answer that was lost.
            if (earlier := await self._earlier(request)) is not None:
                return earlier
            raise SessionBeingDeleted.of(request.new.session_id) from None
        except Stale:
            raise SessionNotFound.of(request.source.session_id) from None
        origin = Origin(request.source.session_id, turn)
        return made.as_session(origin)

    async def _copy(self, plan: CopyPlan, made: NewSession) -> None:
        await self._slots.acquire(plan.tenant)
        try:
            await self._store.fork_session(plan, made)
        finally:
            self._slots.release()

    async def _earlier(self, request: ForkRequest) -> Session | None:
        """The session that an earlier request like this one has created. Raises SessionExists for
        any other session with its id."""
        existing = await self._store.get_session(request.new)
        if existing is not None and not request.is_answered_by(existing):
            raise _exists(request)
        return existing


def _exists(request: ForkRequest) -> SessionExists:
    return SessionExists(f"new_session_id: session {request.new.session_id!r} exists already")
