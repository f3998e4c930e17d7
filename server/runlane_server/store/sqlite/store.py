"""The store in a SQLite file: the embedded default, for one server.

One connection writes and checkpoints (`writer`), another one reads (`reader`). Only one may
checkpoint: before SQLite 3.51.3, two connections that checkpoint can corrupt a database in WAL mode
(sqlite.org/wal.html#walresetbug).
"""

from __future__ import annotations

import asyncio
import sqlite3
from asyncio import Future
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.input import InputRequest, InputState
from runlane_server.core.model import (
    Message,
    Micros,
    Part,
    Prompt,
    Run,
    RunEvent,
    RunKey,
    Session,
    SessionKey,
)
from runlane_server.core.transition import Lane, Transition
from runlane_server.store.base import (
    BusySession,
    DeletedRun,
    DueInput,
    EventFilter,
    IdleSession,
    Listener,
    LogPage,
    MessagePlace,
    NewSession,
    Page,
    Position,
    Stale,
    StoreError,
    WriteObserver,
)
from runlane_server.store.batching import encoded
from runlane_server.store.copies import CopyPlan, MessageSize, PartSize, with_pieces
from runlane_server.store.lane_log import LanePage, LanePlace
from runlane_server.store.lookup import (
    ALL_RUNS,
    ALL_SESSIONS,
    Count,
    ListPlace,
    RunFilter,
    SessionFilter,
)
from runlane_server.store.sqlite import copies, queries
from runlane_server.store.sqlite import lists as sqlite_lists
from runlane_server.store.sqlite import log as sqlite_log
from runlane_server.store.sqlite.file import OpenFile, open_file
from runlane_server.store.sqlite.reader import SqliteReader
from runlane_server.store.sqlite.rows import (
    Compaction,
    Result,
    Unit,
    append_unit,
    commit_unit,
    discard_unit,
    edit_unit,
    forget_unit,
    keep_unit,
    removal_unit,
    session_unit,
)
from runlane_server.store.sqlite.webhooks import SqliteWebhooks
from runlane_server.store.sqlite.writer import SqliteWriter, unavailable
from runlane_server.store.vitals import StoreVitals

P = ParamSpec("P")
T = TypeVar("T")


SESSIONS_PER_READ = 5_000
"""Sessions whose sizes the reader adds up in one read."""


class SqliteStore:
    """A store in the file at `path`, which is created if it is missing. See `base.Store`."""

    def __init__(self, path: Path) -> None:
        self.listener: Listener | None = None
        self.write_observer: WriteObserver | None = None
        self.on_failure: Callable[[StoreError], None] | None = None
        self._path = path
        self._open: OpenFile | None = None
        self._writer: SqliteWriter | None = None
        self._reader: SqliteReader | None = None
        self._closing = AsyncExitStack()
        self._webhooks = SqliteWebhooks(self._look_up, self._write)

    # The store as a whole

    @property
    def store_id(self) -> bytes:
        return self._opened.store_id

    @property
    def cluster(self) -> None:
        """None: only one node can use it."""

    @property
    def webhooks(self) -> SqliteWebhooks:
        return self._webhooks

    @property
    def position(self) -> Position:
        return self._writing.position

    @property
    def behind(self) -> int:
        """0: only one node can use it."""
        return 0

    @property
    def compacted(self) -> Position:
        return self._writing.compacted.latest

    def compacted_of(self, tenant: str) -> Position:
        return self._writing.compacted.of(tenant)

    @property
    def failed(self) -> StoreError | None:
        return None if self._writer is None else self._writer.failed

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as closing:
            self._open = await open_file(self._path, closing)
            self._writer = SqliteWriter(
                self._open.writer, self._open.position, self._open.compacted, self
            )
            closing.push_async_callback(self._writer.close)
            self._reader = SqliteReader(self._open.reader)
            closing.push_async_callback(self._reader.close)
            self._closing = closing.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open = None
        await self._closing.aclose()

    async def catch_up(self) -> None:
        """Does nothing: the listener has received everything."""

    # Writing

    async def commit(self, base_version: int, transition: Transition) -> int:
        unit = await encoded(commit_unit, base_version, transition, _future())
        await self._writing.write(unit)
        return transition.lane.version

    async def append(
        self, key: RunKey, attempt: int, events: Sequence[RunEvent], *, host: str = ""
    ) -> None:
        """See `base.Store`. A file has one host."""
        if events:
            await self._writing.write(append_unit(key, attempt, events, _future()))

    async def keep_part(
        self, key: RunKey, attempt: int, number: int, part: Part, *, host: str = ""
    ) -> None:
        await self._writing.write(keep_unit(key, attempt, number, part, _future()))

    async def discard(self, key: SessionKey, at: Micros) -> None:
        completes = await self._page(queries.unended_runs, key, at)
        await self._writing.write(discard_unit(key, completes, _future()))

    async def create_session(self, session: NewSession) -> None:
        await self._writing.write(session_unit(session, _future()))

    async def plan_copy(self, key: SessionKey, turn: int) -> CopyPlan | None:
        found = await self._look_up(copies.copy_source, key, turn)
        return None if found is None else await with_pieces(*found, _Sizes(self._page))

    async def fork_session(self, plan: CopyPlan, session: NewSession) -> None:
        await self._writing.write(copies.start_unit(plan, _future()))
        try:
            for piece in plan.pieces:
                await self._writing.write(copies.piece_unit(plan, piece, _future()))
            await self._writing.write(copies.fork_unit(plan, session, _future()))
        except StoreUnavailable:
            raise  # the next start removes it
        except Exception:
            await self._writing.write(copies.drop_unit(plan, _future()))
            raise

    async def edit_session(self, key: SessionKey, before: Session, after: Session) -> bool:
        version = await self._look_up(queries.lane_version, key)
        try:
            await self._writing.write(edit_unit(version, key, before, after, _future()))
        except Stale:
            return False
        return True

    async def compact(self, before: Micros, limit: int, *, keep_bytes: int | None = None) -> int:
        count = 0
        while True:
            step = Compaction(before, limit - count, keep_bytes, _future())
            removed = await self._writing.write(step)
            count += 0 if removed is None else removed.events
            # Writes that arrived in the meantime are committed between two steps.
            if removed is None or not removed.more or count == limit:
                return count

    async def forget_deleted(self, before: Micros, limit: int) -> int:
        count = await self._look_up(queries.count_deleted, before, limit)
        if count:
            await self._writing.write(forget_unit(before, limit, _future()))
        return count

    async def remove_deleted(self) -> bool:
        if not await self._look_up(queries.has_removals):
            return False
        await self._writing.write(removal_unit(_future()))
        return True

    # Reading

    async def load_lane(self, key: SessionKey) -> Lane:
        return await self._look_up(queries.lane, key)

    async def busy_sessions(self) -> Sequence[BusySession]:
        return await self._page(queries.busy_sessions)

    async def get_run(self, key: RunKey) -> Run | None:
        return await self._look_up(queries.run, key)

    async def get_deleted_run(self, key: RunKey) -> DeletedRun | None:
        return await self._look_up(queries.deleted_run, key)

    async def position_of(self, key: RunKey) -> Position | None:
        return await self._look_up(sqlite_log.position_of, key)

    async def list_runs(
        self,
        tenant: str,
        wanted: RunFilter = ALL_RUNS,
        *,
        after: ListPlace | None = None,
        limit: int,
    ) -> Page[Run, ListPlace]:
        return await self._page(sqlite_lists.list_runs, tenant, wanted, after, limit)

    async def count_runs(self, tenant: str, wanted: RunFilter) -> Count:
        return await self._page(sqlite_lists.count_runs, tenant, wanted)

    async def get_prompt(self, key: RunKey) -> Prompt | None:
        return await self._look_up(queries.prompt, key)

    async def run_events(
        self, key: RunKey, *, after: int, limit: int, max_bytes: int
    ) -> Sequence[RunEvent]:
        return await self._page(queries.run_events, key, after, limit, max_bytes)

    async def lane_events(
        self, key: SessionKey, *, after: LanePlace, limit: int, max_bytes: int
    ) -> LanePage:
        return await self._page(queries.lane_events, key, after, limit, max_bytes)

    async def get_input(self, tenant: str, input_request_id: str) -> InputRequest | None:
        return await self._look_up(queries.input_request, tenant, input_request_id)

    async def find_input(self, key: RunKey, question_key: str) -> InputRequest | None:
        return await self._look_up(queries.find_input, key, question_key)

    async def list_inputs(
        self,
        tenant: str,
        *,
        session_id: str | None = None,
        run_id: str | None = None,
        states: Collection[InputState] = (),
        after: int | None = None,
        limit: int,
    ) -> Page[InputRequest, int]:
        return await self._page(
            queries.list_inputs,
            tenant,
            session_id=session_id,
            run_id=run_id,
            states=states,
            after=after,
            limit=limit,
        )

    async def due_inputs(self, now: Micros, limit: int) -> Sequence[DueInput]:
        return await self._look_up(queries.due_input_requests, now, limit)

    async def get_session(self, key: SessionKey) -> Session | None:
        return await self._look_up(queries.session, key)

    async def list_sessions(
        self,
        tenant: str,
        wanted: SessionFilter = ALL_SESSIONS,
        *,
        after: ListPlace | None = None,
        limit: int,
    ) -> Page[Session, ListPlace]:
        return await self._page(sqlite_lists.list_sessions, tenant, wanted, after, limit)

    async def count_sessions(self, tenant: str, wanted: SessionFilter) -> Count:
        return await self._page(sqlite_lists.count_sessions, tenant, wanted)

    async def stored_bytes(self, tenant: str) -> int:
        # In pieces, so that other reads come in between.
        piece, place = await self._page(queries.stored_bytes, tenant, 0, SESSIONS_PER_READ)
        total = piece
        while place:
            read = queries.stored_bytes
            piece, place = await self._page(read, tenant, place, SESSIONS_PER_READ)
            total += piece
        return total

    async def stale_sessions(self, before: Micros, limit: int) -> Sequence[IdleSession]:
        return await self._page(queries.stale_sessions, before, limit)

    async def list_messages(
        self,
        key: SessionKey,
        *,
        after: MessagePlace | None = None,
        limit: int,
        max_bytes: int,
        run_id: str | None = None,
    ) -> Page[Message, MessagePlace]:
        return await self._page(queries.list_messages, key, after, limit, max_bytes, run_id=run_id)

    async def log_bytes(self) -> int:
        return await self._look_up(sqlite_log.log_bytes)

    async def vitals(self) -> StoreVitals:
        return await self._page(queries.vitals, self._path)

    async def completes(
        self, tenant: str, wanted: EventFilter, *, after: Position, limit: int, max_bytes: int
    ) -> LogPage:
        known = self.position
        if after >= known:
            return LogPage((), after)
        page, more, compacted = await self._page(
            sqlite_log.log_page,
            tenant,
            wanted,
            after=after,
            known=known,
            limit=limit,
            max_bytes=max_bytes,
        )
        # The reader may see a compaction before the writer knows that it was committed.
        self._writing.compacted.note(tenant, compacted)
        return LogPage(tuple(page), page[-1].position if more else known)

    async def _write(self, unit: Unit) -> None:
        await self._writing.write(unit)

    async def _look_up(
        self,
        read: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        try:
            return await self._reading.look_up(read, *args, **kwargs)
        except sqlite3.Error as error:
            raise _unreadable() from error

    async def _page(
        self,
        read: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        try:
            return await self._reading.page(read, *args, **kwargs)
        except sqlite3.Error as error:
            raise _unreadable() from error

    @property
    def _reading(self) -> SqliteReader:
        if self.failed is not None:
            # A read might see rows of the failed COMMIT that a restart will undo.
            raise unavailable(self.failed)
        if self._open is None or self._reader is None:
            raise StoreUnavailable("the store is not open")
        return self._reader

    @property
    def _opened(self) -> OpenFile:
        if self._open is None:
            raise StoreUnavailable("the store is not open")
        return self._open

    @property
    def _writing(self) -> SqliteWriter:
        if self._writer is None:
            raise StoreUnavailable("the store is not open")
        return self._writer


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Implements `SizeReader`."""

    page: Callable[..., Awaitable[Any]]

    async def messages(
        self, plan: CopyPlan, copy_id: int, after: MessagePlace
    ) -> Sequence[MessageSize]:
        """The next messages."""
        sizes: Sequence[MessageSize] = await self.page(
            copies.sizes_of_messages, plan, copy_id, after
        )
        return sizes

    async def parts(self, plan: CopyPlan, copy_id: int, run_id: str) -> Sequence[PartSize]:
        """The parts of a run."""
        sizes: Sequence[PartSize] = await self.page(copies.sizes_of_parts, plan, copy_id, run_id)
        return sizes


def _unreadable() -> StoreUnavailable:
    return StoreUnavailable("the store could not be read; repeat the call")


def _future() -> Future[Result]:
    return asyncio.get_running_loop().create_future()
