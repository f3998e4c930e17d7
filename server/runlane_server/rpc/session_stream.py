"""SubscribeSession: decode, stream, encode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, TypeAlias

import grpc

from runlane.v1 import session_service_pb2 as pb
from runlane_server.access.caller import tenant
from runlane_server.cluster.relay import Relay
from runlane_server.core.errors import CursorCompacted
from runlane_server.core.model import RunEvent, RunKey, SessionKey
from runlane_server.engine.coordinator import Coordinator
from runlane_server.feed.oldest import oldest_place
from runlane_server.feed.sessions import (
    QueueChanged,
    SessionChanged,
    SessionStream,
    Snapshot,
    Step,
)
from runlane_server.rpc import convert, inputs, validate
from runlane_server.rpc.page import PAGE_BYTES
from runlane_server.rpc.session_cursor import SessionCursors

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Response: TypeAlias = pb.SubscribeSessionResponse


class SessionStreams:
    """Serves streams of sessions. `relay` brings the events of other nodes, if there are any."""

    def __init__(
        self, coordinator: Coordinator, *, progress_interval: float, relay: Relay | None
    ) -> None:
        self._coordinator = coordinator
        self._store = coordinator.store
        self._feed = coordinator.feed
        self._progress_interval = progress_interval
        self._relay = relay

    async def serve(self, request: pb.SubscribeSessionRequest, context: Context) -> None:
        """Streams sessions (R50 to R52)."""
        cursors = SessionCursors(self._store.store_id, tenant())
        starts = validate.subscribe_session(
            request, lambda ids: cursors.decode(ids, request.cursors)
        )
        stream = SessionStream(
            self._feed,
            tenant(),
            starts,
            with_deltas=request.with_deltas,
            relayed=self._relayed,
        )
        with closing(stream), self._watched(list(starts)):
            # Confirms the call, since the first event may take long.
            await context.send_initial_metadata(())
            while True:
                try:
                    found = await stream.next(self._progress_interval)
                except CursorCompacted as error:
                    raise await self._with_oldest(error, cursors) from error
                if found is None:
                    await context.write(self._progress())
                    continue
                session_id, steps = found
                for step in steps:
                    for response in _responses(session_id, step):
                        response.session_id = session_id
                        if not response.snapshot.continues:
                            response.cursor = cursors.encode(session_id, step.at)
                        await context.write(response)

    def _relayed(self, key: RunKey) -> AbstractContextManager[None]:
        return nullcontext() if self._relay is None else self._relay.follow(key)

    def _watched(self, session_ids: list[str]) -> AbstractContextManager[None]:
        """Notes the commits of other nodes."""
        if self._relay is None:
            return nullcontext()
        return self._relay.watch([SessionKey(tenant(), it) for it in session_ids])

    async def _with_oldest(
        self, error: CursorCompacted, cursors: SessionCursors
    ) -> CursorCompacted:
        """The error with the oldest cursor of its session that still works."""
        session_id = error.metadata["session_id"]
        at = await oldest_place(self._store, SessionKey(tenant(), session_id))
        oldest = cursors.encode(session_id, at)
        return CursorCompacted(error.message, metadata={**error.metadata, "oldest_cursor": oldest})

    def _progress(self) -> Response:
        time = convert.timestamp(self._coordinator.now())
        return Response(progress=Response.Progress(time=time))


def _responses(session_id: str, step: Step) -> Iterator[Response]:
    """The responses for a step; the runs of a queue may need several."""
    match step.item:
        case RunEvent() as event:
            response = Response()
            response.run_event.run_id = event.run_id
            inputs.fill_run_event(response.run_event.event, session_id, event)
            yield response
        case Snapshot() as part:
            yield from _fitting(_snapshot(session_id, part))
        case SessionChanged(session, run):
            yield Response(
                session_changed=Response.SessionChanged(
                    session=None if session is None else convert.session(session),
                    active_run=None if run is None else convert.run(run),
                )
            )
        case QueueChanged(run_ids, runs):
            for some in _split([convert.run(run) for run in runs]):
                yield Response(queue_changed=Response.QueueChanged(run_ids=run_ids, runs=some))


def _snapshot(session_id: str, part: Snapshot) -> Response:
    response = Response()
    snapshot = response.snapshot
    snapshot.continues = part.continues
    if part.session is not None:
        snapshot.session.CopyFrom(convert.session(part.session))
    if part.active_run is not None:
        snapshot.active_run.CopyFrom(convert.run(part.active_run))
    snapshot.queue.extend(map(convert.run, part.queue))
    snapshot.folded.extend(map(convert.run, part.folded))
    snapshot.input_requests.extend(map(inputs.input_request, part.inputs))
    for event in part.output:
        inputs.fill_run_event(snapshot.output.add(), session_id, event)
    return response


def _fitting(response: Response) -> Iterator[Response]:
    """A part of a snapshot as messages of about a page: fifty runs may have large labels."""
    snapshot = response.snapshot
    if response.ByteSize() > PAGE_BYTES:
        for some in _split(list(snapshot.queue)):
            yield Response(snapshot=Response.Snapshot(queue=some, continues=True))
        for some in _split(list(snapshot.folded)):
            yield Response(snapshot=Response.Snapshot(folded=some, continues=True))
        del snapshot.queue[:], snapshot.folded[:]
    yield response


def _split(messages: list[Any]) -> Iterator[list[Any]]:
    """Lists of about a page each, at least one."""
    page: list[Any] = []
    size = 0
    for message in messages:
        size += message.ByteSize()
        if page and size > PAGE_BYTES:
            yield page
            page, size = [], message.ByteSize()
        page.append(message)
    yield page
