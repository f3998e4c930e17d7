"""The client for programs without asyncio: the same calls, each of which waits.

with Client("127.0.0.1:50051") as client:
    handle = client.run_accepted("my-session", "What is new?", allow_missing=True)
    for event in handle.events():
        print(event.body)
    complete = handle.completed()

The calls run on one event loop in a thread of its own, which all clients of the process share.

- Any number of threads may use one `Client`. An iterator is for one thread at a time.
- KeyboardInterrupt in a call that waits cancels it. A run is not touched by that.
- Functions that a client is given (`token`, `on_lost`) are called in that thread: they must be
  short, and call no client.
- In a thread whose event loop runs, every call raises RuntimeError: `runlane.Client` is for that.
- After `os.fork()` a client that was made before raises RuntimeError in the child, and goes on in
  the parent. A new one works in the child if none was used before the fork; else it raises
  RuntimeError too, as gRPC does not outlive a fork: make clients after it.
"""

# Written by client/make_sync.py from the asynchronous client; `make docs` writes it anew.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self

import grpc

from runlane.client import DEFAULT_TARGET
from runlane.client import Client as AsyncClient
from runlane.convert import Seconds
from runlane.errors import RunlaneError
from runlane.pager import ItemT, Page
from runlane.pager import Pager as AsyncPager
from runlane.portal import Portal
from runlane.run_events import RunEvents as AsyncRunEvents
from runlane.run_handle import RunHandle as AsyncRunHandle
from runlane.subscription import SILENCE
from runlane.subscription import Subscription as AsyncSubscription
from runlane.types import (
    NO_LABELS,
    Attachment,
    CancelReceipt,
    CancelScope,
    Message,
    Progress,
    Run,
    RunComplete,
    RunEvent,
    RunState,
    Session,
    WhenBusy,
)
from runlane.wire import RetryPolicy

__all__ = ["Client", "Pager", "RunEvents", "RunHandle", "Subscription"]


class Client:
    """A connection to Runlane, for any number of threads.

        with Client("127.0.0.1:50051") as client:
            handle = client.run_accepted("my-session", "What is new?")
            complete = handle.completed()

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
        self._portal = Portal()
        self._inner = AsyncClient(
            target,
            credentials=credentials,
            metadata=metadata,
            token=token,
            plaintext_token=plaintext_token,
            timeout=timeout,
            retry=retry,
            options=options,
        )

    @property
    def target(self) -> str:
        """Where the server is."""
        return self._inner.target

    def close(self) -> None:
        """Closes the connection; what is under way raises ClientClosed. May be repeated."""
        self._portal.call(self._inner.close)

    def __enter__(self) -> Self:
        self._portal.call(self._inner.__aenter__)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._portal.call(self._inner.__aexit__, exc_type, exc, traceback)

    def run_accepted(
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
        return RunHandle(
            self._portal,
            self._portal.call(
                self._inner.run_accepted,
                session_id,
                prompt,
                run_id=run_id,
                attachments=attachments,
                when_busy=when_busy,
                timeout=timeout,
                max_attempts=max_attempts,
                metadata=metadata,
                allow_missing=allow_missing,
                traceparent=traceparent,
            ),
        )

    def attach(self, run_id: str) -> RunHandle:
        """A handle on a run that was accepted before. Raises RunNotFound."""
        return RunHandle(self._portal, self._portal.call(self._inner.attach, run_id))

    def cancel(
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
        return self._portal.call(
            self._inner.cancel, session_id, run_id=run_id, scope=scope, reason=reason
        )

    def cancel_all(self, reason: str = "") -> tuple[CancelReceipt, ...]:
        """Cancels what is accepted and not terminal in all sessions of the caller.

        Returns a receipt for every session in which a run was covered. Repeated only where the
        server certainly did nothing, see `cancel`.
        """
        return self._portal.call(self._inner.cancel_all, reason)

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
        return Subscription(
            self._portal,
            self._inner.subscribe_run_complete(
                session_ids=session_ids,
                run_ids=run_ids,
                cursor=cursor,
                from_beginning=from_beginning,
                silence=silence,
                max_silence=max_silence,
                on_lost=on_lost,
            ),
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
        return RunEvents(
            self._portal,
            self._inner.subscribe_run(run_id, after_index=after_index, on_lost=on_lost),
        )

    def wait_run(self, run_id: str, *, timeout: Seconds | None = None) -> Run:
        """Waits for a run to end, over lost connections and restarted servers.

        `timeout` is how long (seconds or a timedelta), None without limit. Returns the run at its
        end, or as it is when the time is up. Raises RunNotFound; Unavailable where the server is
        out of reach when the time is up.
        """
        return self._portal.call(self._inner.wait_run, run_id, timeout=timeout)

    def get_run(self, run_id: str) -> Run:
        """A run as it is. Raises RunNotFound."""
        return self._portal.call(self._inner.get_run, run_id)

    def list_runs(
        self, session_id: str | None = None, *, states: Iterable[RunState] = (), page_size: int = 0
    ) -> Pager[Run]:
        """Lists runs, the latest accepted first, without the text of their ends.

        Args:
            session_id: Only those of this session; None: of all.
            states: Only those in one of these states; none: in any.
            page_size: How many to ask for at a time; 0: 50, at most 1,000.

        Raises ValueError for a state that there is not, TypeError for one text in place of some.
        """
        return Pager(
            self._portal, self._inner.list_runs(session_id, states=states, page_size=page_size)
        )

    def create_session(
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
        return self._portal.call(
            self._inner.create_session, session_id, title=title, metadata=metadata
        )

    def get_session(self, session_id: str) -> Session:
        """A session as it is. Raises SessionNotFound."""
        return self._portal.call(self._inner.get_session, session_id)

    def list_sessions(self, *, page_size: int = 0) -> Pager[Session]:
        """Lists sessions, the latest created first; `page_size` as in `list_runs`."""
        return Pager(self._portal, self._inner.list_sessions(page_size=page_size))

    def delete_session(self, session_id: str) -> None:
        """Removes an idle session with its runs and its transcript.

        Terminal events that were written are still delivered. Raises SessionNotFound, SessionBusy.
        """
        self._portal.call(self._inner.delete_session, session_id)

    def list_messages(self, session_id: str, *, page_size: int = 0) -> Pager[Message]:
        """Lists the transcript of a session, the oldest message first.

        Messages that do not fit on one page are joined, unless pages are asked for. `page_size` as
        in `list_runs`. The first step raises SessionNotFound.
        """
        return Pager(self._portal, self._inner.list_messages(session_id, page_size=page_size))


@dataclass(frozen=True, slots=True)
class RunHandle:
    """An accepted run. Dropping it changes nothing about the run, which belongs to the server.

    Attributes:
        run: The run as it was when it was accepted, or when it was attached to.
        cursor: Just before all events of this run: a subscription from here misses nothing of it.
            None for a run that was attached to.
    """

    _portal: Portal = field(repr=False, compare=False)
    _inner: AsyncRunHandle

    @property
    def run(self) -> Run:
        """The run as it was when it was accepted, or when it was attached to."""
        return self._inner.run

    @property
    def cursor(self) -> str | None:
        """Just before all events of this run: a subscription from here misses nothing of it.
        None for a run that was attached to."""
        return self._inner.cursor

    @property
    def run_id(self) -> str:
        """The id of the run."""
        return self._inner.run_id

    @property
    def session_id(self) -> str:
        """The session of the run."""
        return self._inner.session_id

    def events(
        self, after_index: int = 0, *, on_lost: Callable[[RunlaneError], None] | None = None
    ) -> RunEvents:
        """Iterates over what happens in the run, from its acceptance, or after event `after_index`.

        It ends after the run's `RunComplete`; see `RunEvents` for what it does when connections
        break. `on_lost` is called with the error each time that happens.
        """
        return RunEvents(self._portal, self._inner.events(after_index, on_lost=on_lost))

    def completed(self, timeout: Seconds | None = None) -> RunComplete:
        """Waits for the run to end and tells how, over lost connections and restarted servers.

        `timeout` is how long to wait (seconds or a timedelta), None without limit. Raises
        DeadlineExceeded where the run has not ended by then, Unavailable where the server is out
        of reach by then. Neither changes anything about the run.
        """
        return self._portal.call(self._inner.completed, timeout)

    def cancel(self, reason: str = "") -> CancelReceipt:
        """Cancels the run, with the runs folded into it; no other run is touched.

        The receipt is empty where the run has ended, or was covered by an earlier cancel. The run
        ends a little later, which `completed` tells. Safe to repeat.
        """
        return self._portal.call(self._inner.cancel, reason)


class Subscription:
    """An endless iterator over terminal events; `Client.subscribe_run_complete` makes it.

        with client.subscribe_run_complete(session_ids=["s"]) as subscription:
            for complete in subscription:
                ...
                save(subscription.cursor)

    As a context manager it is established on entry: all that ends from then on is delivered. Used
    as a bare iterator, it is established by the first step.

    It goes on by itself where it was, after a lost connection, a silent one, and a server that
    drains or restarts; each event is delivered once and in order. It raises `CursorCompacted` where
    events were removed that it has not delivered, and other errors that do not pass with time. A
    step that is broken off ends the call: the next one goes on. One thread at a time.
    """

    def __init__(self, portal: Portal, inner: AsyncSubscription) -> None:
        self._portal = portal
        self._inner = inner

    @property
    def cursor(self) -> str | None:
        """Where a new subscription goes on after the event last delivered; opaque.

        Progress marks move it too. None before the subscription is established, unless it was
        given one.
        """
        return self._inner.cursor

    def start(self) -> None:
        """Establishes the subscription: all that ends from now on is delivered.

        Waits until the server answered, however long that takes (within max_silence).
        """
        self._portal.call(self._inner.start)

    def close(self) -> None:
        """Ends the subscription and its call. May be repeated."""
        self._portal.call(self._inner.aclose)

    def with_progress(self) -> Iterator[RunComplete | Progress]:
        """Iterates over progress marks too. They tell how far an idle stream has come."""
        return self._portal.iterate(self._inner.with_progress(), self)

    def __enter__(self) -> Self:
        self._portal.call(self._inner.__aenter__)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._portal.call(self._inner.__aexit__, exc_type, exc, traceback)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RunComplete:
        return self._portal.call(self._inner.__anext__)

    def next_item(self) -> RunComplete | Progress:
        """The next terminal event or progress mark. StopIteration after `close`."""
        return self._portal.call(self._inner.next_item)

    def __del__(self) -> None:
        self._portal.drop(self._inner.aclose)


class RunEvents:
    """An iterator over the events of a run that ends after its `RunComplete`.

    `Client.subscribe_run` and `RunHandle.events` make it. It goes on by itself after a lost
    connection, with the event after the last one it delivered. A later `Started` with an `attempt`
    above 1 means that the run starts over: deltas that came before do not count any more.

    Closing it, leaving its context or breaking off a step ends the call, never the run.
    """

    def __init__(self, portal: Portal, inner: AsyncRunEvents) -> None:
        self._portal = portal
        self._inner = inner

    @property
    def last_index(self) -> int:
        """The index of the event last delivered: where `after_index` goes on."""
        return self._inner.last_index

    def close(self) -> None:
        """Ends the iteration and its call. May be repeated."""
        self._portal.call(self._inner.aclose)

    def __enter__(self) -> Self:
        self._portal.call(self._inner.__aenter__)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._portal.call(self._inner.__aexit__, exc_type, exc, traceback)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RunEvent:
        return self._portal.call(self._inner.__anext__)

    def __del__(self) -> None:
        self._portal.drop(self._inner.aclose)


class Pager(Generic[ItemT]):
    """A listing: `for item in pager` goes over all of it, asking for pages as it gets there.

    `pager.page(token)` gets one page, `pager.pages()` iterates over them. Each step may raise
    what a call can raise.
    """

    def __init__(self, portal: Portal, inner: AsyncPager[ItemT]) -> None:
        self._portal = portal
        self._inner = inner

    def page(self, page_token: str = "") -> Page[ItemT]:
        """One page, as the server sent it; an empty token asks for the first."""
        return self._portal.call(self._inner.page, page_token)

    def pages(self) -> Iterator[Page[ItemT]]:
        """All pages, as the server sent them."""
        return self._portal.iterate(self._inner.pages(), self)

    def __iter__(self) -> Iterator[ItemT]:
        return self._portal.iterate(self._inner.__aiter__(), self)
