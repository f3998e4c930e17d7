"""The rows of the store in memory: sessions with their lanes and transcripts, and runs."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from runlane_server.core.input import InputChange, InputRequest, InputState
from runlane_server.core.model import (
    Attachment,
    KeptPart,
    Message,
    Micros,
    Origin,
    Part,
    Prompt,
    Role,
    Run,
    RunComplete,
    RunEvent,
    RunKey,
    RunState,
    Session,
    SessionKey,
    Text,
    Usage,
    utf8_size,
)
from runlane_server.core.transition import Lane, LaneRun, RunChange, Transition, describe
from runlane_server.core.update import RunContent
from runlane_server.store.base import (
    DeletedRun,
    MessagePlace,
    NewSession,
    RunIdTaken,
    SessionTaken,
    Stale,
)
from runlane_server.store.codec import encode_parts
from runlane_server.store.copies import CopyPlan
from runlane_server.store.inputs import input_weight
from runlane_server.store.lane_log import LaneEntry, LanePlace, entries_of
from runlane_server.store.paging import event_size
from runlane_server.store.records import prompt_parts
from runlane_server.store.weight import (
    MESSAGE_BYTES,
    kept_weight,
    message_weight,
    run_weight,
    session_growth,
    session_weight,
)

PIECE_RUNS = 200


@dataclass(slots=True)
class RunRow:
    """A run with its prompt and its events. `number` orders runs by acceptance; `kept` has the
    parts of long messages, by attempt and number."""

    number: int
    run: Run
    prompt: Prompt
    events: list[RunEvent] = field(default_factory=list)
    kept: dict[tuple[int, int], Part] = field(default_factory=dict)

    @property
    def shown(self) -> Run:
        """The run with the index of its last event."""
        return self.run._replace(last_event_index=self.events[-1].index)


@dataclass(slots=True)
class SessionRow:
    """A session with its lane, its transcript, and the log of its lane after `log_start`. `number`
    orders sessions by creation; `copied` are the messages of a fork that its origin had, whole."""

    number: int
    session: Session
    lane: Lane
    messages: list[Message] = field(default_factory=list)
    copied: Sequence[Message] = ()
    run_ids: list[str] = field(default_factory=list)
    stored_bytes: int = 0
    log: list[LaneEntry] = field(default_factory=list)
    log_start: LanePlace = 0


@dataclass(slots=True)
class InputRow:
    """An input request. `number` orders requests."""

    number: int
    request: InputRequest


class Tables:
    """All sessions and runs. A write raises before it changes anything.

    `piece_runs`: the most runs of a deleted session that are removed at once.
    """

    def __init__(self) -> None:
        self.piece_runs = PIECE_RUNS
        self.sessions: dict[SessionKey, SessionRow] = {}
        self.runs: dict[RunKey, RunRow] = {}
        self.inputs: dict[tuple[str, str], InputRow] = {}
        self.deleted: dict[RunKey, tuple[Micros, DeletedRun]] = {}
        self.removals: dict[SessionKey, list[str]] = {}
        """The runs of deleted sessions that are still to be removed."""
        self._numbers = 0

    def commit(self, base_version: int, transition: Transition) -> None:
        """Writes a transition. Raises Stale and RunIdTaken."""
        self._check(base_version, transition)
        if transition.removed:
            self.remove(transition.lane.key)
        else:
            self._apply(transition)

    def append(self, key: RunKey, attempt: int, host: str, events: Sequence[RunEvent]) -> None:
        """Adds events to the active run. Raises Stale."""
        row = self._active(key, attempt, host)
        if row.events[-1].index >= events[0].index:
            raise Stale.attempt()
        row.events += events
        session = self.sessions[SessionKey(key.tenant, row.run.session_id)]
        session.lane = _with_events(session.lane, key.run_id, events[-1].index)

    def keep_part(self, key: RunKey, attempt: int, host: str, number: int, part: Part) -> None:
        """Keeps a part of a long message of the active run. Raises Stale."""
        row = self._active(key, attempt, host)
        if number == 0:
            row.kept = {place: kept for place, kept in row.kept.items() if place[0] == attempt}
        row.kept[attempt, number] = part

    def _active(self, key: RunKey, attempt: int, host: str) -> RunRow:
        """A run whose active attempt it is, on its host. Raises Stale."""
        row = self.runs.get(key)
        if (
            row is None
            or row.run.state not in {RunState.ACTIVE, RunState.CANCELLING}
            or row.run.folded_into
            or row.run.attempt != attempt
        ):
            raise Stale.attempt()
        active = self.sessions[SessionKey(key.tenant, row.run.session_id)].lane.active
        if active is None or active.host != host:
            raise Stale.attempt()
        return row

    def create_session(self, new: NewSession) -> None:
        """Creates a session. Raises SessionTaken."""
        if new.key in self.sessions or new.key in self.removals:
            raise SessionTaken
        row = self._new_session(Lane(new.key, version=1, agent=new.agent), new.created_at)
        row.session = replace(row.session, title=new.title, metadata=new.metadata, agent=new.agent)
        row.stored_bytes = session_weight(new.title, new.metadata)

    def transcript_size(self, key: SessionKey, turn: int) -> int:
        """The bytes that a copy of a transcript up to and with a turn counts as."""
        row = self.sessions[key]
        return sum(_size_of_copy(message) for message in self._up_to(key, row, turn))

    def fork_session(self, plan: CopyPlan, new: NewSession) -> None:
        """Creates a session with a copy of a transcript. Raises SessionTaken and Stale."""
        source = self.sessions.get(plan.source)
        if source is None or source.number != plan.session_no:
            raise Stale.lane()
        copied = self._up_to(plan.source, source, plan.turn)
        self.create_session(new)
        row = self.sessions[new.key]
        row.copied = copied
        row.stored_bytes += plan.size
        row.lane = row.lane._replace(turn=plan.turn)
        origin = Origin(plan.source.session_id, plan.turn)
        row.session = replace(row.session, origin=origin)

    def _up_to(self, key: SessionKey, row: SessionRow, turn: int) -> Sequence[Message]:
        own = (self.full_message(key.tenant, message) for message in row.messages)
        return [message for message in (*row.copied, *own) if message.turn <= turn]

    def edit_session(self, key: SessionKey, before: Session, after: Session) -> int:
        """Writes what callers may change of a session, if it is what it was.

        Returns the new version of the lane; 0 if nothing was written.
        """
        row = self.sessions.get(key)
        if row is None or row.session.etag != before.etag:
            return 0
        row.lane = row.lane._replace(agent=after.agent, version=row.lane.version + 1)
        row.session = replace(
            row.session,
            title=after.title,
            metadata=after.metadata,
            agent=after.agent,
            updated_at=max(row.session.updated_at, after.updated_at),
        )
        row.stored_bytes += session_growth(before, after)
        return row.lane.version

    def lane(self, key: SessionKey) -> Lane:
        """The lane of a session. It counts the events of the active run, as a commit may have been
        decided before the last of them was added."""
        row = self.sessions.get(key)
        if row is None or row.lane.active is None:
            return self._missing(key) if row is None else row.lane
        run_id = row.lane.active.run_id
        events = self.runs[RunKey(key.tenant, run_id)].events
        return _with_events(row.lane, run_id, events[-1].index)

    def _missing(self, key: SessionKey) -> Lane:
        return Lane(key, is_being_removed=key in self.removals)

    def shown(self, key: RunKey) -> RunRow | None:
        """A run, unless its session was deleted."""
        row = self.runs.get(key)
        return None if row is None or self.is_removed(key.tenant, row.run.session_id) else row

    def is_removed(self, tenant: str, session_id: str) -> bool:
        """Whether something of a deleted session is still to be removed."""
        return bool(self.removals) and SessionKey(tenant, session_id) in self.removals

    def events_size(self, key: RunKey) -> int:
        """The size in bytes of the events of a run that has ended, without its RunComplete; 0 if
        the run was removed."""
        row = self.runs.get(key)
        return 0 if row is None else sum(event_size(event) for event in row.events[:-1])

    def full_message(self, tenant: str, message: Message) -> Message:
        """A message with its parts; those of a user message stand in the prompt of its run."""
        row = self.runs[RunKey(tenant, message.run_id)]
        if message.role is Role.USER:
            return message._replace(parts=prompt_parts(row.prompt))
        return message._replace(
            parts=tuple(
                row.kept[part.attempt, part.number] if isinstance(part, KeptPart) else part
                for part in message.parts
            )
        )

    def _check(self, base_version: int, transition: Transition) -> None:
        key = transition.lane.key
        session = self.sessions.get(key)
        if base_version != (0 if session is None else session.lane.version):
            raise Stale.lane()
        if session is None and key in self.removals:
            raise Stale.lane()
        for change in transition.runs:
            run = RunKey(key.tenant, change.run.run_id)
            if change.request is not None and (run in self.runs or run in self.deleted):
                raise RunIdTaken
        for event in transition.events:
            row = self.runs.get(RunKey(key.tenant, event.run_id))
            if row is not None and row.events[-1].index >= event.index:
                raise Stale.run()

    def remove(self, key: SessionKey) -> None:
        """Removes a session, with the first piece of what belongs to it."""
        row = self.sessions.pop(key)
        # Open runs, of a session that is discarded, go at once.
        open_runs = {run.run_id for run in row.lane.runs}
        self._remove_runs(key, open_runs)
        self.removals[key] = [it for it in row.run_ids if it not in open_runs]
        self._remove_piece(key)

    def remove_deleted(self) -> bool:
        """Removes a piece of what belongs to deleted sessions; returns whether there was any."""
        key = next(iter(self.removals), None)
        if key is not None:
            self._remove_piece(key)
        return key is not None

    def _remove_piece(self, key: SessionKey) -> None:
        left = self.removals[key]
        piece = left[-self.piece_runs :]
        del left[-self.piece_runs :]
        self._remove_runs(key, set(piece))
        if not left:
            del self.removals[key]

    def _remove_runs(self, key: SessionKey, run_ids: Collection[str]) -> None:
        at = time.time_ns() // 1_000
        for name in [it for it, row in self.inputs.items() if row.request.run_id in run_ids]:
            if name[0] == key.tenant:
                del self.inputs[name]
        for run_id in run_ids:
            row = self.runs.pop(RunKey(key.tenant, run_id))
            self.deleted[RunKey(key.tenant, run_id)] = (at, _as_deleted(row))

    def trim(self, key: RunKey) -> None:
        """Removes the events of a run that has ended, except for the last one, and the log of its
        lane up to its end."""
        row = self.runs[key]
        del row.events[:-1]
        session = self.sessions.get(SessionKey(key.tenant, row.run.session_id))
        if session is None:
            return  # it was deleted
        last = row.events[-1]
        for entry in session.log:
            if (entry.event.run_id, entry.event.index) == (last.run_id, last.index):
                session.log_start = entry.place
                session.log = [it for it in session.log if it.place > entry.place]
                return

    def deleted_run(self, key: RunKey) -> DeletedRun | None:
        """A run whose session was deleted."""
        row = self.runs.get(key)
        if row is not None and self.is_removed(key.tenant, row.run.session_id):
            return _as_deleted(row)
        _, deleted = self.deleted.get(key, (0, None))
        return deleted

    def forget_deleted(self, before: Micros, limit: int) -> int:
        """Forgets the runs that were deleted before a time."""
        old = [key for key, (at, _) in self.deleted.items() if at < before][:limit]
        for key in old:
            del self.deleted[key]
        return len(old)

    def _apply(self, transition: Transition) -> None:
        lane = transition.lane
        at = max((event.at for event in transition.events), default=0)
        # Before anything changes: it raises if a part cannot be encoded.
        added = message_weight([encode_parts(it.parts) for it in transition.messages])
        added += kept_weight(transition.messages)
        row = self.sessions.get(lane.key) or self._new_session(lane, at)
        row.lane = lane._replace(reservations=())
        row.messages += transition.messages
        row.stored_bytes += added
        row.messages.sort(key=place_of)
        usage = sum((complete.usage for complete in transition.completes), start=row.session.usage)
        row.session = replace(
            row.session,
            active_run_id="" if lane.active is None else lane.active.run_id,
            waiting_runs=len(lane.waiting),
            usage=usage,
            updated_at=max(row.session.updated_at, at),
        )
        for change in transition.runs:
            self._change_run(row, change)
        for event in transition.events:
            self.runs[RunKey(lane.key.tenant, event.run_id)].events.append(event)
        row.log += entries_of(lane.version, transition.events)
        row.stored_bytes += input_weight(transition.inputs)
        for input_change in transition.inputs:
            self._change_input(lane.key.tenant, input_change)

    def _change_run(self, session: SessionRow, change: RunChange) -> None:
        key = RunKey(session.lane.key.tenant, change.run.run_id)
        if change.request is not None:
            run = describe(session.lane.key, change.run, change.request, change.complete)
            self.runs[key] = RunRow(self._next_number(), run, change.request.prompt)
            session.run_ids.append(key.run_id)
            session.stored_bytes += run_weight(change.request)
        row = self.runs[key]
        row.run = _changed_run(row.run, change.run, change.complete)
        if change.edit is not None:
            _edit_run(row, change.run, change.edit.content)
            session.stored_bytes += change.edit.growth

    def _change_input(self, tenant: str, change: InputChange) -> None:
        key = (tenant, change.input_request_id)
        if change.request is not None:
            self.inputs[key] = InputRow(self._next_number(), change.request)
        row = self.inputs[key]
        if change.state is not InputState.OPEN:
            row.request = row.request._replace(
                state=change.state, closed_at=change.at, answer=change.answer
            )

    def input_request(self, tenant: str, name: str) -> InputRequest | None:
        """An input request."""
        row = self.inputs.get((tenant, name))
        if row is None or self.is_removed(tenant, row.request.session_id):
            return None
        return row.request

    def _new_session(self, lane: Lane, at: Micros) -> SessionRow:
        session = Session(
            session_id=lane.key.session_id,
            title="",
            metadata={},
            active_run_id="",
            waiting_runs=0,
            usage=Usage(),
            created_at=at,
            updated_at=at,
        )
        row = SessionRow(self._next_number(), session, lane)
        self.sessions[lane.key] = row
        return row

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers


def _as_deleted(row: RunRow) -> DeletedRun:
    return DeletedRun(row.run.session_id, row.run.prompt_fingerprint, row.events[-1].index)


def place_of(message: Message) -> MessagePlace:
    """The place of a message in its transcript."""
    return message.turn, message.ordinal


def _size_of_copy(message: Message) -> int:
    if message.role is not Role.USER:
        return message_weight([encode_parts(message.parts)])
    return MESSAGE_BYTES + sum(
        utf8_size(part.text) if isinstance(part, Text) else part.size
        for part in message.parts
        if isinstance(part, Text | Attachment)
    )


def _changed_run(run: Run, change: LaneRun, complete: RunComplete | None) -> Run:
    return run._replace(
        state=change.state,
        attempt=change.attempt,
        started_at=change.started_at,
        ended_at=None if complete is None else complete.ended_at,
        folded_into=change.folded_into,
        complete=complete,
    )


def _edit_run(row: RunRow, run: LaneRun, content: RunContent | None) -> None:
    """Writes an update of a run while it waited."""
    row.run = row.run._replace(
        when_busy=run.when_busy, revision=run.revision, last_update=run.last_update
    )
    if content is not None:
        row.prompt = content.prompt
        row.run = row.run._replace(prompt_excerpt=content.prompt.excerpt, metadata=content.metadata)


def _with_events(lane: Lane, run_id: str, events: int) -> Lane:
    active = lane.active
    if active is None or active.run_id != run_id:
        return lane
    return lane._replace(active=active._replace(events=events))
