"""What a store does. It keeps what it is given, a transition in a transaction; it decides nothing.

The lane's version is the only concurrency control: a commit is refused with `Stale` if the stored
lane is not at the version that the transition was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from runlane_server.core.model import (
    NO_LABELS,
    Message,
    Micros,
    Prompt,
    Run,
    RunComplete,
    RunEvent,
    RunKey,
    RunState,
    Session,
    SessionKey,
)
from runlane_server.core.transition import Lane, Transition

Item = TypeVar("Item")
Place = TypeVar("Place")

Position = int
"""A place in the event log: that of the event before it; 0 is before the first."""

BEGINNING: Position = 0


class Stale(Exception):
    """The lane, or the run's attempt, is not what the caller took it for. Nothing was written."""


class RunIdTaken(Exception):
    """A run of that id exists already. Nothing was written."""


class SessionTaken(Exception):
    """A session of that id exists already. Nothing was written."""


@dataclass(frozen=True, slots=True)
class LoggedComplete:
    """A terminal event in the event log, which is ordered by `position`."""

    position: Position
    tenant: str
    complete: RunComplete


@dataclass(frozen=True, slots=True)
class LogPage:
    """A piece of the event log: all that matched up to `scanned`."""

    events: tuple[LoggedComplete, ...]
    scanned: Position


@dataclass(frozen=True, slots=True)
class Page(Generic[Item, Place]):
    """A piece of a list, and the place of its last item if there may be more."""

    items: tuple[Item, ...]
    next: Place | None


MessagePlace = tuple[int, int]
"""(turn, ordinal) of a message."""


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which terminal events are meant: those of a session or a run named here; all, if none is."""

    session_ids: frozenset[str] = frozenset()
    run_ids: frozenset[str] = frozenset()

    @property
    def everything(self) -> bool:
        """Whether it lets all events through."""
        return not (self.session_ids or self.run_ids)

    def matches(self, complete: RunComplete) -> bool:
        """Whether an event is meant."""
        return (
            self.everything
            or complete.session_id in self.session_ids
            or complete.run_id in self.run_ids
        )


@dataclass(frozen=True, slots=True)
class BusySession:
    """A session with work, as it is found at start."""

    key: SessionKey
    active: bool
    waiting_runs: int


@dataclass(frozen=True, slots=True)
class IdleSession:
    """A session without work, as of one version; `accept_seq` counts the runs it ever accepted."""

    key: SessionKey
    version: int
    accept_seq: int


@dataclass(frozen=True, slots=True)
class NewSession:
    """A session to create without a run."""

    key: SessionKey
    created_at: Micros
    title: str = ""
    metadata: Mapping[str, str] = field(default_factory=lambda: NO_LABELS)


class TenantShare(NamedTuple):
    """A tenant, and the number of further lanes of it that a node can serve."""

    tenant: str
    room: int


@dataclass(frozen=True, slots=True)
class ClaimOrder:
    """The order in which a node claims lanes, by tenant.

    Tenants that are not in `shares` come first, each with at most `others` lanes; then those in
    `shares`, in that order.
    """

    shares: tuple[TenantShare, ...] = ()
    others: int = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class HostedRun:
    """An attempt of an active run, and the session whose turn it is."""

    session: SessionKey
    run_id: str
    attempt: int


class Cluster(Protocol):
    """The nodes that share a store. Times are by the store's own clock; all methods may raise
    StoreUnavailable."""

    @property
    def peer_key(self) -> str:
        """What only the nodes of this store know: a node shows it to another to be taken for one.
        ASCII."""

    on_wake: Callable[[], None] | None
    """Is called when another node says that something is to be looked for: runs that wait for a
    node, or cancels. It may come too often, or not at all: whoever waits for it polls, too."""

    async def join(self, node_id: str, address: str) -> None:
        """Makes a node known, with the address where the others reach it. It is alive from now."""

    async def beat(self, node_id: str, lease: float) -> bool:
        """Says that a node is alive; False if it is taken for lost, or has left.

        Takes for lost, for good, whoever has not said so for `lease` seconds; but a node that was
        silent for so long itself, as after a time without the store, takes nobody for lost at once.
        """

    async def leave(self, node_id: str) -> None:
        """Forgets a node. What it still hosts is lost."""

    async def lost_runs(self, limit: int) -> Sequence[HostedRun]:
        """Active runs whose node is lost or gone, the longest active first."""

    async def cancelled_runs(self, node_id: str) -> Sequence[HostedRun]:
        """Active runs of a node that a cancel has covered."""

    async def claim(
        self, node_id: str, limit: int, hold: float, order: ClaimOrder | None = None
    ) -> Sequence[SessionKey]:
        """Lanes with runs that wait and none that is active: `limit` of them at the most, in equal
        shares for the tenants that have some and whose turn it is; of each the longest waiting.

        There may be more of a tenant where others had less than their share. No other node gets
        them for `hold` seconds: it is not worth its while.
        """

    async def waiting_runs(self) -> Mapping[str, int]:
        """How many runs of each tenant wait, in all its sessions; without those that have none."""

    async def hosts(self, keys: Collection[RunKey]) -> Mapping[RunKey, str]:
        """The addresses of the nodes where those runs are active; without those that are not."""

    def wake(self) -> None:
        """Wakes the other nodes, soon: one wake-up may stand for many."""


class Listener(Protocol):
    """Is told what was committed: in commit order, before the committing call returns."""

    def completed(self, events: Sequence[LoggedComplete]) -> None:
        """Terminal events were committed; their positions increase from call to call. Without any,
        events were removed from the log before this node was told of them."""

    def happened(self, key: RunKey, events: Sequence[RunEvent]) -> None:
        """Events of one run were committed; their indices increase from call to call."""


class Watcher(Protocol):
    """Is told how writing goes. Where a store keeps nothing on a disk it is told nothing."""

    def committed(self, units: int, seconds: float) -> None:
        """So many writes were committed together, and it took so long. Comes after the commit."""

    def unconfirmed(self, units: int) -> None:
        """So many writes failed as the store was away, or did not say what became of them."""


class Store(Protocol):
    """Keeps sessions, runs, transcripts and events.

    Every method may raise StoreUnavailable: the outcome of a write is then unknown, and `failed`
    tells whether the store is lost for this process.
    """

    listener: Listener | None
    """Who is told of commits. Set once, before the first commit."""

    watcher: Watcher | None
    """Who is told how writing goes. Set once, before the first commit."""

    on_failure: Callable[[StoreError], None] | None
    """Is called once, when `failed` is set. Set before the first commit."""

    @property
    def store_id(self) -> bytes:
        """8 random bytes that this store was given when it was made; cursors carry them."""

    @property
    def cluster(self) -> Cluster | None:
        """The nodes that share the store; None if it is one node's own."""

    @property
    def position(self) -> Position:
        """The position of the last terminal event that the listener was told of."""

    @property
    def behind(self) -> int:
        """How many terminal events another node has announced that the listener was not told of
        yet; 0 if the store is one node's own."""

    @property
    def compacted(self) -> Position:
        """Events up to here were removed; BEGINNING if none was."""

    @property
    def failed(self) -> StoreError | None:
        """Why the store cannot be written to any more; None while it can."""

    async def __aenter__(self) -> Self:
        """Opens the store, and brings its schema up to date. Raises StartError."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finishes the writes that were begun, and closes the store."""

    async def catch_up(self) -> None:
        """Has the listener told of all that is committed by now, by whichever node."""

    # Writing. A caller that is cancelled only stops waiting; the write goes on.

    async def commit(self, base_version: int, transition: Transition) -> int:
        """Writes a transition of a lane that was at `base_version`; all of it or nothing.

        Returns the version that the lane is at now: that of `transition.lane`, or a later one where
        a session of that id was removed before; 0 if this one was. Raises Stale and RunIdTaken.
        """

    async def append(self, key: RunKey, attempt: int, events: Sequence[RunEvent]) -> None:
        """Adds events to the active run; raises Stale if that attempt is not the active one."""

    async def create_session(self, session: NewSession) -> None:
        """Creates a session; its lane is at version 1. Raises SessionTaken."""

    async def compact(self, before: Micros, limit: int, *, keep_bytes: int | None = None) -> int:
        """Removes the oldest terminal events from the log, up to `limit` of them: those that ended
        before, and as many as it takes for `log_bytes` to be `keep_bytes` at the most.

        Returns how many. The runs and their transcripts stay; of the events of these runs only the
        last one does. Each of its transactions is short, and other writes come in between.
        """

    # Reading. Nothing that is not committed is ever read.

    async def load_lane(self, key: SessionKey) -> Lane:
        """The lane of a session; version 0 if there is none. It has no reservations."""

    async def busy_sessions(self) -> Sequence[BusySession]:
        """All sessions with runs that are not terminal, the longest waiting first."""

    async def get_run(self, key: RunKey) -> Run | None:
        """A run, with the text of its end if it has ended."""

    async def position_of(self, key: RunKey) -> Position | None:
        """Where the terminal event of a run is in the log; None if it is not there (any more)."""

    async def list_runs(
        self,
        tenant: str,
        *,
        session_id: str | None = None,
        states: Collection[RunState] = (),
        after: int | None = None,
        limit: int,
    ) -> Page[Run, int]:
        """Runs, the latest accepted first, after a place. `complete.text` is left out."""

    async def get_prompt(self, key: RunKey) -> Prompt | None:
        """The prompt of a run, whole."""

    async def run_events(
        self, key: RunKey, *, after: int, limit: int, max_bytes: int
    ) -> Sequence[RunEvent]:
        """The events of a run after an index; about `max_bytes` of them, but one at least.

        Raises CursorCompacted if the next one was removed.
        """

    async def get_session(self, key: SessionKey) -> Session | None:
        """A session."""

    async def list_sessions(
        self, tenant: str, *, after: int | None = None, limit: int
    ) -> Page[Session, int]:
        """Sessions, the latest created first, after a place."""

    async def stored_bytes(self, tenant: str) -> int:
        """About how many bytes a tenant has stored that stay until its sessions are deleted: its
        runs with their prompts and attachments, and its transcripts."""

    async def stale_sessions(self, before: Micros, limit: int) -> Sequence[IdleSession]:
        """Idle sessions of all tenants that were last written to before, the longest untouched
        first."""

    async def list_messages(
        self,
        key: SessionKey,
        *,
        after: MessagePlace | None = None,
        limit: int,
        max_bytes: int,
    ) -> Page[Message, MessagePlace]:
        """The transcript after a place, user messages with the parts of their prompts.

        About `max_bytes` of it, but one message at least.
        """

    async def log_bytes(self) -> int:
        """About how many bytes the event log has, with the events of its runs. Known at once,
        however long it is."""

    async def completes(
        self, tenant: str, wanted: EventFilter, *, after: Position, limit: int, max_bytes: int
    ) -> LogPage:
        """Terminal events after a position, in order; about `max_bytes` of them, but one at least.

        If `compacted` has passed `after` by the time this returns, events may be missing.
        """


@dataclass(frozen=True, slots=True)
class StoreError:
    """Why a store failed, in one line for the operator."""

    message: str
