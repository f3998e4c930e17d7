"""The interface of a store, and the records that it returns.

A store commits each transition in one transaction and decides nothing. The lane's version is the
only concurrency control: a store refuses a commit with `Stale` if the stored lane is not at the
version that the transition started from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, Self, TypeVar

from runlane_server.core.agents import DEFAULT_AGENT
from runlane_server.core.input import InputRequest, InputState
from runlane_server.core.model import (
    NO_LABELS,
    NO_USAGE,
    Message,
    Micros,
    Origin,
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
from runlane_server.store.lane_log import LaneChange, LanePage, LanePlace
from runlane_server.store.lookup import (
    ALL_RUNS,
    ALL_SESSIONS,
    Count,
    ListPlace,
    RunFilter,
    SessionFilter,
)
from runlane_server.store.vitals import StoreVitals

if TYPE_CHECKING:
    from runlane_server.store.copies import CopyPlan
    from runlane_server.store.webhooks import WebhookStore

Item = TypeVar("Item")
Place = TypeVar("Place")

Position = int
"""A place in the event log, given by the number of the event before it. 0 is before the first."""

BEGINNING: Position = 0


class Stale(Exception):
    """The caller decided on an outdated lane or attempt. Nothing was written."""

    @classmethod
    def lane(cls) -> Stale:
        """Another commit has changed the lane."""
        return cls("the lane is not at the version that the transition started from")

    @classmethod
    def attempt(cls) -> Stale:
        """The attempt that emits is no longer the active one."""
        return cls("the attempt is not the active one")

    @classmethod
    def run(cls) -> Stale:
        """The run, or its list of events, has changed."""
        return cls("the run or its events differ from those that the transition started from")

    @classmethod
    def webhook(cls) -> Stale:
        """The webhook was changed or deleted, or another node delivers for it."""
        return cls("the webhook is not the one that the change was made from")


class RunIdTaken(Exception):
    """Another run has this id, or had it before its session was deleted. Nothing was written."""

    def __init__(self) -> None:
        super().__init__("a run with this id exists already, or existed")


class SessionTaken(Exception):
    """Another session has this id. Nothing was written."""

    def __init__(self) -> None:
        super().__init__("a session with this id exists already")


@dataclass(frozen=True, slots=True)
class LoggedComplete:
    """A terminal event in the event log. `position` orders the log."""

    position: Position
    tenant: str
    complete: RunComplete


@dataclass(frozen=True, slots=True)
class LogPage:
    """A page of the event log: all matching events up to position `scanned`."""

    events: tuple[LoggedComplete, ...]
    scanned: Position


@dataclass(frozen=True, slots=True)
class Page(Generic[Item, Place]):
    """A page of a list. `next` is the place of its last item, or None at the end of the list."""

    items: tuple[Item, ...]
    next: Place | None


@dataclass(frozen=True, slots=True)
class DeletedRun:
    """The record that remains of a run whose session was deleted. `events` is their number."""

    session_id: str
    prompt_fingerprint: str
    events: int


MessagePlace = tuple[int, int]
"""(turn, ordinal) of a message."""


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Selects the terminal events of the named sessions and runs; all events if it names none."""

    session_ids: frozenset[str] = frozenset()
    run_ids: frozenset[str] = frozenset()

    @property
    def matches_all(self) -> bool:
        """Whether the filter names neither a session nor a run."""
        return not (self.session_ids or self.run_ids)

    def matches(self, complete: RunComplete) -> bool:
        """Whether the filter selects an event."""
        return (
            self.matches_all
            or complete.session_id in self.session_ids
            or complete.run_id in self.run_ids
        )


@dataclass(frozen=True, slots=True)
class BusySession:
    """A session that has an active run or waiting runs. `agent` is that of all these runs, None if
    they have different ones. `asks`: the active run waits for an answer, and no agent works for
    it; a store that several nodes share does not tell."""

    key: SessionKey
    active: bool
    waiting_runs: int
    agent: str | None = None
    asks: bool = False


@dataclass(frozen=True, slots=True)
class IdleSession:
    """A session without open runs, at one version of its lane. `accept_seq` counts all the runs
    that it ever accepted."""

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
    agent: str = ""

    def as_session(self, origin: Origin | None = None) -> Session:
        """The session once it is created."""
        at = self.created_at
        return Session(
            self.key.session_id,
            self.title,
            self.metadata,
            active_run_id="",
            waiting_runs=0,
            usage=NO_USAGE,
            created_at=at,
            updated_at=at,
            agent=self.agent,
            origin=origin,
        )


class TenantShare(NamedTuple):
    """A tenant, and the number of further lanes of it that a node can serve."""

    tenant: str
    room: int


class AgentShare(NamedTuple):
    """An agent, and the number of further lanes whose next run it can execute on a node. The name
    is empty for runs from before agents had names."""

    agent: str
    room: int


_NO_LIMIT = (1 << 31) - 1

ONE_AGENT_SHARES = (AgentShare("", _NO_LIMIT), AgentShare(DEFAULT_AGENT, _NO_LIMIT))
"""The shares of a node with a single agent."""


@dataclass(frozen=True, slots=True)
class ClaimOrder:
    """The order in which a node claims lanes, by tenant.

    Tenants that are not in `shares` come first, each with at most `others` lanes; then those in
    `shares`, in that order. Only lanes are claimed whose next run is for one of `agents` (R32).
    """

    shares: tuple[TenantShare, ...] = ()
    others: int = _NO_LIMIT
    agents: tuple[AgentShare, ...] = ONE_AGENT_SHARES


@dataclass(frozen=True, slots=True)
class HostedRun:
    """An attempt of an active run, and the session of its lane.

    `host`: the node that it was lost with, if it was; it may have moved to another one since.
    """

    session: SessionKey
    run_id: str
    attempt: int
    host: str | None = field(default=None, compare=False)


class AnsweredRun(NamedTuple):
    """A run that waits for no more input: its session, and its place among all runs."""

    session: SessionKey
    place: int


@dataclass(frozen=True, slots=True)
class DueInput:
    """An open input request whose time is over."""

    session: SessionKey
    run_id: str
    input_request_id: str


class Cluster(Protocol):
    """The nodes that share a store.

    All times are the store's own clock. Every method may raise StoreUnavailable.
    """

    @property
    def node_keys(self) -> Sequence[str]:
        """The secrets with which the nodes of this store sign their calls to each other, newest
        first: one, or two after a rotation. ASCII."""

    async def refresh_node_keys(self) -> None:
        """Reads `node_keys` again."""

    on_wake: Callable[[], None] | None
    """Called when another node announces work: runs that wait for a node, or cancels. A call may be
    superfluous, and a call may be lost; poll as well."""

    async def join(self, node_id: str, address: str) -> None:
        """Registers a node as alive, with the address at which the other nodes reach it."""

    async def heartbeat(self, node_id: str, lease: float) -> bool:
        """Renews the lease of a node. Returns False if the node was declared dead, or has left.

        Also declares dead, permanently, every node without a heartbeat for `lease` seconds. A node
        that was itself silent for that long, for example because the store was unavailable, does
        not declare others dead at once.
        """

    async def leave(self, node_id: str) -> None:
        """Removes a node. Runs that are still active on it count as lost."""

    async def lost_runs(self, limit: int, node_id: str = "") -> Sequence[HostedRun]:
        """Active runs whose node is dead or gone, the longest active first.

        With a node: only its share. Each run is in the share of one of the nodes that are alive.
        """

    async def cancelled_runs(self, node_id: str) -> Sequence[HostedRun]:
        """Active runs of a node that a cancel covers."""

    async def answered_runs(self, node_id: str, after: int, limit: int) -> Sequence[AnsweredRun]:
        """Active runs that have waited for input and need none any more, behind the place `after`:
        those whose agent waits on this node, and those without a node. The oldest come first; their
        places are greater than 0."""

    async def claim(
        self, node_id: str, limit: int, hold: float, order: ClaimOrder | None = None
    ) -> Sequence[SessionKey]:
        """Claims up to `limit` lanes that have waiting runs and no active one.

        The tenants get equal shares, in the given order; within a tenant the lane that waits
        longest comes first. A tenant gets more than its share where others need less than theirs.
        No other node gets these lanes for `hold` seconds, as this one is about to start them.
        """

    async def waiting_runs(self) -> Mapping[str, int]:
        """The number of waiting runs by tenant, over all sessions. Tenants without any are left
        out."""

    async def hosts(self, keys: Collection[RunKey]) -> Mapping[RunKey, str]:
        """The addresses of the nodes on which these runs are active. Other runs are left out."""

    async def lane_versions(self, keys: Collection[SessionKey]) -> Mapping[SessionKey, int]:
        """The versions of lanes. Sessions that do not exist are left out."""

    def wake(self) -> None:
        """Announces work to the other nodes soon. Announcements are coalesced."""


class Listener(Protocol):
    """Receives what was committed, in commit order, before the committing call returns."""

    def on_completes(self, events: Sequence[LoggedComplete]) -> None:
        """Terminal events were committed; positions increase from call to call. An empty sequence
        means that events were removed from the log before this node had read them."""

    def on_run_events(self, key: RunKey, events: Sequence[RunEvent]) -> None:
        """Events of one run were committed; indices increase from call to call."""

    def on_lane(self, change: LaneChange) -> None:
        """This node committed a change of a lane, whose events were passed on before."""


class WriteObserver(Protocol):
    """Receives the outcome of writes, for metrics. The memory store never calls it."""

    def on_committed(self, units: int, seconds: float) -> None:
        """A number of units were committed in one transaction, in that many seconds."""

    def on_unconfirmed(self, units: int) -> None:
        """A number of units failed, or their outcome is unknown, as the store was unavailable."""


class Store(Protocol):
    """Keeps sessions, runs, transcripts and events.

    Every method may raise StoreUnavailable. The outcome of a write is then unknown, and `failed`
    is set if this process can no longer use the store.
    """

    listener: Listener | None
    """Receives commits. Set it once, before the first commit."""

    write_observer: WriteObserver | None
    """Receives the outcome of writes. Set it once, before the first commit."""

    on_failure: Callable[[StoreError], None] | None
    """Called once, when `failed` is set. Set it before the first commit."""

    @property
    def store_id(self) -> bytes:
        """8 random bytes that identify this store. They are secret: they are the key of cursors."""

    @property
    def cluster(self) -> Cluster | None:
        """The nodes that share the store; None if only one node can use it."""

    @property
    def webhooks(self) -> WebhookStore:
        """The webhooks, and the input requests of the event log."""

    @property
    def position(self) -> Position:
        """The position of the last terminal event that the listener has received."""

    @property
    def behind(self) -> int:
        """The number of terminal events that other nodes have announced and the listener has not
        received; 0 if only one node can use the store."""

    @property
    def compacted(self) -> Position:
        """The position of the last event that was removed; BEGINNING if none was."""

    def compacted_of(self, tenant: str) -> Position:
        """The position up to which the events of a tenant were removed."""

    @property
    def failed(self) -> StoreError | None:
        """The reason why the store is no longer writable; None while it is."""

    async def __aenter__(self) -> Self:
        """Opens the store and migrates its schema. Raises StartError."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finishes pending writes and closes the store."""

    async def catch_up(self) -> None:
        """Passes to the listener everything that any node has committed so far."""

    # Writing. Cancelling a caller ends its wait only; the write continues.

    async def commit(self, base_version: int, transition: Transition) -> int:
        """Writes a transition of a lane that was at `base_version`, in one transaction.

        Returns the new version of the lane: that of `transition.lane`, or a later one if an earlier
        session with this id was removed; 0 if the transition removes the session. Raises Stale and
        RunIdTaken.
        """

    async def append(
        self, key: RunKey, attempt: int, events: Sequence[RunEvent], *, host: str = ""
    ) -> None:
        """Adds events to the active run.

        Raises Stale if that attempt is not the active one, or, in a shared store, not active on
        node `host`: an attempt that moves to another node keeps its number (R33, R36).
        """

    async def keep_part(
        self, key: RunKey, attempt: int, number: int, part: Part, *, host: str = ""
    ) -> None:
        """Stores a part of a long message before the message, which refers to it by a `KeptPart`.

        It may be repeated. The first one of an attempt removes those of earlier attempts. Raises
        Stale as `append` does.
        """

    async def discard(self, key: SessionKey, at: Micros) -> None:
        """Removes a session whose lane cannot be loaded, with all that belongs to it.

        Each of its open runs gets a terminal event: FAILED with CORRUPT_RECORD (R21). Does nothing
        if there is no session.
        """

    async def create_session(self, session: NewSession) -> None:
        """Creates a session with a lane at version 1. Raises SessionTaken."""

    async def plan_copy(self, key: SessionKey, turn: int) -> CopyPlan | None:
        """The plan of a copy of a transcript up to and with a turn that has ended; None if there is
        no session."""

    async def fork_session(self, plan: CopyPlan, session: NewSession) -> None:
        """Creates a session that begins with a copy, which is made piece by piece.

        Nobody sees the session before the copy is whole, and nothing stays of a copy that fails.
        Raises SessionTaken, and Stale if the source was deleted meanwhile.
        """

    async def edit_session(self, key: SessionKey, before: Session, after: Session) -> bool:
        """Writes the title, the labels and the agent of a session, if they are those of `before`.

        Returns False if they are not, or if the lane changed meanwhile. It leads the lane to the
        next version, as a commit without events does: that is how followers of the session, and
        lanes that any node has cached, notice it.
        """

    async def compact(self, before: Micros, limit: int, *, keep_bytes: int | None = None) -> int:
        """Removes the oldest terminal events from the log; returns the number removed.

        It removes up to `limit` events: those of runs that ended before `before`, and further ones
        until `log_bytes` is at most `keep_bytes`, of the tenants with the largest logs only (see
        `compaction.largest_log`). The runs and their transcripts stay; of the
        events of these runs only the last stays. It works in short transactions, with other writes
        in between.
        """

    async def forget_deleted(self, before: Micros, limit: int) -> int:
        """Forgets up to `limit` runs that were deleted before a time; returns the number.

        Their ids can then be used again.
        """

    async def remove_deleted(self) -> bool:
        """Removes a piece of what belonged to deleted sessions and to forks that failed; returns
        whether there was anything to remove.

        A commit that deletes a session removes all of a small one. For readers the rest does not
        exist; until it is gone, the id of the session is taken (`Lane.is_being_removed`). It may be
        called on any node.
        """

    # Reading. Reads see committed data only.

    async def load_lane(self, key: SessionKey) -> Lane:
        """The lane of a session, at version 0 if there is no session. It has no reservations."""

    async def busy_sessions(self) -> Sequence[BusySession]:
        """All sessions with open runs, the longest waiting first."""

    async def get_run(self, key: RunKey) -> Run | None:
        """A run; if it has ended, with the text of its RunComplete."""

    async def get_deleted_run(self, key: RunKey) -> DeletedRun | None:
        """A run whose session was deleted, unless it was forgotten since."""

    async def position_of(self, key: RunKey) -> Position | None:
        """The position of a run's terminal event; None if it is not in the log, or was removed."""

    async def list_runs(
        self,
        tenant: str,
        wanted: RunFilter = ALL_RUNS,
        *,
        after: ListPlace | None = None,
        limit: int,
    ) -> Page[Run, ListPlace]:
        """A page of runs after a place. `complete.text` is empty.

        It reads at most `SCAN_ROWS` runs, so a page that has `next` may be short or empty.
        """

    async def count_runs(self, tenant: str, wanted: RunFilter) -> Count:
        """The number of runs in a list, among its first `COUNT_ROWS`."""

    async def get_prompt(self, key: RunKey) -> Prompt | None:
        """The full prompt of a run."""

    async def run_events(
        self, key: RunKey, *, after: int, limit: int, max_bytes: int
    ) -> Sequence[RunEvent]:
        """The events of a run after an index: about `max_bytes` bytes, and at least one event.

        Raises CursorCompacted if the next event was removed.
        """

    async def lane_events(
        self, key: SessionKey, *, after: LanePlace, limit: int, max_bytes: int
    ) -> LanePage:
        """The events of a session after a place in the log of its lane, in order (R52): about
        `max_bytes` bytes, and at least one event.

        Raises CursorCompacted if an event of the page was removed; see also `LanePage.start`.
        """

    async def get_input(self, tenant: str, input_request_id: str) -> InputRequest | None:
        """An input request."""

    async def find_input(self, key: RunKey, question_key: str) -> InputRequest | None:
        """The input request of a run with this key (R44)."""

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
        """A page of input requests after a place, the latest first."""

    async def due_inputs(self, now: Micros, limit: int) -> Sequence[DueInput]:
        """Open requests of all tenants that have expired, the longest due first. A store with a
        clock of its own ignores `now` (R43)."""

    async def get_session(self, key: SessionKey) -> Session | None:
        """A session, or None."""

    async def list_sessions(
        self,
        tenant: str,
        wanted: SessionFilter = ALL_SESSIONS,
        *,
        after: ListPlace | None = None,
        limit: int,
    ) -> Page[Session, ListPlace]:
        """A page of sessions after a place. As with `list_runs`, it may be short."""

    async def count_sessions(self, tenant: str, wanted: SessionFilter) -> Count:
        """The number of sessions in a list, among its first `COUNT_ROWS`."""

    async def stored_bytes(self, tenant: str) -> int:
        """The approximate size in bytes of a tenant's runs, prompts, attachments and transcripts:
        all that stays until its sessions are deleted."""

    async def stale_sessions(self, before: Micros, limit: int) -> Sequence[IdleSession]:
        """Idle sessions of all tenants whose last write was before `before`, the oldest first."""

    async def list_messages(
        self,
        key: SessionKey,
        *,
        after: MessagePlace | None = None,
        limit: int,
        max_bytes: int,
        run_id: str | None = None,
    ) -> Page[Message, MessagePlace]:
        """A page of the transcript after a place: about `max_bytes` bytes, at least one message.

        `run_id` selects the messages of one run. User messages have the parts of their prompts.
        """

    async def log_bytes(self) -> int:
        """The approximate size in bytes of the event log and the events of its runs. The cost of
        the call does not depend on the length of the log."""

    async def vitals(self) -> StoreVitals:
        """Size, free disk, and the age of the oldest work. It reads the open runs once."""

    async def completes(
        self, tenant: str, wanted: EventFilter, *, after: Position, limit: int, max_bytes: int
    ) -> LogPage:
        """Terminal events after a position, in order: about `max_bytes` bytes, at least one event.

        Events may be missing if `compacted_of(tenant)` is beyond `after` when this returns.
        """


@dataclass(frozen=True, slots=True)
class StoreError:
    """The reason why a store failed, in one line for the operator."""

    message: str
