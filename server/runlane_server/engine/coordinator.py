"""Runlane in process: accept, cancel, wait, without gRPC.

The coordinator is the shell around the lanes: it checks what comes in, posts commands, and does
what a committed transition asks for. It answers nothing that is not committed, and decides no race.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn

import structlog
from uuid_utils import uuid7

from runlane_server.access.admission import Accepts
from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.access.quotas import QuotaBook
from runlane_server.access.stored_bytes import StoredBytes
from runlane_server.agents.base import Agent
from runlane_server.cluster.membership import Membership
from runlane_server.core import lane as rules
from runlane_server.core.errors import (
    CursorCompacted,
    Draining,
    InvalidArgument,
    Overloaded,
    RunIdConflict,
    RunlaneError,
    RunMissing,
    RunNotFound,
    SessionExists,
    SessionMissing,
    SessionNotFound,
    Violation,
)
from runlane_server.core.limits import Limits
from runlane_server.core.model import (
    NO_LABELS,
    NO_USAGE,
    CancelScope,
    Micros,
    Prompt,
    Run,
    RunComplete,
    RunKey,
    RunRequest,
    Session,
    SessionKey,
    WhenBusy,
)
from runlane_server.core.observer import NO_OBSERVER, CancelRequest, Load, Observer
from runlane_server.core.transition import Lane, Receipt, Transition, describe
from runlane_server.engine.executor import Executor, NodeSettings
from runlane_server.engine.mailbox import Command, OnDone
from runlane_server.engine.reservation import Acceptance, AcceptedRun, check_prompt
from runlane_server.feed.feed import Feed
from runlane_server.harness.clock import never_back
from runlane_server.harness.gates import Point, Stage
from runlane_server.store.base import (
    EventFilter,
    IdleSession,
    NewSession,
    RunIdTaken,
    SessionTaken,
    Store,
)
from runlane_server.store.weight import run_weight

log = structlog.get_logger()

RETRY_AFTER = 1.0
"""Seconds after which a caller who was told OVERLOADED may come back."""

WAIT_SLICE = 3600.0
"""Seconds after which somebody who waits for a run looks at it again, come what may."""


class Coordinator:
    """Coordinates the runs of all sessions of a store on this node.

    All methods belong to the event loop that `start` was called on. Every `tenant` sees its own
    sessions and runs only.
    """

    def __init__(
        self,
        store: Store,
        agent: Agent,
        feed: Feed,
        limits: Limits | None = None,
        *,
        node: NodeSettings | None = None,
        observer: Observer = NO_OBSERVER,
        quotas: QuotaBook | None = None,
        stage: Stage | None = None,
        now: Callable[[], Micros] = lambda: time.time_ns() // 1000,
        new_id: Callable[[], str] = lambda: str(uuid7()),
    ) -> None:
        self.store = store
        self.feed = feed
        self.limits = limits or Limits()
        self._new_id = new_id
        self._tokens = itertools.count(1)
        self.now = never_back(now)
        self._observer = observer
        quotas = quotas or QuotaBook()
        self.stored = StoredBytes(quotas, store)
        self._accepts = Accepts(quotas, self.stored)
        self._stage = stage or Stage()
        self._executor = Executor(
            store,
            agent,
            self.limits,
            self.now,
            node,
            observer=observer,
            quotas=quotas,
            stage=self._stage,
        )
        self._lanes = self._executor.lanes

    # --- Life ---------------------------------------------------------------------------------

    @property
    def is_agent_ready(self) -> bool:
        """Whether the agent is ready to run."""
        return self._executor.ready

    @property
    def membership(self) -> Membership | None:
        """This node among those that share the store; None if the store is its own."""
        return self._executor.membership

    @property
    def load(self) -> Load:
        """What there is to do on this node, now."""
        return self._executor.load

    async def start(self, address: str = "") -> None:
        """Takes up what the store holds, then begins to run it as soon as the agent is ready.

        `address` is where other nodes reach this one, if the store is shared.
        """
        await self._executor.start(address)

    def begin_drain(self) -> None:
        """Takes no new run and starts none from now on; what waits is left for the next start."""
        self._executor.begin_drain()

    async def wait_idle(self, timeout: float) -> bool:
        """Waits until no run is active; returns whether that came true within `timeout` seconds."""
        return await self._executor.wait_idle(timeout)

    async def stop(self) -> None:
        """Stops what is active and writes what becomes of it (R17): a run that has an attempt left
        goes back to the head of its lane, any other ends INTERRUPTED.

        Takes the grace period of a cancel and the time of the last writes at the most.
        """
        await self._executor.stop()

    # --- Accept -------------------------------------------------------------------------------

    def begin_accepted(
        self, session_id: str, run_id: str = "", *, tenant: str = DEFAULT_TENANT
    ) -> AcceptedRun:
        """Begins an accept. Without a `run_id` the run gets one.

        Raises SessionMissing, Draining, Overloaded if the node has as much waiting as it takes, and
        QuotaExceeded; with a `run_id` it is `run_accepted` that raises the latter, as the run may
        be there already.
        """
        if not session_id:
            raise _session_missing()
        if self._executor.draining:
            raise Draining("the server is shutting down", retry_after=RETRY_AFTER)
        if self._lanes.waiting_runs >= self.limits.max_waiting_total:
            raise Overloaded(
                f"{self._lanes.waiting_runs} runs wait on this node, as many as may",
                retry_after=RETRY_AFTER,
            )
        key = SessionKey(tenant, session_id)
        refusal = self._accepts.refusal(tenant, self._lanes.waiting.of(tenant))
        if refusal is not None:
            if not run_id:
                raise refusal
            return AcceptedRun(
                key, run_id, "", _nothing, began_at=self.now(), over=_nothing, refusal=refusal
            )
        run_id = run_id or self._new_id()
        token = str(next(self._tokens))
        self._lanes.send(key, lambda lane, _: rules.reserve(lane, token, run_id))
        self._accepts.begin(tenant)
        over = partial(self._accepts.end, tenant)
        return AcceptedRun(key, run_id, token, self._release, began_at=self.now(), over=over)

    def _release(self, accepted: AcceptedRun) -> None:
        self._lanes.send(accepted.key, lambda lane, _: rules.release(lane, accepted.token))

    async def run_accepted(
        self, accepted: AcceptedRun, request: RunRequest, *, allow_missing: bool = False
    ) -> Acceptance:
        """Makes a reservation a durable run, and returns once it is one (R1 to R3).

        Raises EmptyPrompt, PromptTooLarge, SessionNotFound, SessionBusy, QueueFull, QuotaExceeded,
        RunIdConflict and StoreUnavailable.
        """
        with accepted:
            if request.run_id != accepted.run_id or accepted.closed:
                raise ValueError("the request goes with an open reservation of its run id")
            check_prompt(request.prompt, self.limits)
            if accepted.refusal is not None:
                known = await self._accepted_before(accepted.key, request)
                return known or _raise(accepted.refusal)
            position = self.feed.position
            try:
                # A refused accept gives its reservation up at once: a cancel that comes next must
                # not name a run that is not, or that has ended.
                run, new = await self._lanes.post(
                    accepted.key,
                    self._accept(accepted.token, request, allow_missing),
                    otherwise=lambda lane, _: rules.release(lane, accepted.token),
                    creates=allow_missing,
                )
            except (RunlaneError, RunIdTaken) as refusal:
                # A run that was accepted before is returned whatever the lane says of a new one.
                known = await self._accepted_before(accepted.key, request)
                if known is not None:
                    return known
                if isinstance(refusal, RunIdTaken):
                    raise RunIdConflict.of(request.run_id) from None
                raise
            accepted.use()
            if not new:
                return await self._accepted_before(accepted.key, request) or _gone(run.run_id)
            self._observer.on_accepted(
                RunKey(accepted.key.tenant, run.run_id), run, accepted.began_at
            )
            self.stored.add(accepted.key.tenant, run_weight(request))
            await self._stage.pass_by(Point.ACCEPT_COMMITTED, accepted.session_id, run.run_id)
            return Acceptance(describe(accepted.key, run, request), position)

    async def run(
        self,
        session_id: str,
        prompt: Prompt,
        *,
        when_busy: WhenBusy = WhenBusy.QUEUE,
        allow_missing: bool = True,
        tenant: str = DEFAULT_TENANT,
    ) -> RunComplete:
        """Accepts a run and waits for its end. Raises what `run_accepted` raises."""
        with self.begin_accepted(session_id, tenant=tenant) as accepted:
            request = RunRequest(accepted.run_id, prompt, when_busy)
            await self.run_accepted(accepted, request, allow_missing=allow_missing)
        run = await self.wait_run(accepted.run_id, timeout=None, tenant=tenant)
        return run.complete or _gone(run.run_id)

    def _accept(self, token: str, request: RunRequest, allow_missing: bool) -> Command:
        def command(lane: Lane, at: Micros) -> Transition:
            made = rules.accept(
                lane,
                request,
                at=at,
                token=token,
                max_waiting=self.limits.max_waiting_runs,
                allow_missing=allow_missing,
            )
            # One that is in the lane already changes nothing.
            return made.replying((made.reply, made.needs_commit))

        return command

    async def _accepted_before(self, key: SessionKey, request: RunRequest) -> Acceptance | None:
        """The run that this run id names already, if it names one (R3)."""
        run_key = RunKey(key.tenant, request.run_id)
        run = await self.store.get_run(run_key)
        if run is None:
            return None
        same = run.session_id == key.session_id
        if not same or run.prompt_fingerprint != request.prompt.fingerprint:
            raise RunIdConflict.of(request.run_id)
        position = self.feed.position
        logged = await self.store.position_of(run_key)
        return Acceptance(run, position if logged is None else logged - 1)

    # --- Cancel -------------------------------------------------------------------------------

    async def cancel(
        self,
        session_id: str = "",
        *,
        scope: CancelScope = CancelScope.SESSION,
        run_id: str = "",
        reason: str = "",
        tenant: str = DEFAULT_TENANT,
    ) -> Receipt:
        """Cancels what the scope covers at this instant, and says what that was (R10 to R20).

        With a `run_id` the scope is that run, and the session may be left out. Raises
        SessionMissing, SessionNotFound and RunNotFound.
        """
        if run_id:
            scope = CancelScope.RUN
            session_id = session_id or (await self.get_run(run_id, tenant=tenant)).session_id
        if not session_id:
            raise _session_missing()
        key = SessionKey(tenant, session_id)
        receipt: Receipt = await self._lanes.post(
            key, _cancel(scope, run_id, reason), on_done=self._note_cancel(key, scope)
        )
        if run_id and not receipt.cancelled:
            run = await self.get_run(run_id, tenant=tenant)
            if run.session_id != session_id:
                raise RunNotFound.of(run_id)
        return receipt

    async def cancel_all(
        self, *, reason: str = "", tenant: str = DEFAULT_TENANT
    ) -> Sequence[Receipt]:
        """Cancels everything of a tenant; a receipt for each session that had work (R18)."""
        at_hand = [key for key in self._lanes.keys if key.tenant == tenant]

        def post(key: SessionKey) -> asyncio.Future[Receipt]:
            command = _cancel(CancelScope.SESSION, "", reason)
            return self._lanes.post(key, command, on_done=self._note_cancel(key, "all"))

        # Gathered at once: whoever goes away leaves no reply behind that nobody looks at.
        first = asyncio.gather(*map(post, at_hand), return_exceptions=True)
        stored = await self.store.busy_sessions()
        others = {s.key for s in stored if s.key.tenant == tenant}.difference(at_hand)
        rest = asyncio.gather(*map(post, sorted(others)), return_exceptions=True)
        receipts = [*await first, *await rest]
        failures = [r for r in receipts if isinstance(r, BaseException)]
        for failure in failures:
            if not isinstance(failure, SessionNotFound):
                raise failure
        return [r for r in receipts if isinstance(r, Receipt) and r.cancelled]

    def _note_cancel(self, key: SessionKey, scope: str) -> OnDone:
        """Has a cancel observed once it is carried out; it is asked for now."""
        return partial(self._observer.on_cancelled, CancelRequest(key, scope, self.now()))

    async def clear_queue(self, session_id: str, *, tenant: str = DEFAULT_TENANT) -> Receipt:
        """Cancels the waiting runs of a session; the active one lives on (R18)."""
        return await self.cancel(session_id, scope=CancelScope.WAITING, tenant=tenant)

    # --- Look ---------------------------------------------------------------------------------

    async def is_session_busy(self, session_id: str, *, tenant: str = DEFAULT_TENANT) -> bool:
        """Whether a session has work: active, waiting, or on its way in (R8, R9)."""
        key = SessionKey(tenant, session_id)
        if self._lanes.is_busy(key):
            return True
        session = await self.store.get_session(key)
        return session is not None and session.busy

    def is_busy(self) -> bool:
        """Whether this node has any work."""
        return bool(self._lanes.keys)

    async def queued_prompts(self, session_id: str, *, tenant: str = DEFAULT_TENANT) -> int:
        """How many runs of a session wait."""
        return len((await self.store.load_lane(SessionKey(tenant, session_id))).waiting)

    async def queued_prompts_list(
        self, session_id: str, *, tenant: str = DEFAULT_TENANT
    ) -> Sequence[Prompt]:
        """The prompts of the waiting runs of a session, the next one first."""
        lane = await self.store.load_lane(SessionKey(tenant, session_id))
        prompts = [await self.store.get_prompt(RunKey(tenant, run.run_id)) for run in lane.waiting]
        return [prompt for prompt in prompts if prompt is not None]

    async def get_run(self, run_id: str, *, tenant: str = DEFAULT_TENANT) -> Run:
        """A run. Raises RunMissing and RunNotFound."""
        if not run_id:
            raise _invalid(RunMissing, "run_id", "is missing")
        run = await self.store.get_run(RunKey(tenant, run_id))
        if run is None:
            raise RunNotFound.of(run_id)
        return run

    async def wait_run(
        self, run_id: str, *, timeout: float | None, tenant: str = DEFAULT_TENANT
    ) -> Run:
        """The run at its end, or as it is after `timeout` seconds. Raises as `get_run`, and
        Draining when the feed is closed."""
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        wanted = EventFilter(run_ids=frozenset({run_id}))
        subscription = self.feed.subscribe(tenant, wanted, self.feed.position)
        try:
            run = await self.get_run(run_id, tenant=tenant)
            while not run.state.is_terminal:
                left = WAIT_SLICE
                if deadline is not None:
                    left = min(left, deadline - asyncio.get_running_loop().time())
                if left <= 0:
                    break
                try:
                    await subscription.next(left)
                except CursorCompacted:
                    # Other events were removed while it read; the run itself tells.
                    subscription.close()
                    subscription = self.feed.subscribe(tenant, wanted, self.feed.position)
                run = await self.get_run(run_id, tenant=tenant)
            return run
        finally:
            subscription.close()

    # --- Sessions -----------------------------------------------------------------------------

    async def create_session(
        self,
        session_id: str = "",
        *,
        title: str = "",
        metadata: Mapping[str, str] = NO_LABELS,
        tenant: str = DEFAULT_TENANT,
    ) -> Session:
        """Creates a session; without an id it gets one. Raises SessionExists."""
        if self._executor.draining:
            raise Draining("the server is shutting down", retry_after=RETRY_AFTER)
        key = SessionKey(tenant, session_id or self._new_id())
        at = self.now()
        try:
            await self.store.create_session(NewSession(key, at, title, metadata))
        except SessionTaken:
            raise SessionExists(f"session {key.session_id!r} exists already") from None
        return Session(key.session_id, title, metadata, "", 0, NO_USAGE, at, at)

    async def delete_session(self, session_id: str, *, tenant: str = DEFAULT_TENANT) -> None:
        """Removes an idle session with its runs and transcript. Terminal events stay in the log.

        Raises SessionMissing, SessionNotFound, and SessionBusy.
        """
        if not session_id:
            raise _session_missing()
        await self._lanes.post(SessionKey(tenant, session_id), lambda lane, _: rules.remove(lane))

    async def delete_unused(self, session: IdleSession) -> None:
        """Removes a session as `delete_session` does, if nothing has happened to it since.

        Raises SessionNotFound, and SessionBusy if it was used.
        """
        since = (session.version, session.accept_seq)
        await self._lanes.post(
            session.key, lambda lane, _: rules.remove(lane, unchanged_since=since)
        )


def _cancel(scope: CancelScope, run_id: str, reason: str) -> Command:
    def command(lane: Lane, at: Micros) -> Transition:
        if not lane.exists and not lane.reservations:
            raise SessionNotFound.of(lane.key.session_id)
        return rules.cancel(lane, scope, at=at, run_id=run_id, reason=reason)

    return command


def _session_missing() -> RunlaneError:
    return _invalid(SessionMissing, "session_id", "is missing")


def _invalid(kind: type[InvalidArgument], field: str, description: str) -> RunlaneError:
    return kind(f"{field}: {description}", violations=[Violation(field, description)])


def _nothing(*_: object) -> None:
    """There is nothing to give up."""


def _raise(error: RunlaneError) -> NoReturn:
    raise error


def _gone(run_id: str) -> NoReturn:
    raise RunNotFound.of(run_id)
