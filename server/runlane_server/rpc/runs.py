"""RunService: decode, call, encode."""

# ruff: noqa: N802 - a method is named for its rpc
from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, closing, nullcontext
from typing import Any, TypeAlias

import grpc
from structlog.contextvars import bind_contextvars

from runlane.v1 import run_service_pb2 as pb
from runlane.v1 import run_service_pb2_grpc
from runlane_server.access.caller import CALLER, CREDENTIALS, tenant
from runlane_server.cluster.relay import Relay
from runlane_server.core.errors import (
    CursorCompacted,
    Draining,
    InvalidArgument,
    PermissionDenied,
)
from runlane_server.core.input import InputRequest
from runlane_server.core.model import Run, RunComplete, RunKey
from runlane_server.core.trace import log_fields, traceparent_of
from runlane_server.engine.coordinator import Coordinator
from runlane_server.rpc import convert, inputs, lists, updates, validate
from runlane_server.rpc.cursor import Cursors
from runlane_server.rpc.event_cache import EventCache, RunEventCache
from runlane_server.rpc.page import MESSAGE_BYTES, PAGE_BYTES, PageTokens, collect_page
from runlane_server.store.base import Page, Position
from runlane_server.store.lookup import ListPlace

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RunService(run_service_pb2_grpc.RunServiceServicer):
    """Accepts, cancels and follows runs.

    A subscription gets a progress mark after `progress_interval` idle seconds. `relay` brings the
    events of other nodes, if there are any. With `requires_digest` the answer to an approval must
    name the digest of the question.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        progress_interval: float,
        relay: Relay | None = None,
        requires_digest: bool = False,
    ) -> None:
        self._coordinator = coordinator
        self._requires_digest = requires_digest
        self._relay = relay
        self._store = coordinator.store
        self._feed = coordinator.feed
        self._progress_interval = progress_interval
        self._cursors = Cursors(self._store.store_id)
        self._events = EventCache(self._cursors)
        self._run_events = RunEventCache()

    # --- Accept and cancel ----------------------------------------------------------------------

    async def RunAccepted(
        self, request: pb.RunAcceptedRequest, context: Context
    ) -> pb.RunAcceptedResponse:
        """Accepts a run (R1 to R6)."""
        wanted = validate.run_accepted(request, self._coordinator.limits)
        trace = traceparent_of(CREDENTIALS.get().metadata)
        with self._coordinator.begin_accepted(
            request.session_id, wanted.run_id, tenant=tenant()
        ) as accepted:
            bind_contextvars(
                session_id=accepted.session_id, run_id=accepted.run_id, **log_fields(trace)
            )
            acceptance = await self._coordinator.run_accepted(
                accepted,
                wanted._replace(run_id=accepted.run_id, trace=trace),
                allow_missing=request.allow_missing,
                allowed_agents=CALLER.get().agents,
            )
        return pb.RunAcceptedResponse(
            run=convert.run(acceptance.run),
            cursor=self._cursors.encode(tenant(), acceptance.position),
        )

    async def UpdateRun(
        self, request: pb.UpdateRunRequest, context: Context
    ) -> pb.UpdateRunResponse:
        """Edits or moves a waiting run (R46, R47)."""
        bind_contextvars(run_id=request.run_id)
        patch = updates.update_run(request)
        run = await self._coordinator.updates.update(
            tenant(), request.run_id, patch, allowed_agents=CALLER.get().agents
        )
        bind_contextvars(session_id=run.session_id)
        return pb.UpdateRunResponse(run=convert.run(run))

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """Cancels runs of a session (R10 to R20)."""
        scope = validate.cancel(request)
        bind_contextvars(session_id=request.session_id, run_id=request.run_id)
        receipt = await self._coordinator.cancel(
            request.session_id,
            scope=scope,
            run_id=request.run_id,
            reason=request.reason,
            tenant=tenant(),
        )
        return pb.CancelResponse(
            cancelled=convert.cancelled_runs(receipt), fence_accept_seq=receipt.fence_accept_seq
        )

    async def CancelAll(
        self, request: pb.CancelAllRequest, context: Context
    ) -> pb.CancelAllResponse:
        """Cancels runs of all sessions of the tenant (R18, R20)."""
        if request.page_size or request.page_token:
            return await self._cancel_page(request)
        validate.cancel_all(request)
        receipts = await self._coordinator.cancel_all(reason=request.reason, tenant=tenant())
        shown, omitted = convert.fitting_cancellations(receipts, PAGE_BYTES)
        return pb.CancelAllResponse(sessions=shown, omitted_runs=omitted)

    async def _cancel_page(self, request: pb.CancelAllRequest) -> pb.CancelAllResponse:
        owner = tenant()
        tokens = PageTokens(self._store.store_id, "CancelAll", owner)
        max_runs, after = validate.cancel_page(
            request, lambda: tokens.decode_id(request.page_token)
        )
        page = await self._coordinator.cancel_page(
            after=after, max_runs=max_runs, reason=request.reason, tenant=owner
        )
        shown, omitted = convert.fitting_cancellations(page.receipts, MESSAGE_BYTES)
        return pb.CancelAllResponse(
            sessions=shown, next_page_token=tokens.encode_id(page.next), omitted_runs=omitted
        )

    # --- Follow ---------------------------------------------------------------------------------

    # Both streams are coroutines that write. The stub expects async generators, but grpc closes
    # those in another task when the call is cancelled.

    async def SubscribeRunComplete(  # type: ignore[override]
        self, request: pb.SubscribeRunCompleteRequest, context: Context
    ) -> None:
        """Streams terminal events (R21 to R25)."""
        wanted, start = validate.subscribe_run_complete(request, lambda: self._start(request))
        if request.from_beginning:
            # Another node may have compacted the log.
            await self._store.catch_up()
            start = self._start(request)
        place = _Place(start)
        async with self._resumable(place):
            if place.at > self._feed.position:
                # The cursor of another node may be ahead of this one.
                await self._store.catch_up()
            with closing(self._feed.subscribe(tenant(), wanted, place.at)) as subscription:
                await context.write(self._progress(place.at))
                while True:
                    page = await subscription.next(self._progress_interval)
                    for event in page.events:
                        await context.write(self._events.encode(event))
                        place.at = event.position
                    if not page.events:
                        place.at = page.scanned
                        await context.write(self._progress(place.at))

    async def SubscribeRun(  # type: ignore[override]
        self, request: pb.SubscribeRunRequest, context: Context
    ) -> None:
        """Streams the events of a run, up to its terminal event."""
        validate.subscribe_run(request)
        bind_contextvars(run_id=request.run_id)
        _check_peer(request.run_id)
        run = await self._coordinator.get_run(request.run_id, tenant=tenant())
        key = RunKey(tenant(), request.run_id)
        session_id = run.session_id
        del run  # a stream that lasts would keep its whole text
        if await self._has_seen_end(key, request.after_index):
            return
        with (
            closing(self._feed.follow(key, request.after_index)) as follower,
            self._relayed(key),
        ):
            # Confirms the call, since its first event may take long.
            await context.send_initial_metadata(())
            while True:
                events = await follower.next(self._progress_interval)
                if not events:
                    await context.write(self._run_progress())
                for event in events:
                    is_shared = follower.has_company
                    encoded = self._run_events.encode(session_id, event, is_shared=is_shared)
                    await context.write(encoded)
                    if isinstance(event.body, RunComplete):
                        return

    def _relayed(self, key: RunKey) -> AbstractContextManager[None]:
        """Relays the events of a run from other nodes.

        A call of another node is not relayed: it asks for what happens on this node.
        """
        if self._relay is None or CALLER.get().peer:
            return nullcontext()
        return self._relay.follow(key)

    async def WaitRun(self, request: pb.WaitRunRequest, context: Context) -> pb.WaitRunResponse:
        """Waits for the end of a run (R24)."""
        timeout = validate.wait_run(request)
        bind_contextvars(run_id=request.run_id)
        run = await self._coordinator.wait_run(request.run_id, timeout=timeout, tenant=tenant())
        return pb.WaitRunResponse(run=convert.run(run))

    def _start(self, request: pb.SubscribeRunCompleteRequest) -> Position:
        match request.WhichOneof("start"):
            case "cursor":
                return self._cursors.decode(tenant(), request.cursor)
            case "from_beginning" if request.from_beginning:
                return self._store.compacted_of(tenant())
            case _:
                return self._feed.position

    @asynccontextmanager
    async def _resumable(self, place: _Place) -> AsyncIterator[None]:
        """Adds the cursor to resume from to the errors that end a subscription."""
        try:
            yield
        except CursorCompacted as error:
            oldest = self._cursors.encode(tenant(), self._store.compacted_of(tenant()))
            raise CursorCompacted(error.message, metadata={"oldest_cursor": oldest}) from error
        except Draining as error:
            raise Draining(
                error.message,
                retry_after=error.retry_after,
                metadata={"cursor": self._cursors.encode(tenant(), place.at)},
            ) from error

    def _progress(self, position: Position) -> pb.SubscribeRunCompleteResponse:
        mark = pb.SubscribeRunCompleteResponse.Progress(
            time=convert.timestamp(self._coordinator.now())
        )
        return pb.SubscribeRunCompleteResponse(
            cursor=self._cursors.encode(tenant(), position), progress=mark
        )

    def _run_progress(self) -> pb.SubscribeRunResponse:
        time = convert.timestamp(self._coordinator.now())
        return pb.SubscribeRunResponse(progress=pb.SubscribeRunResponse.Progress(time=time))

    async def _has_seen_end(self, key: RunKey, after_index: int) -> bool:
        """Whether the event at this index is the last one. Raises InvalidArgument."""
        if after_index == 0:
            return False
        events = await self._store.run_events(key, after=after_index - 1, limit=1, max_bytes=1)
        if not events:
            raise InvalidArgument.of("after_index", "is beyond the last event of the run")
        return isinstance(events[0].body, RunComplete)

    # --- Look up --------------------------------------------------------------------------------

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        """Returns a run, with its prompt on request."""
        validate.get_run(request)
        if not request.with_prompt:
            run = await self._coordinator.get_run(request.run_id, tenant=tenant())
            return pb.GetRunResponse(run=convert.run(run))
        run, prompt = await self._coordinator.updates.read(tenant(), request.run_id)
        return pb.GetRunResponse(
            run=convert.run(run.without_text), prompt=convert.run_prompt(prompt)
        )

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """Lists runs."""
        wanted = lists.list_runs(request, lists.Tokens(self._store.store_id, tenant()))

        async def fetch(after: ListPlace | None, count: int) -> Page[Run, ListPlace]:
            return await self._store.list_runs(tenant(), wanted.wanted, after=after, limit=count)

        page = await collect_page(fetch, convert.run, after=wanted.after, limit=wanted.page_size)
        response = pb.ListRunsResponse(
            runs=page.items, next_page_token=wanted.next_token(page.next)
        )
        if request.with_total_size:
            total = await self._store.count_runs(tenant(), wanted.wanted)
            response.total_size = total.items
            response.total_size_is_minimum = not total.is_exact
        return response

    # --- Input ----------------------------------------------------------------------------------

    async def ListInputRequests(
        self, request: pb.ListInputRequestsRequest, context: Context
    ) -> pb.ListInputRequestsResponse:
        """Lists input requests (R45)."""
        wanted, place = inputs.list_inputs(
            request, lambda these: self._input_tokens(these).decode(request.page_token, 1)
        )

        async def fetch(after: int | None, count: int) -> Page[InputRequest, int]:
            return await self._store.list_inputs(
                tenant(),
                session_id=wanted.session_id,
                run_id=wanted.run_id,
                states=wanted.states,
                after=after,
                limit=count,
            )

        page = await collect_page(
            fetch,
            inputs.input_request,
            after=None if place is None else place[0],
            limit=wanted.page_size,
        )
        tokens = self._input_tokens(wanted)
        return pb.ListInputRequestsResponse(
            input_requests=page.items,
            next_page_token="" if page.next is None else tokens.encode(page.next),
        )

    async def AnswerInput(
        self, request: pb.AnswerInputRequest, context: Context
    ) -> pb.AnswerInputResponse:
        """Answers an input request (R41)."""
        given = inputs.answer_input(request, requires_digest=self._requires_digest)
        found, accepted = await self._coordinator.inputs.answer(
            tenant(),
            request.input_request_id,
            given,
            kind=inputs.kind_of(request),
            allowed_agents=CALLER.get().agents,
        )
        return pb.AnswerInputResponse(
            input_request=inputs.input_request(found), accepted_this_answer=accepted
        )

    def _input_tokens(self, wanted: inputs.InputFilter) -> PageTokens:
        return PageTokens(
            self._store.store_id,
            "ListInputRequests",
            tenant(),
            wanted.session_id or "",
            wanted.run_id or "",
            *sorted(wanted.states),
        )


def _check_peer(run_id: str) -> None:
    """Raises PermissionDenied for a node that asks for another run than its signature names."""
    caller = CALLER.get()
    if caller.peer and caller.run_id != run_id:
        raise PermissionDenied("a node may follow only the run that its signature names")


class _Place:
    """The position up to which a subscription has been written."""

    def __init__(self, at: Position) -> None:
        self.at = at
