"""SessionService: decode, call, encode."""

# ruff: noqa: N802 - a method is named for its rpc
from __future__ import annotations

from typing import Any, TypeAlias

import grpc
from structlog.contextvars import bind_contextvars

from runlane.v1 import session_service_pb2 as pb
from runlane.v1 import session_service_pb2_grpc
from runlane_server.access.caller import CALLER, tenant
from runlane_server.core.errors import SessionNotFound
from runlane_server.core.model import Session, SessionKey
from runlane_server.engine.coordinator import Coordinator
from runlane_server.rpc import convert, lists, validate
from runlane_server.rpc.page import PAGE_BYTES, PageTokens, collect_page
from runlane_server.rpc.session_stream import SessionStreams
from runlane_server.rpc.transcript import Mark, lay_out
from runlane_server.store.base import Page
from runlane_server.store.lookup import ListPlace

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class SessionService(session_service_pb2_grpc.SessionServiceServicer):
    """Serves sessions and their transcripts."""

    def __init__(self, coordinator: Coordinator, streams: SessionStreams) -> None:
        self._coordinator = coordinator
        self._store = coordinator.store
        self._streams = streams

    async def CreateSession(
        self, request: pb.CreateSessionRequest, context: Context
    ) -> pb.CreateSessionResponse:
        """Creates a session."""
        validate.create_session(request)
        session = await self._coordinator.sessions.create(
            request.session_id,
            title=request.title,
            metadata=dict(request.metadata),
            agent=request.agent,
            allowed_agents=CALLER.get().agents,
            tenant=tenant(),
        )
        bind_contextvars(session_id=session.session_id)
        return pb.CreateSessionResponse(session=convert.session(session))

    async def ForkSession(
        self, request: pb.ForkSessionRequest, context: Context
    ) -> pb.ForkSessionResponse:
        """Creates a session that begins with a copy of a transcript."""
        validate.fork_session(request)
        session = await self._coordinator.sessions.fork(
            request.session_id,
            request.new_session_id,
            at_turn=request.at_turn,
            allowed_agents=CALLER.get().agents,
            tenant=tenant(),
        )
        bind_contextvars(session_id=session.session_id)
        return pb.ForkSessionResponse(session=convert.session(session))

    async def GetSession(
        self, request: pb.GetSessionRequest, context: Context
    ) -> pb.GetSessionResponse:
        """Returns a session."""
        validate.session_id(request)
        session = await self._session(request.session_id)
        return pb.GetSessionResponse(session=convert.session(session))

    async def UpdateSession(
        self, request: pb.UpdateSessionRequest, context: Context
    ) -> pb.UpdateSessionResponse:
        """Changes a session."""
        change = lists.update_session(request)
        bind_contextvars(session_id=request.session_id)
        session = await self._coordinator.sessions.update(
            request.session_id,
            change,
            etag=request.etag,
            allowed_agents=CALLER.get().agents,
            tenant=tenant(),
        )
        return pb.UpdateSessionResponse(session=convert.session(session))

    async def DeleteSession(
        self, request: pb.DeleteSessionRequest, context: Context
    ) -> pb.DeleteSessionResponse:
        """Deletes an idle session."""
        validate.session_id(request)
        bind_contextvars(session_id=request.session_id)
        await self._coordinator.sessions.delete(request.session_id, tenant=tenant())
        return pb.DeleteSessionResponse()

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        """Lists sessions."""
        wanted = lists.list_sessions(request, lists.Tokens(self._store.store_id, tenant()))

        async def fetch(after: ListPlace | None, count: int) -> Page[Session, ListPlace]:
            return await self._store.list_sessions(
                tenant(), wanted.wanted, after=after, limit=count
            )

        page = await collect_page(
            fetch, convert.session, after=wanted.after, limit=wanted.page_size
        )
        response = pb.ListSessionsResponse(
            sessions=page.items, next_page_token=wanted.next_token(page.next)
        )
        if request.with_total_size:
            total = await self._store.count_sessions(tenant(), wanted.wanted)
            response.total_size = total.items
            response.total_size_is_minimum = not total.is_exact
        return response

    async def ListMessages(
        self, request: pb.ListMessagesRequest, context: Context
    ) -> pb.ListMessagesResponse:
        """Lists the messages of a session."""
        only = (request.run_id,) if request.run_id else ()
        tokens = PageTokens(
            self._store.store_id, "ListMessages", tenant(), request.session_id, *only
        )
        page_size, place = validate.list_messages(
            request, lambda: tokens.decode(request.page_token, len(Mark._fields))
        )
        start = None if place is None else Mark(*place)
        await self._session(request.session_id)
        key = SessionKey(tenant(), request.session_id)
        if start is None and request.latest_turns:
            last = (await self._store.load_lane(key)).turn
            start = Mark.before_turn(last - request.latest_turns + 1)
        page = await self._store.list_messages(
            key,
            after=None if start is None else start.read_after,
            limit=page_size,
            max_bytes=PAGE_BYTES,
            run_id=request.run_id or None,
        )
        layout = lay_out(page, start)
        return pb.ListMessagesResponse(
            messages=layout.messages,
            next_page_token="" if layout.next is None else tokens.encode(*layout.next),
        )

    # A coroutine that writes: see SubscribeRun.
    async def SubscribeSession(  # type: ignore[override]
        self, request: pb.SubscribeSessionRequest, context: Context
    ) -> None:
        """Streams sessions (R50 to R52)."""
        await self._streams.serve(request, context)

    async def _session(self, session_id: str) -> Session:
        session = await self._store.get_session(SessionKey(tenant(), session_id))
        if session is None:
            raise SessionNotFound.of(session_id)
        return session
