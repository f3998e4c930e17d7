"""The client: a typed method for each call of `runlane.v1`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import grpc

from runlane import convert, inputs, listing, updates, webhooks
from runlane.arguments import build
from runlane.convert import Seconds, seconds
from runlane.errors import (
    DeadlineExceeded,
    RunlaneError,
    SessionExists,
    SessionNotFound,
    WebhookNotFound,
    is_outcome_unknown,
    is_refused,
    is_transient,
)
from runlane.ids import new_id
from runlane.inputs import Answer, AnswerReceipt, InputRequest, InputState
from runlane.metadata import Metadata, MetadataSource, check_metadata, check_token_target
from runlane.pager import Page, Pager, join_messages
from runlane.run_events import RunEvents
from runlane.run_handle import RunHandle
from runlane.session_stream import NO_CURSORS, SessionStream
from runlane.subscription import SILENCE_SECONDS, Subscription
from runlane.types import (
    NO_LABELS,
    AgentInfo,
    Attachment,
    CancelReceipt,
    CancelScope,
    Message,
    Run,
    RunOrder,
    RunPrompt,
    RunRetryPolicy,
    RunState,
    ServerInfo,
    Session,
    SessionOrder,
    WhenBusy,
)
from runlane.v1 import agent_service_pb2 as agents_pb
from runlane.v1 import run_service_pb2 as runs_pb
from runlane.v1 import session_service_pb2 as sessions_pb
from runlane.v1 import webhook_service_pb2 as webhooks_pb
from runlane.webhooks import Webhook, WebhookFilter, WebhookRun, WebhookSecret
from runlane.wire import Backoff, RetryPolicy, Wire

DEFAULT_TARGET = "127.0.0.1:50051"
"""The default address of `runlane-server`."""

CANCELLED_PER_CALL = 4000
"""Runs that one call of CancelAll cancels; the most that the server takes."""

WAIT_SLICE_SECONDS = 30.0
"""Maximum duration of one WaitRun call. `Client.wait_run` makes a sequence of them, so that a dead
connection delays only one."""


class Client:
    """A connection to a Runlane server, for one event loop.

        async with Client("127.0.0.1:50051") as client:
            handle = await client.run_accepted("my-session", "What is new?")
            complete = await handle.completed()

    Calls raise `RunlaneError` or one of its subclasses (see `runlane.errors`). Calls that are safe
    to retry are retried after a lost connection, and while the server drains, restarts or is
    overloaded; a delay requested by the server is respected.

    Args:
        target: The server: `host:port` or any gRPC target.
        credentials: TLS credentials from `grpc.ssl_channel_credentials`; None: plaintext.
        metadata: Sent with every call.
        token: The bearer token, sent with every call as `authorization: Bearer TOKEN`. For a token
            that rotates, pass a callable that returns the current one; calls rejected with an old
            token are retried with the new one, and subscriptions resume.
        plaintext_token: Allow sending the token unencrypted to another machine, where others may
            read and use it. Otherwise such a target raises ValueError.
        timeout: Maximum duration of a call including retries (seconds or a timedelta).
            Subscriptions and waits have their own limits.
        retry: The retry policy.
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
            check_token_target(target, "set credentials for TLS or plaintext_token=True")
        self._wire = Wire(
            target,
            credentials=credentials,
            metadata=MetadataSource(metadata, token),
            options=options,
            timeout=seconds(timeout),
            retry=retry or RetryPolicy(),
        )

    @property
    def target(self) -> str:
        """The gRPC target of the server."""
        return self._wire.target

    async def close(self) -> None:
        """Closes the connection; pending calls raise ClientClosed. Idempotent."""
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
        retry_policy: RunRetryPolicy | None = None,
        agent: str = "",
        expected_active_run_id: str = "",
    ) -> RunHandle:
        """Submits a prompt to a session; returns when the run is durable.

        Args:
            session_id: The session id; at most 128 bytes.
            prompt: The prompt; at most 1 MiB of UTF-8 by default (a server setting). May be empty
                if there is a text attachment.
            run_id: The idempotency key. The same id with the same request returns the existing
                run. By default the client generates a UUIDv7, so that retries are always safe.
            attachments: Attachments; at most 2 MiB in total by default (a server setting).
            when_busy: How to handle the run if the session already has work.
            timeout: Maximum duration of one attempt of the run (seconds or a timedelta; more than
                0, at most 7 days); None: no limit. Does not limit this call.
            max_attempts: Maximum number of attempts if nodes are lost; 1 to 100.
            metadata: Your labels; at most 64, keys up to 128 bytes, values up to 4 KiB.
            allow_missing: Create the session if it does not exist.
            traceparent: The caller's position in a trace, in the format of W3C Trace Context. The
                run becomes part of that trace, and its agent receives it.
            retry_policy: Repeats attempts that the agent fails; None: a failure ends the run.
            agent: The name of the agent that executes the run; see `list_agents`. Empty: the
                session's agent, or the server's default.
            expected_active_run_id: Accept the run only while this run is active. Empty: always.

        Raises:
            EmptyPrompt, SessionMissing, PromptTooLarge, InvalidArgument: The request is invalid.
            SessionNotFound: The session does not exist and allow_missing is False.
            AgentNotFound: The server has no agent of this name.
            PermissionDenied: The caller may not use the agent.
            RunIdConflict: The run id exists already with a different request.
            SessionBusy: when_busy is REJECT and the session has work.
            ActiveRunChanged: Another run than `expected_active_run_id` is active, or none.
            ValueError: when_busy is not a choice, or gRPC cannot send the traceparent.
            QueueFull, Overloaded, QuotaExceeded: The server is at a limit.
            Unavailable, DeadlineExceeded: The outcome is unknown. The same call with the `run_id`
                of the error's metadata returns it.
        """
        request = build(
            runs_pb.RunAcceptedRequest,
            session_id=session_id,
            run_id=run_id or new_id(),
            prompt=prompt,
            attachments=[convert.to_attachment(each) for each in attachments],
            when_busy=convert.to_when_busy(when_busy),
            timeout=convert.to_duration(timeout),
            max_attempts=max_attempts,
            metadata=metadata,
            allow_missing=allow_missing,
            retry_policy=convert.to_retry_policy(retry_policy),
            agent=agent,
            expected_active_run_id=expected_active_run_id,
        )
        trace = (("traceparent", traceparent),) if traceparent else ()
        check_metadata(dict(trace))
        try:
            response = await self._wire.call(
                self._wire.runs.RunAccepted, request, extra_metadata=trace
            )
        except RunlaneError as error:
            if is_outcome_unknown(error):
                error.metadata = {**error.metadata, "run_id": request.run_id}
            raise
        return RunHandle(convert.run(response.run), response.cursor, self)

    async def attach(self, run_id: str) -> RunHandle:
        """Returns a handle of an existing run. Raises RunNotFound."""
        return RunHandle(await self.get_run(run_id), None, self)

    async def update_run(
        self,
        run_id: str,
        *,
        prompt: str | None = None,
        attachments: Iterable[Attachment] | None = None,
        when_busy: WhenBusy | None = None,
        metadata: Mapping[str, str] | None = None,
        first: bool = False,
        last: bool = False,
        before: str = "",
        after: str = "",
        revision: int | None = None,
        update_id: str = "",
    ) -> Run:
        """Edits or moves a waiting run; returns when the change is durable.

        Args:
            run_id: The run.
            prompt: The new prompt; None leaves it, like the other values.
            attachments: The new attachments, instead of all earlier ones.
            when_busy: INTERRUPT cancels the active run and moves this one to the head; FOLD joins
                the active turn at its next step; QUEUE waits.
            metadata: The new labels, instead of all earlier ones.
            first: Move the run to the head of the queue.
            last: Move the run to the end of the queue.
            before: Move the run directly before this one.
            after: Move the run directly after this one.
            revision: `Run.revision` as it was read; if the run was changed since, the call raises
                EditConflict.
            update_id: The idempotency key; default: a new one. A call repeated with it returns the
                run and changes nothing, also after other changes.

        Raises:
            AlreadyStarted: The run has left the queue.
            EditConflict: The run is not at this revision.
            AnchorNotWaiting: `before` or `after` names no run that waits in the same queue.
            RunNotFound, EmptyPrompt, PromptTooLarge, InvalidArgument, QuotaExceeded: As in
                `run_accepted`.
            ValueError: There is no change, or more than one place.
        """
        request = updates.update_run_request(
            run_id,
            prompt=prompt,
            attachments=attachments,
            when_busy=when_busy,
            metadata=None if metadata is None else dict(metadata),
            position=updates.queue_position(first=first, last=last, before=before, after=after),
            revision=revision,
            update_id=update_id,
        )
        response = await self._wire.call(self._wire.runs.UpdateRun, request)
        return convert.run(response.run)

    async def cancel(
        self,
        session_id: str = "",
        *,
        run_id: str | None = None,
        scope: CancelScope = CancelScope.SESSION,
        reason: str = "",
    ) -> CancelReceipt:
        """Cancels the runs of a session that are accepted and not terminal at this instant.

        Args:
            session_id: The session id. Optional if run_id is set.
            run_id: Cancel only this run and the runs folded into it. Requires scope SESSION.
            scope: The runs of the session to cancel.
            reason: Recorded with every cancelled run; at most 1 KiB.

        Returns the receipt, which is empty for an idle session. Runs accepted after the cancel are
        not affected. A cancel without run_id is therefore retried only if the server certainly did
        nothing: a second cancel could cover runs accepted in between. A cancel with run_id that was
        retried after a lost response may return an empty receipt.

        Raises SessionMissing, SessionNotFound, RunNotFound, InvalidArgument, Unavailable, and
        ValueError if scope is not a choice.
        """
        request = build(
            runs_pb.CancelRequest,
            session_id=session_id,
            run_id=run_id or "",
            scope=convert.to_scope(scope),
            reason=reason,
        )
        response = await self._wire.call(
            self._wire.runs.Cancel, request, should_retry=is_transient if run_id else is_refused
        )
        return convert.receipt(response, session_id)

    async def cancel_all(self, reason: str = "") -> tuple[CancelReceipt, ...]:
        """Cancels all runs that are accepted and not terminal, in all sessions of the caller.

        Returns one receipt per session with a cancelled run, or with damaged records. The server
        cancels thousands of runs page by page; this method asks for all pages. A page is retried
        only if the server certainly did nothing; see `cancel`.
        """
        receipts: list[CancelReceipt] = []
        request = build(runs_pb.CancelAllRequest, reason=reason, page_size=CANCELLED_PER_CALL)
        while True:
            response = await self._wire.call(
                self._wire.runs.CancelAll, request, should_retry=is_refused
            )
            receipts += (convert.receipt(each, each.session_id) for each in response.sessions)
            request.page_token = response.next_page_token
            if not request.page_token:
                return tuple(receipts)

    def subscribe_run_complete(
        self,
        *,
        session_ids: Iterable[str] = (),
        run_ids: Iterable[str] = (),
        cursor: str | None = None,
        from_beginning: bool = False,
        silence: Seconds = SILENCE_SECONDS,
        max_silence: Seconds | None = None,
        on_lost: Callable[[RunlaneError], None] | None = None,
    ) -> Subscription:
        """Iterates over terminal events, each exactly once and in order; see `Subscription`.

        Args:
            session_ids: Match runs of these sessions; at most 1,000.
            run_ids: Match these runs; at most 1,000. Combined with session_ids by OR. Without
                both: all runs of the caller.
            cursor: Resume after this `Subscription.cursor` or `RunHandle.cursor`.
            from_beginning: Start at the oldest retained event. Without this and without a cursor,
                the subscription starts now.
            silence: Time without a message after which the connection counts as lost (seconds or a
                timedelta). An idle server sends a progress mark every 15 s by default.
            max_silence: Time without a message after which an error is raised instead of a
                reconnect (seconds or a timedelta); None: no limit.
            on_lost: Called with the error before each reconnect.

        Raises ValueError if both cursor and from_beginning are set, and TypeError if session_ids
        or run_ids is a str.
        """
        if from_beginning and cursor is not None:
            raise ValueError("cursor: cannot be combined with from_beginning")
        return Subscription(
            self._wire,
            session_ids=convert.to_tuple("session_ids", session_ids),
            run_ids=convert.to_tuple("run_ids", run_ids),
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
        """Iterates over the events of one run, up to its `RunComplete`; see `RunEvents`.

        Args:
            run_id: The run id.
            after_index: Skip events up to this index; 0: none.
            on_lost: Called with the error before each reconnect.
        """
        return RunEvents(self._wire, run_id, after_index=after_index, on_lost=on_lost)

    def subscribe_session(
        self,
        session_ids: str | Iterable[str],
        *,
        cursors: Mapping[str, str] = NO_CURSORS,
        with_deltas: bool = True,
        silence: Seconds = SILENCE_SECONDS,
        max_silence: Seconds | None = None,
        on_lost: Callable[[RunlaneError], None] | None = None,
    ) -> SessionStream:
        """Iterates over everything that happens in sessions; see `SessionStream`.

        Args:
            session_ids: The session, or up to 1,000 sessions. They need not exist yet.
            cursors: Resume after these `SessionStream.cursors`; a session without one begins with a
                snapshot.
            with_deltas: Include `TextDelta` and `ReasoningDelta` events.
            silence: Time without a message after which the connection counts as lost (seconds or a
                timedelta). An idle server sends a progress mark every 15 s by default.
            max_silence: Time without a message after which an error is raised instead of a
                reconnect (seconds or a timedelta); None: no limit.
            on_lost: Called with the error before each reconnect.
        """
        ids = (session_ids,) if isinstance(session_ids, str) else tuple(session_ids)
        return SessionStream(
            self._wire,
            ids,
            cursors=cursors,
            with_deltas=with_deltas,
            silence=seconds(silence),
            max_silence=None if max_silence is None else seconds(max_silence),
            on_lost=on_lost,
        )

    async def wait_run(self, run_id: str, *, timeout: Seconds | None = None) -> Run:
        """Waits for the end of a run, across lost connections and server restarts.

        Returns the ended run, or its current state after `timeout` (seconds or a timedelta; None:
        no limit). Raises RunNotFound, and Unavailable if the server cannot be reached at the end
        of the timeout.
        """
        return await _wait_run(self._wire, run_id, timeout)

    async def get_run(self, run_id: str) -> Run:
        """Returns a run. Raises RunNotFound."""
        request = build(runs_pb.GetRunRequest, run_id=run_id)
        response = await self._wire.call(self._wire.runs.GetRun, request)
        return convert.run(response.run)

    async def get_prompt(self, run_id: str) -> RunPrompt:
        """Returns the whole prompt of a run, to be edited with `update_run` while the run waits.

        Pass `revision=prompt.run.revision` there, so that an edit of another caller is not lost.
        Raises RunNotFound.
        """
        request = build(runs_pb.GetRunRequest, run_id=run_id, with_prompt=True)
        return convert.run_prompt(await self._wire.call(self._wire.runs.GetRun, request))

    def list_runs(
        self,
        session_id: str | None = None,
        *,
        states: Iterable[RunState] = (),
        agent: str = "",
        metadata: Mapping[str, str] | None = None,
        accepted_from: datetime | None = None,
        accepted_before: datetime | None = None,
        ended_from: datetime | None = None,
        ended_before: datetime | None = None,
        order: RunOrder | None = None,
        with_total_size: bool = False,
        page_size: int = 0,
    ) -> Pager[Run]:
        """Lists runs that match all filters, without the text of their RunComplete.

        Args:
            session_id: Return only runs of this session; None: all sessions.
            states: Return only runs in these states; empty: all states.
            agent: Return only runs of this agent; empty: all agents.
            metadata: Return only runs that have all these labels, at most 8.
            accepted_from: Return only runs accepted at this time or later.
            accepted_before: Return only runs accepted before this time.
            ended_from: Return only runs that ended at this time or later.
            ended_before: Return only runs that ended before this time.
            order: The order. None: most recently ended first with `ended_from` or `ended_before`,
                else most recently accepted first.
            with_total_size: Count the matching runs; pages then have `total_size`.
            page_size: Number of runs per page, at most 1,000; 0: 50.

        Raises ValueError if a value is not a choice or a time has no time zone, and TypeError if
        states is a str.
        """
        times = {
            "accepted_from": accepted_from,
            "accepted_before": accepted_before,
            "ended_from": ended_from,
            "ended_before": ended_before,
        }
        request = listing.runs_request(
            session_id,
            states,
            order,
            times,
            agent=agent,
            metadata=dict(metadata or {}),
            with_total_size=with_total_size,
            page_size=page_size,
        )

        async def fetch(page_token: str) -> Page[Run]:
            request.page_token = page_token
            response = await self._wire.call(self._wire.runs.ListRuns, request)
            items = tuple(map(convert.run, response.runs))
            return listing.page(items, response, with_total_size=with_total_size)

        return Pager(fetch)

    # --- Input -----------------------------------------------------------------------------------

    def list_input_requests(
        self,
        *,
        session_id: str | None = None,
        run_id: str | None = None,
        states: Iterable[InputState] = (),
        page_size: int = 0,
    ) -> Pager[InputRequest]:
        """Lists the questions of agents to people, the latest first.

        Args:
            session_id: Return only requests of this session; None: all sessions.
            run_id: Return only requests of this run; None: all runs.
            states: Return only requests in these states; empty: all states.
            page_size: Number of requests per page, at most 1,000; 0: 50.

        Raises ValueError if a state is not a choice, and TypeError if states is a str.
        """
        request = build(
            runs_pb.ListInputRequestsRequest,
            session_id=session_id or "",
            run_id=run_id or "",
            states=map(inputs.to_state, convert.to_tuple("states", states)),
            page_size=page_size,
        )

        async def fetch(page_token: str) -> Page[InputRequest]:
            request.page_token = page_token
            response = await self._wire.call(self._wire.runs.ListInputRequests, request)
            found = tuple(map(inputs.input_request, response.input_requests))
            return Page(found, response.next_page_token)

        return Pager(fetch)

    async def answer_input(
        self, input_request: InputRequest, answer: Answer, *, answer_id: str | None = None
    ) -> AnswerReceipt:
        """Answers a question of an agent. The first answer counts; later ones get it back.

        Args:
            input_request: The request as it was shown to the person; the answer is refused if it
                is not the question that was asked.
            answer: A bool or an `Approval`, one of the choices, a mapping for a form, or a text.
            answer_id: The idempotency key; None: a new UUIDv7. Retries of this call repeat it.

        Raises InputNotFound, InputClosed if the run was cancelled or has ended, AnswerInvalid,
        PermissionDenied, and TypeError for an answer of the wrong type.
        """
        request = inputs.to_request(input_request, answer, answer_id or new_id())
        response = await self._wire.call(self._wire.runs.AnswerInput, request)
        return AnswerReceipt(
            inputs.input_request(response.input_request), response.accepted_this_answer
        )

    # --- Sessions --------------------------------------------------------------------------------

    async def create_session(
        self,
        session_id: str | None = None,
        *,
        title: str = "",
        metadata: Mapping[str, str] = NO_LABELS,
        agent: str = "",
    ) -> Session:
        """Creates a session.

        Args:
            session_id: At most 128 bytes, no control characters; None: a new UUIDv7.
            title: A display name; at most 1 KiB.
            metadata: Your labels; at most 64, keys up to 128 bytes, values up to 4 KiB.
            agent: The agent of the session's runs that name none; empty: the server's default.

        Raises InvalidArgument, AgentNotFound, and SessionExists; after a lost response this may
        mean that this call created the session.
        """
        request = build(
            sessions_pb.CreateSessionRequest,
            session_id=session_id or new_id(),
            title=title,
            metadata=metadata,
            agent=agent,
        )
        try:
            response = await self._wire.call(self._wire.sessions.CreateSession, request)
        except SessionExists as error:
            # Only an earlier attempt of this call can have used the new id.
            if session_id or error.attempts == 1:
                raise
            return await self.get_session(request.session_id)
        return convert.session(response.session)

    async def get_session(self, session_id: str) -> Session:
        """Returns a session. Raises SessionNotFound."""
        request = build(sessions_pb.GetSessionRequest, session_id=session_id)
        response = await self._wire.call(self._wire.sessions.GetSession, request)
        return convert.session(response.session)

    def list_sessions(
        self,
        *,
        agent: str = "",
        metadata: Mapping[str, str] | None = None,
        busy: bool | None = None,
        created_from: datetime | None = None,
        created_before: datetime | None = None,
        order: SessionOrder | None = None,
        with_total_size: bool = False,
        page_size: int = 0,
    ) -> Pager[Session]:
        """Lists sessions that match all filters.

        Args:
            agent: Return only sessions with this agent; empty: all agents.
            metadata: Return only sessions that have all these labels, at most 8.
            busy: Return only busy sessions, or only idle ones; None: both.
            created_from: Return only sessions created at this time or later.
            created_before: Return only sessions created before this time.
            order: The order; None: most recently created first.
            with_total_size: Count the matching sessions; pages then have `total_size`.
            page_size: Number of sessions per page, at most 1,000; 0: 50.

        Raises ValueError if the order is not a choice or a time has no time zone.
        """
        request = listing.sessions_request(
            order,
            {"created_from": created_from, "created_before": created_before},
            agent=agent,
            metadata=dict(metadata or {}),
            busy=busy,
            with_total_size=with_total_size,
            page_size=page_size,
        )

        async def fetch(page_token: str) -> Page[Session]:
            request.page_token = page_token
            response = await self._wire.call(self._wire.sessions.ListSessions, request)
            items = tuple(map(convert.session, response.sessions))
            return listing.page(items, response, with_total_size=with_total_size)

        return Pager(fetch)

    async def fork_session(
        self, session_id: str, new_session_id: str | None = None, *, at_turn: int = 0
    ) -> Session:
        """Creates a session that begins with a copy of the transcript of another one.

        Args:
            session_id: The session to copy, which stays as it is.
            new_session_id: The id of the new session; None: a new UUIDv7. With the same id, a
                repeated call returns the session that the first one created.
            at_turn: The last turn to copy; 0: the last one that has finished.

        Raises SessionNotFound, SessionExists, TurnNotFound, TurnNotFinished, QuotaExceeded.
        """
        request = build(
            sessions_pb.ForkSessionRequest,
            session_id=session_id,
            # Chosen here, so that a retry of the call makes no second session.
            new_session_id=new_session_id or new_id(),
            at_turn=at_turn,
        )
        response = await self._wire.call(self._wire.sessions.ForkSession, request)
        return convert.session(response.session)

    async def update_session(
        self,
        session_id: str,
        *,
        title: str | None = None,
        metadata: Mapping[str, str] | None = None,
        agent: str | None = None,
        etag: str = "",
    ) -> Session:
        """Changes a session; None leaves a value as it is.

        Args:
            session_id: The session.
            title: The new display name.
            metadata: The new labels, instead of all earlier ones.
            agent: The new agent of runs that name none; empty: the server's default.
            etag: `Session.etag` as it was read; if the session was changed since, the call raises
                EditConflict.

        Raises SessionNotFound, EditConflict, AgentNotFound, InvalidArgument, and ValueError without
        a change.
        """
        request = listing.update_session_request(
            session_id,
            etag,
            title=title,
            metadata=None if metadata is None else dict(metadata),
            agent=agent,
        )
        response = await self._wire.call(self._wire.sessions.UpdateSession, request)
        return convert.session(response.session)

    async def delete_session(self, session_id: str) -> None:
        """Deletes an idle session with its runs and its transcript.

        Subscriptions still deliver its terminal events. Raises SessionNotFound, SessionBusy.
        """
        request = build(sessions_pb.DeleteSessionRequest, session_id=session_id)
        try:
            await self._wire.call(self._wire.sessions.DeleteSession, request)
        except SessionNotFound as error:
            # Not found after a retry: an earlier attempt deleted it.
            if error.attempts == 1:
                raise

    def list_messages(
        self,
        session_id: str,
        *,
        run_id: str | None = None,
        latest_turns: int = 0,
        page_size: int = 0,
    ) -> Pager[Message]:
        """Lists the messages of a session, or of one of its runs, oldest first.

        `latest_turns` limits them to this many turns, 0: all; `page_size` as in `list_runs`. The
        iterator joins messages that were split between pages; `page` and `pages` do not. The first
        step may raise SessionNotFound.
        """
        request = build(
            sessions_pb.ListMessagesRequest,
            session_id=session_id,
            run_id=run_id or "",
            latest_turns=latest_turns,
            page_size=page_size,
        )

        async def fetch(page_token: str) -> Page[Message]:
            request.page_token = page_token
            response = await self._wire.call(self._wire.sessions.ListMessages, request)
            return Page(tuple(map(convert.message, response.messages)), response.next_page_token)

        return Pager(fetch, join=join_messages)

    # --- Agents ----------------------------------------------------------------------------------

    async def list_agents(self) -> tuple[AgentInfo, ...]:
        """Lists the agents that the caller may use, with their state on the node that answers."""
        return (await self.server_info()).agents

    async def server_info(self) -> ServerInfo:
        """The version of the server, and the agents that the caller may use, on the node that
        answers."""
        request = agents_pb.ListAgentsRequest()
        response = await self._wire.call(self._wire.agents.ListAgents, request)
        return ServerInfo(response.server_version, tuple(map(convert.agent, response.agents)))

    # --- Webhooks --------------------------------------------------------------------------------

    async def create_webhook(
        self,
        url: str,
        *,
        secret: str = "",
        events: WebhookFilter | None = None,
        full: bool = False,
        enabled: bool = True,
        run: WebhookRun | None = None,
    ) -> WebhookSecret:
        """Creates a webhook that delivers events from now on; returns it with its secret.

        Args:
            url: The URL to post to. It must answer a challenge first.
            secret: `whsec_` and the base64 of 24 to 64 bytes. Empty: the server creates one.
            events: The events to deliver; None: all.
            full: Deliver whole events, and not only ids and states.
            enabled: False: events wait until it is enabled.
            run: The single run whose events it delivers; None: those of all runs. It replaces the
                webhook of the same name of that run.

        The call is not retried: after a lost response the webhook may exist. Raises
        InvalidArgument, QuotaExceeded.
        """
        request = build(
            webhooks_pb.CreateWebhookRequest,
            url=url,
            secret=secret,
            filter=None if events is None else webhooks.to_filter(events),
            full=full,
            disabled=not enabled,
            run=None if run is None else webhooks.to_run(run),
        )
        wire = self._wire
        response = await wire.once(
            wire.webhooks.CreateWebhook, request, wire.timeout, wire.metadata
        )
        return WebhookSecret(webhooks.webhook(response.webhook), response.secret)

    async def get_webhook(self, webhook_id: str) -> Webhook:
        """Returns a webhook with its health. Raises WebhookNotFound."""
        request = build(webhooks_pb.GetWebhookRequest, webhook_id=webhook_id)
        response = await self._wire.call(self._wire.webhooks.GetWebhook, request)
        return webhooks.webhook(response.webhook)

    def list_webhooks(self, *, run_id: str = "", page_size: int = 0) -> Pager[Webhook]:
        """Lists webhooks, most recently created first; `page_size` as in `list_runs`.

        With a `run_id` only those of this run.
        """
        request = build(webhooks_pb.ListWebhooksRequest, run_id=run_id, page_size=page_size)

        async def fetch(page_token: str) -> Page[Webhook]:
            request.page_token = page_token
            response = await self._wire.call(self._wire.webhooks.ListWebhooks, request)
            return Page(tuple(map(webhooks.webhook, response.webhooks)), response.next_page_token)

        return Pager(fetch)

    async def update_webhook(
        self,
        webhook_id: str,
        *,
        url: str | None = None,
        events: WebhookFilter | None = None,
        full: bool | None = None,
        enabled: bool | None = None,
        etag: str = "",
    ) -> Webhook:
        """Changes what is not None. `events` replaces the whole filter.

        With an `etag` of a webhook that was changed meanwhile it raises WebhookChanged. `enabled`
        also ends a stop by the server. Raises WebhookNotFound, InvalidArgument.
        """
        wanted = None if events is None else webhooks.to_filter(events)
        changes = {"url": url, "filter": wanted, "full": full, "enabled": enabled}
        given = {name: value for name, value in changes.items() if value is not None}
        request = build(webhooks_pb.UpdateWebhookRequest, webhook_id=webhook_id, etag=etag, **given)
        request.update_mask.paths.extend(given)
        response = await self._wire.call(self._wire.webhooks.UpdateWebhook, request)
        return webhooks.webhook(response.webhook)

    async def delete_webhook(self, webhook_id: str) -> None:
        """Deletes a webhook. Raises WebhookNotFound."""
        request = build(webhooks_pb.DeleteWebhookRequest, webhook_id=webhook_id)
        try:
            await self._wire.call(self._wire.webhooks.DeleteWebhook, request)
        except WebhookNotFound as error:
            # Not found after a retry: an earlier attempt deleted it.
            if error.attempts == 1:
                raise

    async def redeliver_webhook(self, webhook_id: str, *, cursor: str | None = None) -> Webhook:
        """Delivers again what comes after a cursor; None: all that the event log still has.

        Raises WebhookNotFound, CursorInvalid, CursorCompacted.
        """
        request = build(
            webhooks_pb.RedeliverWebhookRequest,
            webhook_id=webhook_id,
            **({"from_beginning": True} if cursor is None else {"cursor": cursor}),
        )
        response = await self._wire.call(self._wire.webhooks.RedeliverWebhook, request)
        return webhooks.webhook(response.webhook)

    async def rotate_webhook_secret(
        self, webhook_id: str, *, secret: str = "", expire_now: bool = False
    ) -> WebhookSecret:
        """Replaces the secret; returns the new one. The old one signs for another day.

        The call is not retried. Raises WebhookNotFound, InvalidArgument.
        """
        request = build(
            webhooks_pb.RotateWebhookSecretRequest,
            webhook_id=webhook_id,
            secret=secret,
            expire_now=expire_now,
        )
        wire = self._wire
        response = await wire.once(
            wire.webhooks.RotateWebhookSecret, request, wire.timeout, wire.metadata
        )
        return WebhookSecret(webhooks.webhook(response.webhook), response.secret)


def over(wire: Wire) -> Client:
    """Returns a client over a wire; closing one closes both."""
    client = Client.__new__(Client)
    client._wire = wire  # noqa: SLF001 - made here
    return client


async def _wait_run(wire: Wire, run_id: str, timeout: Seconds | None) -> Run:
    clock = asyncio.get_running_loop().time
    deadline = None if timeout is None else clock() + seconds(timeout)
    backoff = Backoff(wire.retry)
    token_retried = False
    while True:
        started = clock()
        sent = wire.metadata
        remaining = WAIT_SLICE_SECONDS if deadline is None else max(deadline - started, 0.0)
        wait = min(remaining, WAIT_SLICE_SECONDS)
        pause = 0.0
        try:
            run = await _wait_once(wire, run_id, wait, sent)
            token_retried = False
            if run.state.terminal or (deadline is not None and clock() >= deadline):
                return run
            # A server that returns early must not be called in a tight loop.
            if clock() - started < wait:
                pause = backoff.next()
            else:
                backoff.reset()
        except RunlaneError as error:
            pause = backoff.next(error)
            is_late = deadline is not None and clock() + pause >= deadline
            retry_token = not token_retried and wire.has_new_token(error, sent)
            token_retried = token_retried or retry_token
            is_temporary = is_transient(error) or isinstance(error, DeadlineExceeded)
            if is_late or not (retry_token or is_temporary):
                raise
        await asyncio.sleep(pause)


async def _wait_once(wire: Wire, run_id: str, wait: float, metadata: Metadata) -> Run:
    request = build(runs_pb.WaitRunRequest, run_id=run_id, timeout=convert.to_duration(wait))
    response = await wire.once(wire.runs.WaitRun, request, wait + wire.timeout, metadata)
    return convert.run(response.run)
