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
from runlane_server.rpc import convert, validate
from runlane_server.rpc.page import PAGE_BYTES, PageTokens, collect_page
from runlane_server.rpc.session_stream import SessionStreams
from runlane_server.rpc.transcript import Mark, lay_out
from runlane_server.store.base import Page

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
        session = await self._coordinator.create_session(
            request.session_id,
            title=request.title,
            metadata=dict(request.metadata),
            agent=request.agent,
            allowed_agents=CALLER.get().agents,
            tenant=tenant(),
        )
        bind_contextvars(session_id=session.session_id)
        return pb.CreateSessionResponse(session=convert.session(session))

    async def GetSession(
        self, request: pb.GetSessionRequest, context: Context
    ) -> pb.GetSessionResponse:
        """Returns a session."""
        validate.session_id(request)
        session = await self._session(request.session_id)
        return pb.GetSessionResponse(session=convert.session(session))

    async def DeleteSession(
        self, request: pb.DeleteSessionRequest, context: Context
    ) -> pb.DeleteSessionResponse:
        """Deletes an idle session."""
        validate.session_id(request)
        bind_contextvars(session_id=request.session_id)
        await self._coordinator.delete_session(request.session_id, tenant=tenant())
        return pb.DeleteSessionResponse()

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        """Lists sessions."""
        tokens = PageTokens(self._store.store_id, "ListSessions", tenant())
        page_size, place = validate.list_sessions(
            request, lambda: tokens.decode(request.page_token, 1)
        )

        async def fetch(after: int | None, count: int) -> Page[Session, int]:
            return await self._store.list_sessions(tenant(), after=after, limit=count)

        page = await collect_page(
            fetch, convert.session, after=None if place is None else place[0], limit=page_size
        )
        return pb.ListSessionsResponse(
            sessions=page.items,
            next_page_token="" if page.next is None else tokens.encode(page.next),
        )

    async def ListMessages(
        self, request: pb.ListMessagesRequest, context: Context
    ) -> pb.ListMessagesResponse:
        """Lists the messages of a session."""
        tokens = PageTokens(self._store.store_id, "ListMessages", tenant(), request.session_id)
        page_size, place = validate.list_messages(
            request, lambda: tokens.decode(request.page_token, len(Mark._fields))
        )
        start = None if place is None else Mark(*place)
        await self._session(request.session_id)
        page = await self._store.list_messages(
            SessionKey(tenant(), request.session_id),
            after=None if start is None else start.read_after,
            limit=page_size,
            max_bytes=PAGE_BYTES,
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
