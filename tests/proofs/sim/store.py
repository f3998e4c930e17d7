"""A store that behaves like one on disk: it takes time, and a crash loses pending writes.

`Disk` survives a crash. A `SimStore` is one node's access to it: a writer with batches, in some
worlds several that write at a time as over PostgreSQL, reads that see committed data before it is
delivered, and sometimes a change by another node of the lane that is being written. With a group,
live nodes share the disk: each follows the log of all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from proofs.sim.group import POLL_SECONDS, Group, SimCluster
from proofs.sim.history import FLEETING, History, SessionChange
from runlane_server.access.caller import DEFAULT_TENANT as TENANT
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
    LoggedComplete,
    LogPage,
    MessagePlace,
    NewSession,
    Page,
    Position,
    Stale,
    StoreError,
    WriteObserver,
)
from runlane_server.store.copies import CopyPlan
from runlane_server.store.lane_log import LaneChange, LanePage, LanePlace
from runlane_server.store.lookup import (
    ALL_RUNS,
    ALL_SESSIONS,
    Count,
    ListPlace,
    RunFilter,
    SessionFilter,
)
from runlane_server.store.memory.store import MemoryStore
from runlane_server.store.memory.webhooks import MemoryWebhooks
from runlane_server.store.postgres.write_lines import WriteLine, WriteLines
from runlane_server.store.vitals import StoreVitals

T = TypeVar("T")

Tell: TypeAlias = Callable[[Listener], None]
"""Delivers committed events."""

MAX_BATCH = 4

TIMEOUT = 1.0
"""Seconds after which a call that the store does not answer fails."""

COMMIT_SECONDS = 2e-6
"""The least time of a commit."""

STORE_ID = b"simulate"


def at_once(call: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine that never waits, and returns its result."""
    try:
        call.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("it waits")


class Disk:
    """The committed data, and a record of everything that was ever committed."""

    def __init__(self, history: History) -> None:
        self.data = MemoryStore(STORE_ID)
        self.data.listener = self
        self.data._tables.piece_runs = 1
        self._history = history
        self._untold: list[tuple[Position, Tell]] = []
        self._log: list[LoggedComplete] = []
        self._existing: set[str] = set()

    def on_completes(self, events: Sequence[LoggedComplete]) -> None:
        """Terminal events were committed."""
        for event in events:
            what = f"{event.complete.run_id} {event.complete.state} at {event.position}"
            tick = self._history.note("disk", what)
            self._history.completes.append((tick, event))
            self._history.ended_when[event.complete.run_id] = self._history.now
        self._log += events
        tell: Tell = lambda listener: listener.on_completes(events)  # noqa: E731 - a record of it
        self._untold.append((events[-1].position if events else 0, tell))

    def on_run_events(self, key: RunKey, events: Sequence[RunEvent]) -> None:
        """Events of a run were committed."""
        kept = self._history.events.setdefault(key, [])
        for event in events:
            kept.append((self._history.tick(), event))
        self._untold.append((0, lambda listener: listener.on_run_events(key, events)))

    def on_lane(self, change: LaneChange) -> None:
        """A change of a lane was committed."""
        self._untold.append((0, lambda listener: listener.on_lane(change)))

    def note_sessions(self) -> None:
        """Notes which of the sessions that come and go exist now."""
        tables, history = self.data._tables, self._history
        for session_id in FLEETING:
            key = SessionKey(TENANT, session_id)
            exists = key in tables.sessions
            if exists != (session_id in self._existing):
                self._existing ^= {session_id}
                tick = history.note("disk", f"{session_id} is {'there' if exists else 'deleted'}")
                history.fleeting.append(SessionChange(tick, session_id, exists))
            history.require(
                not (exists and key in tables.removals),
                f"{session_id} exists, and runs of the last one are left",
            )

    def prompt(self, run_id: str) -> str | None:
        """The text of the prompt of a run."""
        rows = self.data._tables.runs
        return next((row.prompt.text for key, row in rows.items() if key.run_id == run_id), None)

    def lanes(self) -> list[Lane]:
        """All lanes."""
        return [session.lane for session in self.data._tables.sessions.values()]

    def log_between(self, after: Position, upto: Position) -> tuple[Position, list[LoggedComplete]]:
        """The events after a position, and the position after which all are kept."""
        start = max(after, min(self.data.compacted, upto))
        return start, [it for it in self._log if start < it.position <= upto]

    def take_untold(self) -> list[tuple[Position, Tell]]:
        """The events that were not delivered yet, with the last position of those of the log."""
        untold, self._untold = self._untold, []
        return untold


@dataclass(slots=True, eq=False)
class _Unit:
    """A write that waits for its commit."""

    write: Callable[[], Coroutine[Any, Any, Any]]
    done: asyncio.Future[Any]
    tenant: str = ""
    lane: SessionKey | None = None
    changed: Collection[str] = ()
    appended: str | None = None
    is_logged: bool = False
    size: int = 1


@dataclass(frozen=True, slots=True)
class _Committed:
    """The outcome of a batch: the position of the log after it, and what was not delivered yet."""

    results: Sequence[Any]
    position: Position
    untold: Sequence[tuple[Position, Tell]]


Meddle = Callable[[SessionKey], None]
"""Changes a lane as another node would."""


class SimStore:
    """A node's store. See `base.Store`."""

    def __init__(
        self,
        disk: Disk,
        rng: Random,
        history: History,
        meddle: Meddle,
        group: Group | None = None,
    ) -> None:
        self.listener: Listener | None = None
        self.write_observer: WriteObserver | None = None
        self.on_failure: Callable[[StoreError], None] | None = None
        self.dead = False
        self.is_cut_off = False
        self._disk = disk
        self._rng = rng
        self._history = history
        self._meddle = meddle
        self._delivered = disk.data.position
        self._lines: WriteLines[_Unit] = WriteLines(2, 1 << 20)
        self._one_at_a_time = asyncio.Lock() if rng.random() < 0.5 else nullcontext()
        self._under_way: dict[str, Sequence[_Unit]] = {}
        self._committed: dict[str, _Committed] = {}
        self._group = group
        self._cluster: SimCluster | None = None
        if group is not None:
            self._cluster = SimCluster(group, self._ask, self._on_announced)
        self._announced: Position = 0
        self._log_is_due = asyncio.Event()
        self._undelivered: deque[tuple[Position, Tell]] = deque()
        self._changed = asyncio.Event()
        self._closing = False
        self.writers: list[asyncio.Task[None]] = []
        self._following: asyncio.Task[None] | None = None

    # Start and stop

    async def __aenter__(self) -> Self:
        """Starts the writers."""
        self.writers = [asyncio.create_task(self._write_all(it)) for it in self._lines.every]
        if self._cluster is not None:
            self._cluster.open()
            self._following = asyncio.create_task(self._follow_log())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Writes what is pending."""
        self._closing = True
        self._changed.set()
        if self.writers:
            await asyncio.wait(self.writers)
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})
        self._leave_group()
        self.dead = True

    def _leave_group(self) -> None:
        if self._cluster is not None:
            self._cluster.close()

    @property
    def own_tasks(self) -> int:
        """The number of its tasks while it is open."""
        return len(self.writers) + (self._following is not None)

    def crash(self) -> None:
        """Crashes: pending writes are lost; a write in progress is committed or not."""
        self.dead = True
        self.on_silence()
        self._leave_group()

    def on_silence(self) -> None:
        """The node hears nothing from now on: a write in progress is committed or not."""
        for name, batch in self._under_way.items():
            if name not in self._committed and self._rng.random() < 0.5:
                self._commit_batch(name, batch, meddled=False)

    @property
    def store_id(self) -> bytes:
        """Always the same."""
        return STORE_ID

    @property
    def cluster(self) -> SimCluster | None:
        """The nodes that share the store; None without a group."""
        return self._cluster

    @property
    def webhooks(self) -> MemoryWebhooks:
        """The nodes of a simulation deliver none."""
        return self._disk.data.webhooks

    @property
    def position(self) -> Position:
        """The position of the last terminal event that was delivered."""
        return self._delivered

    @property
    def behind(self) -> int:
        """The number of events that other nodes announced and the listener has not received."""
        return max(0, self._announced - self._delivered)

    @property
    def compacted(self) -> Position:
        """The position up to which events were removed; only delivered ones are."""
        return min(self._disk.data.compacted, self._delivered)

    def compacted_of(self, tenant: str) -> Position:
        """The position up to which events of a tenant were removed."""
        return min(self._disk.data.compacted_of(tenant), self._delivered)

    @property
    def failed(self) -> StoreError | None:
        """Set when the node is dead."""
        return StoreError("the node is dead") if self.dead else None

    # Writing

    async def catch_up(self) -> None:
        """Delivers what all nodes have committed so far."""
        if self._group is not None:
            self._deliver(await self._ask(lambda: self._disk.data.position))

    async def commit(self, base_version: int, transition: Transition) -> int:
        """Writes a transition of a lane."""

        async def write() -> int:
            version = await self._disk.data.commit(base_version, transition)
            if self._group is not None:
                self._group.on_committed(transition.lane)
            return version

        await self._write(
            write,
            lane=transition.lane.key,
            tenant=transition.lane.key.tenant,
            changed=[change.run.run_id for change in transition.runs],
            is_logged=bool(transition.completes or transition.inputs),
        )
        return transition.lane.version

    async def append(
        self, key: RunKey, attempt: int, events: Sequence[RunEvent], *, host: str = ""
    ) -> None:
        """Adds events to the active run."""
        write = self._disk.data.append
        await self._write(
            lambda: write(key, attempt, events, host=host), tenant=key.tenant, appended=key.run_id
        )

    async def keep_part(
        self, key: RunKey, attempt: int, number: int, part: Part, *, host: str = ""
    ) -> None:
        """Stores a part of a long message."""
        write = self._disk.data.keep_part
        await self._write(lambda: write(key, attempt, number, part, host=host))

    async def discard(self, key: SessionKey, at: Micros) -> None:
        """Removes a session."""
        await self._write(lambda: self._disk.data.discard(key, at), lane=key, is_logged=True)

    async def create_session(self, session: NewSession) -> None:
        """Creates a session."""
        await self._write(lambda: self._disk.data.create_session(session))

    async def plan_copy(self, key: SessionKey, turn: int) -> CopyPlan | None:
        """The plan of a copy."""
        return await self._read(lambda: self._disk.data.plan_copy(key, turn))

    async def fork_session(self, plan: CopyPlan, session: NewSession) -> None:
        """Creates a fork."""
        await self._write(lambda: self._disk.data.fork_session(plan, session))

    async def compact(self, before: Micros, limit: int, *, keep_bytes: int | None = None) -> int:
        """Removes old terminal events."""
        write = self._disk.data.compact
        return int(await self._write(lambda: write(before, limit, keep_bytes=keep_bytes)))

    async def forget_deleted(self, before: Micros, limit: int) -> int:
        """Forgets runs that were deleted long ago."""
        return int(await self._write(lambda: self._disk.data.forget_deleted(before, limit)))

    async def remove_deleted(self) -> bool:
        """Removes a piece of what belonged to deleted sessions."""
        return bool(await self._write(self._disk.data.remove_deleted))

    async def _write(self, write: Callable[[], Coroutine[Any, Any, Any]], **concerned: Any) -> Any:
        self._check()
        if self._closing:
            raise StoreUnavailable("the store is closed")
        unit = _Unit(write, asyncio.get_running_loop().create_future(), **concerned)
        self._lines.add(unit)
        self._changed.set()
        result = await unit.done
        if isinstance(result, Exception):
            raise result
        return result

    async def _write_all(self, line: WriteLine[_Unit]) -> None:
        while line.queue or not self._closing:
            batch = line.queue.take() if line.queue else []
            if not batch:
                await self._until_changed()
            while batch:
                while self._lines.must_wait(line, batch):
                    await self._until_changed()
                size = self._rng.randint(1, MAX_BATCH)
                async with self._one_at_a_time:
                    await self._write_batch(line, batch[:size])
                batch = batch[size:]

    async def _until_changed(self) -> None:
        """Waits until another unit comes, or is written."""
        self._changed.clear()
        await self._changed.wait()

    async def _write_batch(self, line: WriteLine[_Unit], batch: Sequence[_Unit]) -> None:
        self._under_way[line.name] = batch
        # A commit takes time: no run starts twice at one instant.
        await asyncio.sleep(COMMIT_SECONDS)
        await self._pause()
        if self.is_cut_off:
            await self._give_up(line, batch)
            return
        if line.name not in self._committed:
            self._commit_batch(line.name, batch, meddled=True)
        # Committed, but not confirmed yet.
        await self._pause()
        del self._under_way[line.name]
        committed = self._committed.pop(line.name)
        self._deliver(committed.position)
        for of_log, tell in committed.untold:
            if not of_log and self.listener is not None:
                tell(self.listener)
        for unit, result in zip(batch, committed.results, strict=True):
            if not unit.done.done():
                unit.done.set_result(result)
        line.forget(batch)
        self._changed.set()

    async def _give_up(self, line: WriteLine[_Unit], batch: Sequence[_Unit]) -> None:
        """The store does not answer: nobody knows whether it has written the batch."""
        await asyncio.sleep(TIMEOUT)
        del self._under_way[line.name]
        self._committed.pop(line.name, None)
        for unit in batch:
            if not unit.done.done():
                unit.done.set_result(StoreUnavailable("the store does not answer"))
        line.forget(batch)
        self._changed.set()

    def _commit_batch(self, name: str, batch: Sequence[_Unit], *, meddled: bool) -> None:
        results = self._apply(batch, meddled=meddled)
        untold = self._disk.take_untold()
        position = self._disk.data.position
        logged = [one for one in untold if one[0]]
        self._undelivered += logged
        self._committed[name] = _Committed(results, position, untold)
        if self._cluster is not None and logged and not self.dead:
            self._cluster.announce_log(position)

    # The log of all nodes

    def _on_announced(self, position: Position) -> None:
        self._announced = max(self._announced, position)
        self._log_is_due.set()

    async def _follow_log(self) -> None:
        while True:
            self._log_is_due.clear()
            try:
                await self.catch_up()
                async with asyncio.timeout(POLL_SECONDS * self._rng.uniform(0.75, 1.25)):
                    await self._log_is_due.wait()
            except (TimeoutError, StoreUnavailable):
                continue

    def _deliver(self, upto: Position) -> None:
        """Delivers the log up to a position, in its order."""
        if self._group is None:
            self._deliver_own(upto)
            return
        start, events = self._disk.log_between(self._delivered, upto)
        if start > self._delivered:
            # They were removed before this node had read them.
            self._delivered = start
            if self.listener is not None:
                self.listener.on_completes(())
        if events:
            self._delivered = upto
            if self.listener is not None:
                self.listener.on_completes(events)

    def _deliver_own(self, upto: Position) -> None:
        self._delivered = max(self._delivered, upto)
        while self._undelivered and self._undelivered[0][0] <= upto:
            _, tell = self._undelivered.popleft()
            if self.listener is not None:
                tell(self.listener)

    def _apply(self, batch: Sequence[_Unit], *, meddled: bool) -> list[Any]:
        results: list[Any] = []
        for unit in batch:
            if meddled and unit.lane is not None:
                self._meddle(unit.lane)
            try:
                results.append(at_once(unit.write()))
            except Exception as error:  # noqa: BLE001 - it is the caller's
                results.append(error)
                self._history.stales += isinstance(error, Stale)
            self._disk.note_sessions()
        return results

    # Reading

    async def load_lane(self, key: SessionKey) -> Lane:
        """The lane of a session."""
        return await self._read(lambda: self._disk.data.load_lane(key))

    async def busy_sessions(self) -> Sequence[BusySession]:
        """All sessions with work."""
        return await self._read(self._disk.data.busy_sessions)

    async def edit_session(self, key: SessionKey, before: Session, after: Session) -> bool:
        """Changes a session."""
        write = self._disk.data.edit_session
        return bool(await self._write(lambda: write(key, before, after), lane=key))

    async def get_run(self, key: RunKey) -> Run | None:
        """A run."""
        return await self._read(lambda: self._disk.data.get_run(key))

    async def get_deleted_run(self, key: RunKey) -> DeletedRun | None:
        """A run whose session was deleted."""
        return await self._read(lambda: self._disk.data.get_deleted_run(key))

    async def position_of(self, key: RunKey) -> Position | None:
        """The position of the end of a run in the log."""
        position = await self._read(lambda: self._disk.data.position_of(key))
        if self._group is not None and position is not None:
            self._deliver(max(position, self._delivered))
        return position

    async def list_runs(
        self,
        tenant: str,
        wanted: RunFilter = ALL_RUNS,
        *,
        after: ListPlace | None = None,
        limit: int,
    ) -> Page[Run, ListPlace]:
        """Runs."""
        return await self._read(
            lambda: self._disk.data.list_runs(tenant, wanted, after=after, limit=limit)
        )

    async def count_runs(self, tenant: str, wanted: RunFilter) -> Count:
        """The number of runs."""
        return await self._read(lambda: self._disk.data.count_runs(tenant, wanted))

    async def get_prompt(self, key: RunKey) -> Prompt | None:
        """The prompt of a run."""
        return await self._read(lambda: self._disk.data.get_prompt(key))

    async def run_events(
        self, key: RunKey, *, after: int, limit: int, max_bytes: int
    ) -> Sequence[RunEvent]:
        """The events of a run."""
        return await self._read(
            lambda: self._disk.data.run_events(key, after=after, limit=limit, max_bytes=max_bytes)
        )

    async def lane_events(
        self, key: SessionKey, *, after: LanePlace, limit: int, max_bytes: int
    ) -> LanePage:
        """The events of a session."""
        return await self._read(
            lambda: self._disk.data.lane_events(key, after=after, limit=limit, max_bytes=max_bytes)
        )

    async def get_input(self, tenant: str, input_request_id: str) -> InputRequest | None:
        """An input request."""
        return await self._read(lambda: self._disk.data.get_input(tenant, input_request_id))

    async def find_input(self, key: RunKey, question_key: str) -> InputRequest | None:
        """The input request of a run with this key."""
        return await self._read(lambda: self._disk.data.find_input(key, question_key))

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
        """Input requests, the latest first."""
        return await self._read(
            lambda: self._disk.data.list_inputs(
                tenant,
                session_id=session_id,
                run_id=run_id,
                states=states,
                after=after,
                limit=limit,
            )
        )

    async def due_inputs(self, now: Micros, limit: int) -> Sequence[DueInput]:
        """Open requests whose time is over."""
        return await self._read(lambda: self._disk.data.due_inputs(now, limit))

    def peek_session(self, tenant: str, session_id: str) -> Session | None:
        """A session as it is committed now."""
        return at_once(self._disk.data.get_session(SessionKey(tenant, session_id)))

    async def get_session(self, key: SessionKey) -> Session | None:
        """A session."""
        return await self._read(lambda: self._disk.data.get_session(key))

    async def list_sessions(
        self,
        tenant: str,
        wanted: SessionFilter = ALL_SESSIONS,
        *,
        after: ListPlace | None = None,
        limit: int,
    ) -> Page[Session, ListPlace]:
        """Sessions."""
        return await self._read(
            lambda: self._disk.data.list_sessions(tenant, wanted, after=after, limit=limit)
        )

    async def count_sessions(self, tenant: str, wanted: SessionFilter) -> Count:
        """The number of sessions."""
        return await self._read(lambda: self._disk.data.count_sessions(tenant, wanted))

    async def stored_bytes(self, tenant: str) -> int:
        """The number of bytes a tenant has stored."""
        return await self._read(lambda: self._disk.data.stored_bytes(tenant))

    async def stale_sessions(self, before: Micros, limit: int) -> Sequence[IdleSession]:
        """Sessions that have been idle for long."""
        return await self._read(lambda: self._disk.data.stale_sessions(before, limit))

    async def list_messages(
        self,
        key: SessionKey,
        *,
        after: MessagePlace | None = None,
        limit: int,
        max_bytes: int,
        run_id: str | None = None,
    ) -> Page[Message, MessagePlace]:
        """The transcript."""
        return await self._read(
            lambda: self._disk.data.list_messages(
                key, after=after, limit=limit, max_bytes=max_bytes, run_id=run_id
            )
        )

    async def log_bytes(self) -> int:
        """The approximate size of the event log."""
        return await self._read(self._disk.data.log_bytes)

    async def vitals(self) -> StoreVitals:
        """The age of the oldest work."""
        return await self._read(self._disk.data.vitals)

    async def completes(
        self, tenant: str, wanted: EventFilter, *, after: Position, limit: int, max_bytes: int
    ) -> LogPage:
        """The delivered terminal events after a position."""
        known = self._delivered
        page = await self._read(
            lambda: self._disk.data.completes(
                tenant, wanted, after=after, limit=limit, max_bytes=max_bytes
            )
        )
        events = tuple(event for event in page.events if event.position <= known)
        return LogPage(events, max(after, min(page.scanned, known)))

    async def _ask(self, ask: Callable[[], T]) -> T:
        async def read() -> T:
            return ask()

        return await self._read(read)

    async def _read(self, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        self._check()
        await self._pause()
        self._check()
        if self.is_cut_off:
            await asyncio.sleep(TIMEOUT)
            raise StoreUnavailable("the store does not answer")
        result = at_once(read())
        await self._pause()
        self._check()
        return result

    def _check(self) -> None:
        if self.dead:
            raise StoreUnavailable("the node is dead")

    async def _pause(self) -> None:
        drawn = self._rng.random()
        if drawn < 0.5:
            return
        await asyncio.sleep(0 if drawn < 0.75 else drawn / 50)
