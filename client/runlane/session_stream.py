"""Iterates over everything that happens in sessions, across lost connections and restarts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeAlias

import grpc.aio

from runlane import convert, inputs
from runlane.errors import RunlaneError, Unavailable
from runlane.inputs import InputRequest
from runlane.metadata import Metadata
from runlane.stream import ResumingStream
from runlane.types import Run, RunEvent, Session
from runlane.v1 import session_service_pb2 as pb
from runlane.wire import Wire

NO_CURSORS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SessionSnapshot:
    """A session at the beginning of its stream.

    Attributes:
        session: The session; None if it does not exist.
        active_run: The active run, if there is one.
        output: The events of the active run since its current attempt started.
        folded: The runs that joined its turn.
        queue: The waiting runs, in the order in which they start.
        input_requests: The open input requests of the active run.
    """

    session: Session | None
    active_run: Run | None
    output: tuple[RunEvent, ...]
    folded: tuple[Run, ...]
    queue: tuple[Run, ...]
    input_requests: tuple[InputRequest, ...]


@dataclass(frozen=True, slots=True)
class SessionRunEvent:
    """An event of a run of the session."""

    run_id: str
    event: RunEvent


@dataclass(frozen=True, slots=True)
class SessionChanged:
    """The session and its active run as they are now; no session: it was deleted."""

    session: Session | None
    active_run: Run | None


@dataclass(frozen=True, slots=True)
class QueueChanged:
    """The ids of the waiting runs in the order in which they start, and those of the runs that are
    new or changed."""

    run_ids: tuple[str, ...]
    runs: tuple[Run, ...]


SessionBody: TypeAlias = SessionSnapshot | SessionRunEvent | SessionChanged | QueueChanged


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """Something that happened in a session, and the position after it."""

    session_id: str
    cursor: str
    body: SessionBody


class SessionStream:
    """An endless iterator over what happens in sessions, created by `Client.subscribe_session`.

        async with client.subscribe_session("my-session") as stream:
            async for event in stream:
                ...

    Each session begins with a `SessionSnapshot`; then comes everything that happens after exactly
    its position, once. It resumes after a lost or silent connection, and when a server restarts.
    It raises `CursorCompacted` if undelivered events were removed, and other permanent errors.
    """

    def __init__(
        self,
        wire: Wire,
        session_ids: Sequence[str],
        *,
        cursors: Mapping[str, str],
        with_deltas: bool,
        silence: float,
        max_silence: float | None = None,
        on_lost: Callable[[RunlaneError], None] | None = None,
    ) -> None:
        self._wire = wire
        self._session_ids = tuple(session_ids)
        self._cursors = dict(cursors)
        self._with_deltas = with_deltas
        self._stream = ResumingStream(
            wire, self._open, silence=silence, max_silence=max_silence, on_lost=on_lost
        )
        self._parts: dict[str, pb.SubscribeSessionResponse.Snapshot] = {}
        self._closed = False

    @property
    def cursors(self) -> Mapping[str, str]:
        """The position in each session after the last delivered event; opaque.

        Pass it to a new stream to resume. A session without one begins with a snapshot.
        """
        return MappingProxyType(self._cursors)

    async def aclose(self) -> None:
        """Ends the stream and its call. Idempotent."""
        self._closed = True
        self._stream.cancel_call()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionEvent:
        while not self._closed:
            message = await self._stream.read()
            if message is None:
                # A stream is endless, so a normal end counts as a lost connection.
                await self._stream.pause_or_raise(Unavailable("the server ended the stream"))
                continue
            body = self._body(message)
            if body is None:
                continue
            if message.cursor:
                self._cursors[message.session_id] = message.cursor
            else:
                self._cursors.pop(message.session_id, None)
            return SessionEvent(message.session_id, message.cursor, body)
        raise StopAsyncIteration

    def _body(self, message: pb.SubscribeSessionResponse) -> SessionBody | None:
        """The event to deliver; None for a mark, a part of a snapshot, and an unknown event."""
        match message.WhichOneof("event"):
            case "snapshot":
                return self._snapshot(message)
            case "run_event":
                event = convert.run_event(message.run_event.event)
                return None if event is None else SessionRunEvent(message.run_event.run_id, event)
            case "session_changed":
                changed = message.session_changed
                return SessionChanged(_session(changed), _active(changed))
            case "queue_changed":
                queue = message.queue_changed
                return QueueChanged(tuple(queue.run_ids), tuple(map(convert.run, queue.runs)))
            case _:
                return None

    def _snapshot(self, message: pb.SubscribeSessionResponse) -> SessionSnapshot | None:
        whole = self._parts.setdefault(message.session_id, pb.SubscribeSessionResponse.Snapshot())
        # Each list continues that of the part before.
        whole.MergeFrom(message.snapshot)
        if message.snapshot.continues:
            return None
        del self._parts[message.session_id]
        output = map(convert.run_event, whole.output)
        return SessionSnapshot(
            session=_session(whole),
            active_run=_active(whole),
            output=tuple(event for event in output if event is not None),
            folded=tuple(map(convert.run, whole.folded)),
            queue=tuple(map(convert.run, whole.queue)),
            input_requests=tuple(map(inputs.input_request, whole.input_requests)),
        )

    def _open(
        self, metadata: Metadata
    ) -> grpc.aio.UnaryStreamCall[Any, pb.SubscribeSessionResponse]:
        self._parts.clear()
        request = pb.SubscribeSessionRequest(
            session_ids=self._session_ids,
            cursors=self._cursors.values(),
            with_deltas=self._with_deltas,
        )
        return self._wire.sessions.SubscribeSession(request, metadata=metadata)


def _session(
    message: pb.SubscribeSessionResponse.Snapshot | pb.SubscribeSessionResponse.SessionChanged,
) -> Session | None:
    return convert.session(message.session) if message.HasField("session") else None


def _active(
    message: pb.SubscribeSessionResponse.Snapshot | pb.SubscribeSessionResponse.SessionChanged,
) -> Run | None:
    return convert.run(message.active_run) if message.HasField("active_run") else None
