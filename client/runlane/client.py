"""The client: a typed call for everything that `runlane.v1` offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from runlane import convert
from runlane.convert import Seconds, seconds
from runlane.errors import (
    RunlaneError,
    SessionExists,
    SessionNotFound,
    is_refused,
    is_transient,
    is_unknown,
)
from runlane.ids import new_id
from runlane.pager import Page, Pager, join_messages
from runlane.run_events import RunEvents
from runlane.run_handle import RunHandle
from runlane.subscription import SILENCE, Subscription
from runlane.tokens import Shown, check_sendable, check_stays_here
from runlane.types import (
    NO_LABELS,
    Attachment,
    CancelReceipt,
    CancelScope,
    Message,
    Run,
    RunState,
    Session,
    WhenBusy,
)
from runlane.v1 import run_service_pb2 as runs_pb
from runlane.v1 import session_service_pb2 as sessions_pb
from runlane.waiting import wait_run
from runlane.wire import RetryPolicy, Wire

DEFAULT_TARGET = "127.0.0.1:50051"
"""Where `runlane-server` listens unless it is told otherwise."""


class Client:
    """A connection to Runlane, for one event loop.

        async with Client("127.0.0.1:50051") as client:
            handle = await client.run_accepted("my-session", "What is new?")
            complete = await handle.completed()

    Every call raises `RunlaneError` or one of its subclasses (see `runlane.errors`). A call that
    can be repeated without harm is repeated where that may help: after a lost connection, and
    where the server drains, restarts or is overloaded; it keeps to the pause that the server asks
    for.

    Args:
        target: Where the server is: `host:port`, or any gRPC name.
        credentials: For TLS, as `grpc.ssl_channel_credentials` makes them; None for plain text.
        metadata: Sent with every call.
        token: Says who calls; sent with every call as `authorization: Bearer TOKEN`. A callable is
            asked for each call, so it may rotate: what is refused for a token that was renewed
            meanwhile is tried again with the new one, and subscriptions go on.
        plaintext_token: Whether the token may go unencrypted to another machine. Without it that
            is a ValueError: whoever sees the token can use it.
        timeout: How long a call may take, its repetitions included (seconds or a timedelta).
            Subscriptions and waits have limits of their own.
        retry: How calls are repeated.
        options: gRPC channel options, in addition to `runlane.wire.CHANNEL_OPTIONS`.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str] = NO_LABELS,
        token: str | Callable[[], str] | None = None,
        plaintext_token: bool = False,
        timeout: Seconds = 10.0,
        retry: RetryPolicy | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        if token is not None and credentials is None and not plaintext_token:
            check_stays_here(target, "give credentials for TLS, or say plaintext_token=True")
        self._wire = Wire(
            target,
            credentials=credentials,
            shown=Shown(metadata, token),
            options=options,
            timeout=seconds(timeout),
            retry=retry or RetryPolicy(),
        )

    @property
    def target(self) -> str:
        """Where the server is."""
        return self._wire.target

    async def close(self) -> None:
        """Closes the connection; what is under way raises ClientClosed. May be repeated."""
        await self._wire.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # --- Runs ------------------------------------------------------------------------------------

    async def run_accepted(
        self,
        session_id: str,
        prompt: str = "",
        *,
        run_id: str | None = None,
        attachments: Iterable[Attachment] = (),
        when_busy: WhenBusy = WhenBusy.QUEUE,
        timeout: Seconds | None = None,
        max_attempts: int = 1,
        metadata: Mapping[str, str] = NO_LABELS,
        allow_missing: bool = False,
        traceparent: str = "",
    ) -> RunHandle:
        """Hands a prompt to a session; returns as soon as the run is durable.

        Args:
            session_id: The session; at most 128 bytes.
            prompt: What to do; at most 1 MiB of UTF-8 unless the server is set otherwise. May be
                empty with a text attachment.
            run_id: The idempotency key. The same id with the same request returns the run that it
                named first. Without one the client makes a UUIDv7, so the call is always safe to
                repeat, and is repeated.
            attachments: What goes with the prompt; at most 2 MiB together unless the server is set
                otherwise.
            when_busy: What becomes of the run if the session has work already.
            timeout: How long an attempt may be active (seconds or a timedelta; more than 0, at most
                7 days); None: without limit. It is not a limit on this call.
            max_attempts: How often the run may be started, should its node be lost; 1 to 100.
            metadata: Labels of your own: at most 64, keys up to 128 bytes, values up to 4 KiB.
            allow_missing: Whether to create the session if there is none of that id.
            traceparent: Where in a trace the caller is, as W3C Trace Context has it: the run is
                made a part of that trace, and its agent is told of it.

        Raises:
            EmptyPrompt, SessionMissing, PromptTooLarge, InvalidArgument: The request is malformed.
            SessionNotFound: There is no such session, and allow_missing is not set.
            RunIdConflict: The run id was used before, for something else.
            SessionBusy: when_busy is REJECT, and the session has work.
            ValueError: There is no such when_busy, or the traceparent cannot be sent.
            QueueFull, Overloaded, QuotaExceeded: There is no room for the run now.
            Unavailable, DeadlineExceeded: Whether the run was accepted is unknown. The same call
                with the `run_id` of the error's metadata tells.
        """
        request = runs_pb.RunAcceptedRequest(
            session_id=session_id,
            run_id=run_id or new_id(),
            prompt=prompt,
            attachments=[convert.to_attachment(each) for each in attachments],
            when_busy=convert.to_when_busy(when_busy),
            timeout=convert.to_duration(timeout),
            max_attempts=max_attempts,
            metadata=metadata,
            allow_missing=allow_missing,
        )
        extra = (("traceparent", traceparent),) if traceparent else ()
        check_sendable(dict(extra))
        try:
            response = await self._wire.call(self._wire.runs.RunAccepted, request, extra=extra)
        except RunlaneError as error:
            if is_unknown(error):
                error.metadata = {**error.metadata, "run_id": request.run_id}
            raise
        return RunHandle(convert.run(response.run), response.cursor, self)

    async def attach(self, run_id: str) -> RunHandle:
        """A handle on a run that was accepted before. Raises RunNotFound."""
        return RunHandle(await self.get_run(run_id), None, self)

    async def cancel(
        self,
        session_id: str = "",
        *,
        run_id: str | None = None,
        scope: CancelScope = CancelScope.SESSION,
        reason: str = "",
    ) -> CancelReceipt:
        """Cancels what is accepted and not terminal in a session at this instant.

        Args:
            session_id: The session. May be left out where run_id is given.
            run_id: This run only, with the runs folded into it; scope is SESSION then.
            scope: Which runs of the session.
            reason: Recorded with every run that is covered; at most 1 KiB.

        Returns what was covered: nothing on an idle session. A run accepted after the cancel is
        never touched by it. Therefore a cancel without run_id is repeated only where the server
        certainly did nothing: a second one could cover runs that came in between. A cancel of one
        run that was repeated after a lost answer may give an empty receipt.

        Raises SessionMissing, SessionNotFound, RunNotFound, InvalidArgument, Unavailable; and
        ValueError for a scope that there is not.
        """
        request = runs_pb.CancelRequest(
            session_id=session_id,
            run_id=run_id or "",
            scope=convert.to_scope(scope),
            reason=reason,
        )
        repeat = is_transient if run_id else is_refused
        response = await self._wire.call(self._wire.runs.Cancel, request, repeat=repeat)
        return convert.receipt(response, session_id)

    async def cancel_all(self, reason: str = "") -> tuple[CancelReceipt, ...]:
        """Cancels what is accepted and not terminal in all sessions of the caller.

        Returns a receipt for every session in which a run was covered. Repeated only where the
        server certainly did nothing, see `cancel`.
        """
        request = runs_pb.CancelAllRequest(reason=reason)
        response = await self._wire.call(self._wire.runs.CancelAll, request, repeat=is_refused)
        return tuple(convert.receipt(each, each.session_id) for each in response.sessions)

    def subscribe_run_complete(
        self,
        *,
        session_ids: Iterable[str] = (),
        run_ids: Iterable[str] = (),
        cursor: str | None = None,
        from_beginning: bool = False,
        silence: Seconds = SILENCE,
        max_silence: Seconds | None = None,
        on_lost: Callable[[RunlaneError], None] | None = None,
    ) -> Subscription:
        """Iterates over the terminal events of runs, each once and in order; see `Subscription`.

        Args:
            session_ids: Runs of these sessions; at most 1,000.
            run_ids: These runs; at most 1,000. With session_ids too: whatever matches either. With
                neither: all runs of the caller.
            cursor: Where to go on: a `Subscription.cursor` or a `RunHandle.cursor`.
            from_beginning: Whether to begin with the oldest event that is kept. Without it and
                without a cursor, the subscription begins now.
            silence: After how long without any message (seconds or a timedelta) the connection
                counts as lost. An idle server sends a mark every 15 s, unless it is set otherwise.
            max_silence: After how long without any message from the server (seconds or a timedelta)
                the error is raised instead of trying again; None: never.
            on_lost: Called with the error each time a connection is lost and made again.

        Raises ValueError where cursor and from_beginning are both given, and TypeError where a
        text is given in place of some.
        """
        if from_beginning and cursor is not None:
            raise ValueError("a subscription begins at a cursor or at the beginning, not at both")
        return Subscription(
            self._wire,
            session_ids=convert.some("session_ids", session_ids),
            run_ids=convert.some("run_ids", run_ids),
            cursor=cursor,
            from_beginning=from_beginning,
            silence=seconds(silence),
            max_silence=None if max_silence is None else seconds(max_silence),
            on_lost=on_lost,
        )

    def subscribe_run(
        self,
        run_id: str,
        *,
        after_index: int = 0,
        on_lost: Callable[[RunlaneError], None] | None = None,
    ) -> RunEvents:
        """Iterates over all that happens in one run, and ends after its end; see `RunEvents`.

        `after_index` is the index of the last event that is known already, 0 for none. `on_lost` is
        called with the error each time a connection is lost and made again.
        """
        return RunEvents(self._wire, run_id, after_index=after_index, on_lost=on_lost)

    async def wait_run(self, run_id: str, *, timeout: Seconds | None = None) -> Run:
        """Waits for a run to end, over lost connections and restarted servers.

        `timeout` is how long (seconds or a timedelta), None without limit. Returns the run at its
        end, or as it is when the time is up. Raises RunNotFound; Unavailable where the server is
        out of reach when the time is up.
        """
        return await wait_run(self._wire, run_id, timeout)

    async def get_run(self, run_id: str) -> Run:
        """A run as it is. Raises RunNotFound."""
        request = runs_pb.GetRunRequest(run_id=run_id)
        response = await self._wire.call(self._wire.runs.GetRun, request)
        return convert.run(response.run)

    def list_runs(
        self,
        session_id: str | None = None,
        *,
        states: Iterable[RunState] = (),
        page_size: int = 0,
    ) -> Pager[Run]:
        """Lists runs, the latest accepted first, without the text of their ends.

        Args:
            session_id: Only those of this session; None: of all.
            states: Only those in one of these states; none: in any.
            page_size: How many to ask for at a time; 0: 50, at most 1,000.

        Raises ValueError for a state that there is not, TypeError for one text in place of some.
        """
        request = runs_pb.ListRunsRequest(
            session_id=session_id or "",
            states=map(convert.to_run_state, convert.some("states", states)),
            page_size=page_size,
        )

        async def fetch(page_token: str) -> Page[Run]:
            request.page_token = page_token
            response = await self._wire.call(self._wire.runs.ListRuns, request)
            return Page(tuple(map(convert.run, response.runs)), response.next_page_token)

        return Pager(fetch)

    # --- Sessions --------------------------------------------------------------------------------

    async def create_session(
        self,
        session_id: str | None = None,
        *,
        title: str = "",
        metadata: Mapping[str, str] = NO_LABELS,
    ) -> Session:
        """Creates a session; without an id, one with a UUIDv7.

        Args:
            session_id: At most 128 bytes, no control characters.
            title: A name for people; at most 1 KiB.
            metadata: Labels of your own: at most 64, keys up to 128 bytes, values up to 4 KiB.

        Raises SessionExists, which after a lost answer may mean that this call created it;
        InvalidArgument.
        """
        request = sessions_pb.CreateSessionRequest(
            session_id=session_id or new_id(), title=title, metadata=metadata
        )
        try:
            response = await self._wire.call(self._wire.sessions.CreateSession, request)
        except SessionExists as error:
            # An id that was made a moment ago can only be taken by this very call.
            if session_id or error.attempts == 1:
                raise
            return await self.get_session(request.session_id)
        return convert.session(response.session)

    async def get_session(self, session_id: str) -> Session:
        """A session as it is. Raises SessionNotFound."""
        request = sessions_pb.GetSessionRequest(session_id=session_id)
        response = await self._wire.call(self._wire.sessions.GetSession, request)
        return convert.session(response.session)

    def list_sessions(self, *, page_size: int = 0) -> Pager[Session]:
        """Lists sessions, the latest created first; `page_size` as in `list_runs`."""
        request = sessions_pb.ListSessionsRequest(page_size=page_size)

        async def fetch(page_token: str) -> Page[Session]:
            request.page_token = page_token
            response = await self._wire.call(self._wire.sessions.ListSessions, request)
            return Page(tuple(map(convert.session, response.sessions)), response.next_page_token)

        return Pager(fetch)

    async def delete_session(self, session_id: str) -> None:
        """Removes an idle session with its runs and its transcript.

        Terminal events that were written are still delivered. Raises SessionNotFound, SessionBusy.
        """
        request = sessions_pb.DeleteSessionRequest(session_id=session_id)
        try:
            await self._wire.call(self._wire.sessions.DeleteSession, request)
        except SessionNotFound as error:
            # Gone after a repetition: it was this call that removed it.
            if error.attempts == 1:
                raise

    def list_messages(self, session_id: str, *, page_size: int = 0) -> Pager[Message]:
        """Lists the transcript of a session, the oldest message first.

        Messages that do not fit on one page are joined, unless pages are asked for. `page_size` as
        in `list_runs`. The first step raises SessionNotFound.
        """
        request = sessions_pb.ListMessagesRequest(session_id=session_id, page_size=page_size)

        async def fetch(page_token: str) -> Page[Message]:
            request.page_token = page_token
            response = await self._wire.call(self._wire.sessions.ListMessages, request)
            return Page(tuple(map(convert.message, response.messages)), response.next_page_token)

        return Pager(fetch, join=join_messages)
