"""The store in a PostgreSQL database, which any number of nodes share.

The lane's version in the database decides between them; no node holds a lock while it decides. A
write costs one round trip, which all concurrent writes share; other costs stand with the methods.
"""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.input import InputRequest, InputState
from runlane_server.core.model import (
    Message,
    Micros,
    Part,
    Prompt,
    Run,
    RunComplete,
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
from runlane_server.store.codec import RUN_COMPLETE, encode_metadata, encode_part
from runlane_server.store.compaction import largest_log
from runlane_server.store.copies import CopyPlan
from runlane_server.store.fanout import publish_lane
from runlane_server.store.inputs import due_inputs, input_from, inputs_page
from runlane_server.store.lane_log import LaneChange, LanePage, LanePlace
from runlane_server.store.lookup import (
    ALL_RUNS,
    ALL_SESSIONS,
    Count,
    ListPlace,
    RunFilter,
    SessionFilter,
)
from runlane_server.store.postgres import lists, queries
from runlane_server.store.postgres.cluster import PostgresCluster, open_cluster_pool
from runlane_server.store.postgres.copies import PostgresCopies
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.log import PostgresLog
from runlane_server.store.postgres.notifier import Notifier
from runlane_server.store.postgres.pool import Pool
from runlane_server.store.postgres.rows import (
    Result,
    append_unit,
    commit_unit,
    discard_unit,
    session_unit,
)
from runlane_server.store.postgres.schema import SQL, OpenDatabase, open_database
from runlane_server.store.postgres.text import escape, unescape
from runlane_server.store.postgres.webhooks import PostgresWebhooks
from runlane_server.store.postgres.writer import PostgresWriter
from runlane_server.store.records import END_OF_LIST
from runlane_server.store.vitals import StoreVitals
from runlane_server.store.weight import session_growth

STEP_ROWS = 250
STEP_BYTES = 4 << 20
"""The most that one transaction of a compaction removes. Writes wait for its end: some
milliseconds."""

REMOVED_KEPT = timedelta(days=1)
"""How long the store remembers the version of a removed session. A node that was suspended for
longer may mistake a new session with the same id for the old one."""

REMOVED_STEP = 1_000


@dataclass(frozen=True, slots=True)
class _OpenParts:
    """The parts of an open store."""

    store_id: bytes
    pool: Pool
    log: PostgresLog
    notifier: Notifier
    writer: PostgresWriter
    cluster: PostgresCluster
    webhooks: PostgresWebhooks
    copies: PostgresCopies


class PostgresStore:
    """A store in a PostgreSQL database. See `base.Store`.

    While the database is unavailable, calls raise StoreUnavailable and the store reconnects by
    itself. It fails permanently only if the database has lost events when it returns.
    """

    def __init__(self, database: Database) -> None:
        self.listener: Listener | None = None
        self.write_observer: WriteObserver | None = None
        self.on_failure: Callable[[StoreError], None] | None = None
        self._database = database
        self._parts: _OpenParts | None = None
        self._closing = AsyncExitStack()

    # The store as a whole

    @property
    def store_id(self) -> bytes:
        return self._open.store_id

    @property
    def cluster(self) -> PostgresCluster:
        return self._open.cluster

    @property
    def webhooks(self) -> PostgresWebhooks:
        return self._open.webhooks

    @property
    def position(self) -> Position:
        return self._open.log.position

    @property
    def behind(self) -> int:
        return self._open.log.behind

    @property
    def compacted(self) -> Position:
        """See `base.Store`. This node learns it every second, and with each page that it reads."""
        return self._open.log.compacted.latest

    def compacted_of(self, tenant: str) -> Position:
        return self._open.log.compacted.of(tenant)

    @property
    def failed(self) -> StoreError | None:
        """Set if the database has lost events. A database that is only unavailable returns."""
        return None if self._parts is None else self._parts.log.failed

    async def __aenter__(self) -> Self:
        opened = await open_database(self._database)
        async with AsyncExitStack() as closing:
            self._parts = await self._make_parts(opened, closing)
            self._closing = closing.pop_all()
        return self

    async def _make_parts(self, opened: OpenDatabase, closing: AsyncExitStack) -> _OpenParts:
        connector = opened.connector
        pool = await Pool.open(connector)
        closing.push_async_callback(pool.close)
        cluster_pool = await open_cluster_pool(connector)
        closing.push_async_callback(cluster_pool.close)
        notifier = Notifier(cluster_pool, self._database.channel)
        closing.push_async_callback(notifier.close)
        cluster = PostgresCluster(cluster_pool, notifier, opened.node_keys)
        log = PostgresLog(
            opened,
            pool,
            notifier,
            lambda: self.listener,
            on_work=cluster.on_wake_up,
            on_failure=self._report_failure,
        )
        closing.push_async_callback(log.close)
        writer = PostgresWriter(
            connector, log, notifier, lambda: self.listener, lambda: self.write_observer
        )
        closing.push_async_callback(writer.close)
        webhooks = PostgresWebhooks(pool, cluster_pool)
        copies = PostgresCopies(pool)
        return _OpenParts(opened.store_id, pool, log, notifier, writer, cluster, webhooks, copies)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._closing.aclose()
        self._parts = None

    def _report_failure(self, error: StoreError) -> None:
        if self.on_failure is not None:
            self.on_failure(error)

    async def catch_up(self) -> None:
        """See `base.Store`. One round trip."""
        await self._open.log.catch_up()

    # Writing

    async def commit(self, base_version: int, transition: Transition) -> int:
        """See `base.Store`.

        A new session continues the versions of a removed one with the same id, so that no version
        is ever used twice: a node that has the old lane in its cache is refused.
        """
        unit = await encoded(commit_unit, base_version, transition, _future())
        await self._open.writer.write(unit)
        return 0 if transition.removed else transition.lane.version + unit.versions_skipped

    async def append(
        self, key: RunKey, attempt: int, events: Sequence[RunEvent], *, host: str = ""
    ) -> None:
        if events:
            await self._open.writer.write(append_unit(key, attempt, host, events, _future()))

    async def keep_part(
        self, key: RunKey, attempt: int, number: int, part: Part, *, host: str = ""
    ) -> None:
        """See `base.Store`. Beside the commits of the writer, which a large text would delay."""
        text = encode_part(part)
        row: Any = await self._row("keep_part", *_escaped(key), attempt, number, text, escape(host))
        if not row["kept"]:
            raise Stale.attempt()

    async def discard(self, key: SessionKey, at: Micros) -> None:
        """See `base.Store`. Two round trips, and again two while another node changes the lane."""
        while rows := await self._rows("unended_runs", *_escaped(key)):
            completes = queries.unended_runs(key, rows, at)
            unit = discard_unit(rows[0]["version"], key, completes, _future())
            try:
                await self._open.writer.write(unit)
            except Stale:
                continue
            return

    async def create_session(self, session: NewSession) -> None:
        await self._open.writer.write(session_unit(session, _future()))

    async def plan_copy(self, key: SessionKey, turn: int) -> CopyPlan | None:
        """See `base.Store`. A round trip for each 5,000 messages, and one for each long one."""
        return await self._open.copies.plan(key, turn)

    async def fork_session(self, plan: CopyPlan, session: NewSession) -> None:
        """See `base.Store`. Beside the commits of the writer; a round trip for each piece."""
        version = await self._open.copies.fork(plan, session)
        publish_lane(self.listener, LaneChange(session.key, 0, version))

    async def edit_session(self, key: SessionKey, before: Session, after: Session) -> bool:
        """See `base.Store`. Beside the commits of the writer."""
        row: Any = await self._row(
            "edit_session",
            *_escaped(key),
            after.agent,
            escape(after.title),
            encode_metadata(after.metadata),
            session_growth(before, after),
            after.updated_at,
            escape(before.title),
            encode_metadata(before.metadata),
            before.agent,
        )
        if row is None:
            return False
        version: int = row["version"]
        publish_lane(self.listener, LaneChange(key, version - 1, version))
        return True

    async def compact(self, before: Micros, limit: int, *, keep_bytes: int | None = None) -> int:
        """See `base.Store`. One round trip for each step, one for the sizes, two after a removal,
        one to delete the versions of sessions that were removed long ago, and one for unfinished
        copies."""
        count = await self._compact(before, limit, None)
        if count < limit and keep_bytes is not None:
            largest = largest_log(await self._log_sizes(), keep_bytes)
            if largest is not None:
                count += await self._compact(0, limit - count, largest)
        if count:
            await self.catch_up()
        await self._rows("forget_removed", REMOVED_KEPT, REMOVED_STEP)
        await self._open.copies.drop_stale()
        return count

    async def _compact(self, before: Micros, limit: int, largest: int | None) -> int:
        count: int = 0
        while True:
            step: Any = await self._row(
                "compact", before, limit - count, largest, STEP_ROWS, STEP_BYTES
            )
            count += step["events"]
            if not step["more"] or count == limit:
                return count

    async def forget_deleted(self, before: Micros, limit: int) -> int:
        """See `base.Store`. `before` is compared with the clock of the database."""
        count: int = (await self._row("forget_deleted", before, limit))["forgotten"]
        return count

    async def remove_deleted(self) -> bool:
        """See `base.Store`. One round trip. Nodes remove different sessions at the same time."""
        removed: bool = (await self._row("remove_next"))["removed"]
        return removed

    # Reading: one round trip each, unless noted otherwise

    async def load_lane(self, key: SessionKey) -> Lane:
        return queries.lane(key, await self._rows("lane", *_escaped(key)))

    async def busy_sessions(self) -> Sequence[BusySession]:
        return queries.busy_sessions(await self._rows("busy_sessions"))

    async def get_run(self, key: RunKey) -> Run | None:
        row: Any = await self._row("run", *_escaped(key))
        return None if row is None or row["is_removed"] else queries.run(key.tenant, row)

    async def get_deleted_run(self, key: RunKey) -> DeletedRun | None:
        row = await self._row("deleted_run", *_escaped(key))
        return None if row is None else queries.deleted_run(key, row)

    async def position_of(self, key: RunKey) -> Position | None:
        """See `base.Store`. One more round trip if the listener has not reached that position."""
        row = await self._row("position_of_run", *_escaped(key))
        if row is None:
            return None
        position: Position = row["position"]
        if position > self.position:
            await self._open.log.catch_up(position)
        return position

    async def list_runs(
        self,
        tenant: str,
        wanted: RunFilter = ALL_RUNS,
        *,
        after: ListPlace | None = None,
        limit: int,
    ) -> Page[Run, ListPlace]:
        """See `base.Store`. Two round trips for a page that is short."""
        return await lists.list_runs(self._open.pool, tenant, wanted, after, limit)

    async def count_runs(self, tenant: str, wanted: RunFilter) -> Count:
        return await lists.count_runs(self._open.pool, tenant, wanted)

    async def get_prompt(self, key: RunKey) -> Prompt | None:
        row = await self._row("prompt", *_escaped(key))
        return None if row is None else queries.prompt(key, row)

    async def run_events(
        self, key: RunKey, *, after: int, limit: int, max_bytes: int
    ) -> Sequence[RunEvent]:
        """See `base.Store`. Two round trips if the end of the run is among the events."""
        rows = await self._rows(
            "run_events", *_escaped(key), after, limit, max_bytes + queries.SLACK_BYTES
        )
        end = None
        if rows and rows[-1]["kind"] == RUN_COMPLETE:
            run = await self.get_run(key)
            if run is None or run.complete is None:
                return []  # its session was removed in the meantime
            end = run.complete
        return queries.run_events(key, rows, end, after=after, limit=limit, max_bytes=max_bytes)

    async def lane_events(
        self, key: SessionKey, *, after: LanePlace, limit: int, max_bytes: int
    ) -> LanePage:
        """See `base.Store`. One more round trip for each run that ended."""
        rows = await self._rows(
            "lane_events", *_escaped(key), after, limit, max_bytes + queries.SLACK_BYTES
        )
        ends: dict[str, RunComplete] = {}
        for row in rows:
            if row["kind"] == RUN_COMPLETE:
                run = await self.get_run(RunKey(key.tenant, unescape(row["run_id"])))
                if run is None or run.complete is None:
                    return LanePage()  # its session was removed in the meantime
                ends[run.run_id] = run.complete
        return queries.lane_page(key, rows, ends, max_bytes=max_bytes)

    async def get_input(self, tenant: str, input_request_id: str) -> InputRequest | None:
        row = await self._row("input", escape(tenant), escape(input_request_id))
        return None if row is None else input_from(tenant, row, unescape)

    async def find_input(self, key: RunKey, question_key: str) -> InputRequest | None:
        row = await self._row("input_of_run", *_escaped(key), escape(question_key))
        return None if row is None else input_from(key.tenant, row, unescape)

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
        where = (escape(tenant), END_OF_LIST if after is None else after)
        wanted = [*(states or InputState)]
        session = None if session_id is None else escape(session_id)
        if run_id is not None:
            name = "inputs_of_run"
            args: tuple[object, ...] = (wanted, limit + 1, escape(run_id), session)
        elif session is not None:
            name, args = "inputs_of_session", (wanted, limit + 1, session)
        elif {*states} == {InputState.OPEN}:
            name, args = "open_inputs", (limit + 1,)
        else:
            name, args = "inputs", (wanted, limit + 1)
        return inputs_page(tenant, await self._rows(name, *where, *args), unescape, limit)

    async def due_inputs(self, now: Micros, limit: int) -> Sequence[DueInput]:
        """See `base.Store`. The clock of the database decides."""
        return due_inputs(await self._rows("due_inputs", limit), unescape)

    async def get_session(self, key: SessionKey) -> Session | None:
        row = await self._row("session", *_escaped(key))
        return None if row is None else queries.session(key.tenant, row)

    async def list_sessions(
        self,
        tenant: str,
        wanted: SessionFilter = ALL_SESSIONS,
        *,
        after: ListPlace | None = None,
        limit: int,
    ) -> Page[Session, ListPlace]:
        """See `base.Store`. Two round trips for a page that is short."""
        return await lists.list_sessions(self._open.pool, tenant, wanted, after, limit)

    async def count_sessions(self, tenant: str, wanted: SessionFilter) -> Count:
        return await lists.count_sessions(self._open.pool, tenant, wanted)

    async def stored_bytes(self, tenant: str) -> int:
        rows = await self._rows("stored_bytes", escape(tenant))
        total: int = rows[0]["bytes"]
        return total

    async def stale_sessions(self, before: Micros, limit: int) -> Sequence[IdleSession]:
        rows = await self._rows("stale_sessions", before, limit)
        return queries.idle_sessions(rows)

    async def list_messages(
        self,
        key: SessionKey,
        *,
        after: MessagePlace | None = None,
        limit: int,
        max_bytes: int,
        run_id: str | None = None,
    ) -> Page[Message, MessagePlace]:
        """See `base.Store`. Two round trips for the messages of one run, and one more for those
        that a fork had at its beginning."""
        first = start = after or (0, 0)
        last_turn, run = END_OF_LIST, None
        if run_id is not None:
            run = escape(run_id)
            found = await self._row("turn_of_run", escape(key.tenant), run, escape(key.session_id))
            last_turn = 0 if found is None else found["turn"]
            start = max(start, (last_turn, -1))
        size = max_bytes + queries.SLACK_BYTES
        rows = await self._rows("messages", *_escaped(key), *start, limit + 1, size, last_turn, run)
        copied: Sequence[Any] = ()
        last_copied = rows[0]["last_copied"] or 0  # NULL in a damaged row
        if (copy_id := rows[0]["copy_id"]) is not None and first[0] <= last_copied:
            args = (copy_id, *first, limit + 1, size, run)
            copied = await self._open.pool.fetch(SQL["copied_messages"], *args, tenant=key.tenant)
        return queries.transcript_page(key.tenant, copied, rows, limit=limit, max_bytes=max_bytes)

    async def log_bytes(self) -> int:
        return sum(await self._log_sizes())

    async def _log_sizes(self) -> Sequence[int]:
        return [row["bytes"] for row in await self._rows("log_sizes")]

    async def vitals(self) -> StoreVitals:
        """See `base.Store`. The disk of the database is out of sight."""
        row = await self._row("vitals")
        return StoreVitals(
            size=row["size"], waiting_since=row["waiting_since"], asking_since=row["asking_since"]
        )

    async def completes(
        self, tenant: str, wanted: EventFilter, *, after: Position, limit: int, max_bytes: int
    ) -> LogPage:
        """See `base.Store`. It returns no event that the listener has not received."""
        known = self.position
        if after >= known:
            return LogPage((), after)
        where = (escape(tenant), after, known, limit + 1, max_bytes + queries.SLACK_BYTES)
        if wanted.matches_all:
            rows = await self._rows("events", *where)
        else:
            ids = [[*map(escape, some)] for some in (wanted.session_ids, wanted.run_ids)]
            rows = await self._rows("events_of", *where, *ids)
        self._open.log.compacted.note(tenant, rows[0]["compacted"])
        page, more = queries.log_page(rows, limit=limit, max_bytes=max_bytes)
        return LogPage(tuple(page), page[-1].position if more else known)

    async def _rows(self, name: str, *args: object) -> Sequence[Any]:
        return await self._open.pool.fetch(SQL[name], *args, tenant=_tenant_of(args))

    async def _row(self, name: str, *args: object) -> Any:
        return await self._open.pool.fetchrow(SQL[name], *args, tenant=_tenant_of(args))

    @property
    def _open(self) -> _OpenParts:
        if self._parts is None:
            raise StoreUnavailable("the store is not open")
        return self._parts


def _tenant_of(args: Sequence[object]) -> str:
    """The tenant that a statement reads for: it is the first parameter."""
    return args[0] if args and isinstance(args[0], str) else ""


def _escaped(key: SessionKey | RunKey) -> tuple[str, str]:
    return escape(key[0]), escape(key[1])


def _future() -> Future[Result]:
    return asyncio.get_running_loop().create_future()
