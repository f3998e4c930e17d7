"""The in-process API: accept, cancel and wait without gRPC (R29).

The coordinator checks requests, posts commands to the lanes, and answers once they are committed.
It never decides a race.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

from uuid_utils import uuid7

from runlane_server.access.admission import Admission
from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.access.grants import GrantBook
from runlane_server.access.quotas import QuotaBook
from runlane_server.access.stored_bytes import StoredBytes
from runlane_server.agents.base import Agent
from runlane_server.agents.worker.workers import Workers
from runlane_server.cluster.membership import Membership
from runlane_server.core import lane as rules
from runlane_server.core.agents import AgentNames
from runlane_server.core.errors import (
    CorruptRecord,
    CursorCompacted,
    Draining,
    Overloaded,
    RunDeleted,
    RunIdConflict,
    RunlaneError,
    RunMissing,
    RunNotFound,
    SessionMissing,
    SessionNotFound,
    StoreUnavailable,
)
from runlane_server.core.limits import Limits, prompt_errors
from runlane_server.core.model import (
    CancelScope,
    Micros,
    Prompt,
    Run,
    RunComplete,
    RunKey,
    RunRequest,
    SessionKey,
    WhenBusy,
)
from runlane_server.core.observer import NO_OBSERVER, CancelRequest, Load, Observer
from runlane_server.core.transition import Lane, LaneRun, Receipt, Transition, describe
from runlane_server.engine.agent_table import AgentState, AgentTable
from runlane_server.engine.cancel_all import CancelAll, CancelledPage
from runlane_server.engine.executor import Executor, NodeSettings
from runlane_server.engine.inputs import Inputs
from runlane_server.engine.mailbox import Command, OnCommit
from runlane_server.engine.pulse import Pulse
from runlane_server.engine.reservation import Acceptance, AcceptedRun, AcceptsInProgress
from runlane_server.engine.run_log import log_accepted
from runlane_server.engine.safe_observer import SafeObserver
from runlane_server.engine.sessions import Sessions
from runlane_server.engine.updates import Updates
from runlane_server.feed.feed import Feed
from runlane_server.harness.clock import monotonic_clock
from runlane_server.harness.gates import Gates, Point
from runlane_server.store.base import (
    EventFilter,
    HostedRun,
    RunIdTaken,
    Store,
)
from runlane_server.store.corrupt import EXPLANATION, is_corrupt
from runlane_server.store.weight import run_weight

RETRY_AFTER = 1.0
"""Seconds after which a caller may retry when this node is overloaded or drains."""

WAIT_SLICE = 3600.0
"""Seconds between reads of a run that is being waited for, even if no event arrives."""


class Coordinator:
    """Coordinates the runs of all sessions of a store on this node.

    All methods belong to the event loop that `start` was called on. Every `tenant` sees only its
    own sessions and runs.
    """

    def __init__(
        self,
        store: Store,
        agents: Agent | AgentTable,
        feed: Feed,
        limits: Limits | None = None,
        *,
        node: NodeSettings | None = None,
        observer: Observer = NO_OBSERVER,
        quotas: QuotaBook | None = None,
        grants: GrantBook | None = None,
        gates: Gates | None = None,
        pulse: Pulse | None = None,
        now: Callable[[], Micros] = lambda: time.time_ns() // 1000,
        new_id: Callable[[], str] = lambda: str(uuid7()),
    ) -> None:
        self.store = store
        self.feed = feed
        self.limits = limits or Limits()
        self._new_id = new_id
        self._tokens = itertools.count(1)
        self._accepting = AcceptsInProgress()
        self.now = monotonic_clock(now)
        self._observer = observer = SafeObserver(observer)
        quotas = quotas or QuotaBook()
        self.stored = StoredBytes(quotas, store)
        self._admission = Admission(quotas, self.stored)
        self._gates = gates or Gates()
        self._agents = AgentTable.of(agents)
        self._executor = Executor(
            store,
            self._agents,
            self.limits,
            self.now,
            node or NodeSettings(),
            observer=observer,
            quotas=quotas,
            grants=GrantBook() if grants is None else grants,
            gates=self._gates,
            # A simulation has no load to measure, and the words of its agents wait for nothing.
            pulse=pulse or Pulse(0.0),
        )
        self._lanes = self._executor.lanes
        self.inputs = Inputs(self._lanes, store, self._agents.names, self.now)
        self.updates = Updates(
            self._lanes,
            store,
            limits=lambda: self.limits,
            agents=lambda: self._agents.names,
            admission=self._admission,
            stored=self.stored,
        )
        self.sessions = Sessions(
            self._lanes,
            store,
            self._agents,
            self._admission,
            self.stored,
            now=self.now,
            new_id=new_id,
            check_open=self._check_not_draining,
        )

    # --- Start and stop -----------------------------------------------------------------------

    @property
    def are_agents_ready(self) -> bool:
        """Whether all agents that execute runs on this node are ready."""
        return self._agents.are_ready

    @property
    def workers(self) -> Workers | None:
        """The workers of the network; None if no agent is executed by them."""
        return self._agents.workers

    @property
    def agents(self) -> Sequence[AgentState]:
        """The declared agents with their state on this node."""
        return self._agents.states

    def on_agent_ready(self, call: Callable[[str], None]) -> None:
        """Calls `call` with the name of each agent that gets ready."""
        self._executor.on_agent_ready = call

    @property
    def membership(self) -> Membership | None:
        """The membership of this node in its cluster; None if it has the store to itself."""
        return self._executor.membership

    @property
    def load(self) -> Load:
        """The current load of this node."""
        return self._executor.load

    async def start(self, address: str = "") -> None:
        """Restores the work in the store, and runs it as soon as its agents are ready.

        `address` is where other nodes reach this one, if the store is shared.
        """
        await self._executor.start(address)

    def begin_drain(self) -> None:
        """Accepts and starts no run from now on; waiting runs stay in the store."""
        self._executor.begin_drain()

    async def wait_idle(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds until no run is active; returns whether that is so."""
        return await self._executor.wait_idle(timeout)

    async def stop(self) -> None:
        """Stops all agents and commits the end of their runs (R17).

        A run with an attempt left goes back to the head of its lane; any other ends INTERRUPTED.
        Takes at most the grace period of a cancel and the time of the last writes.
        """
        await self._executor.stop()

    # --- Accept -------------------------------------------------------------------------------

    def begin_accepted(
        self, session_id: str, run_id: str = "", *, tenant: str = DEFAULT_TENANT
    ) -> AcceptedRun:
        """Begins an accept; the server generates a `run_id` if there is none.

        Raises SessionMissing, Draining, Overloaded if the node is at its limit of waiting runs, and
        QuotaExceeded. With a `run_id`, `run_accepted` raises the latter instead, because the run
        may exist already (R3).
        """
        if not session_id:
            raise SessionMissing.of("session_id", "is missing")
        self._check_not_draining()
        if self._lanes.waiting_runs >= self.limits.max_waiting_total:
            raise Overloaded(
                f"this node is at its limit of {self.limits.max_waiting_total} waiting runs",
                retry_after=RETRY_AFTER,
            )
        key = SessionKey(tenant, session_id)
        refusal = self._admission.refusal(tenant, self._lanes.waiting.of(tenant))
        if refusal is not None:
            if not run_id:
                raise refusal
            return AcceptedRun(key, run_id, began_at=self.now(), refusal=refusal)
        run_id = run_id or self._new_id()
        token = str(next(self._tokens))
        self._lanes.send(key, lambda lane, _: rules.reserve(lane, token, run_id))
        self._admission.begin(tenant)
        self._accepting.begin(RunKey(tenant, run_id), key)
        return AcceptedRun(key, run_id, token, began_at=self.now(), on_end=self._end_accept)

    def _end_accept(self, accepted: AcceptedRun, used: bool) -> None:
        self._accepting.end(RunKey(accepted.key.tenant, accepted.run_id), accepted.key)
        self._admission.end(accepted.key.tenant)
        if not used:
            self._lanes.release(accepted.key, accepted.token)

    def _check_not_draining(self) -> None:
        if self._executor.is_draining:
            raise Draining("the server is shutting down", retry_after=RETRY_AFTER)

    async def run_accepted(
        self,
        accepted: AcceptedRun,
        request: RunRequest,
        *,
        allow_missing: bool = False,
        allowed_agents: frozenset[str] | None = None,
    ) -> Acceptance:
        """Turns a reservation into a durable run, and returns once it is durable (R1 to R3).

        `allowed_agents` are those that the caller may use; None: all (R31). Raises EmptyPrompt,
        PromptTooLarge, SessionNotFound, AgentNotFound, PermissionDenied, SessionBusy, QueueFull,
        QuotaExceeded, RunIdConflict, RunDeleted and StoreUnavailable.
        """
        with accepted:
            if request.run_id != accepted.run_id or accepted.is_closed:
                raise ValueError("run_id: no open reservation has this run id")
            for error in prompt_errors(request.prompt, self.limits):
                raise error
            if accepted.refusal is not None:
                known = await self._find_accepted(accepted.key, request)
                if known is None:
                    raise accepted.refusal
                return known
            position = self.feed.position
            try:
                # A refused accept releases its reservation at once: the receipt of the next cancel
                # must not list a run that does not exist or has ended.
                run, new = await self._lanes.post(
                    accepted.key,
                    self._accept(
                        accepted.token,
                        request,
                        self._agents.names.limited_to(allowed_agents),
                        allow_missing=allow_missing,
                    ),
                    fallback=lambda lane, _: rules.release(lane, accepted.token),
                    creates=allow_missing,
                )
            except (RunlaneError, RunIdTaken) as refusal:
                # A run that was accepted earlier is returned even if a new one would be refused.
                known = await self._find_accepted(accepted.key, request)
                if known is not None:
                    return known
                if isinstance(refusal, RunIdTaken):
                    raise RunIdConflict.of(request.run_id) from None
                raise
            accepted.use()
            if not new:
                known = await self._find_accepted(accepted.key, request)
                if known is None:
                    raise RunNotFound.of(run.run_id)
                return known
            log_accepted(accepted.session_id, run)
            self._observer.on_accepted(
                RunKey(accepted.key.tenant, run.run_id), run, accepted.began_at
            )
            self.stored.add(accepted.key.tenant, run_weight(request))
            await self._gates.wait_at(Point.ACCEPT_COMMITTED, accepted.session_id, run.run_id)
            return Acceptance(describe(accepted.key, run, request), position)

    async def run(
        self,
        session_id: str,
        prompt: Prompt,
        *,
        when_busy: WhenBusy = WhenBusy.QUEUE,
        agent: str = "",
        allow_missing: bool = True,
        tenant: str = DEFAULT_TENANT,
    ) -> RunComplete:
        """Accepts a run and waits for its end. Raises what `run_accepted` raises."""
        with self.begin_accepted(session_id, tenant=tenant) as accepted:
            request = RunRequest(accepted.run_id, prompt, when_busy, agent=agent)
            await self.run_accepted(accepted, request, allow_missing=allow_missing)
        run = await self.wait_run(accepted.run_id, timeout=None, tenant=tenant)
        if run.complete is None:
            raise RunNotFound.of(run.run_id)
        return run.complete

    def _accept(
        self, token: str, request: RunRequest, agents: AgentNames, *, allow_missing: bool
    ) -> Command[tuple[LaneRun, bool]]:
        """The command of an accept; replies with the run and whether it is new."""

        def command(lane: Lane, at: Micros) -> Transition[tuple[LaneRun, bool]]:
            if all(held.token != token for held in lane.reservations):
                # The lane could not be loaded for the reservation.
                raise StoreUnavailable("the store did not answer while the accept began")
            made = rules.accept(
                lane,
                request,
                at=at,
                token=token,
                max_waiting=self.limits.max_waiting_runs,
                allow_missing=allow_missing,
                agents=agents,
            )
            # A run that is in the lane already changes nothing.
            return made.replying((made.reply, made.needs_commit))

        return command

    async def _find_accepted(self, key: SessionKey, request: RunRequest) -> Acceptance | None:
        """The run that this run id already names, if any (R3). Raises RunDeleted and
        RunIdConflict."""
        run_key = RunKey(key.tenant, request.run_id)
        run = await self.store.get_run(run_key)
        if run is None:
            await self._check_not_deleted(key, request)
            return None
        if is_corrupt(run):
            raise CorruptRecord(f"run {request.run_id!r}: {EXPLANATION}")
        same = run.session_id == key.session_id
        if not same or run.prompt_fingerprint != request.fingerprint:
            raise RunIdConflict.of(request.run_id)
        position = self.feed.position
        logged = await self.store.position_of(run_key)
        return Acceptance(run, position if logged is None else logged - 1)

    async def _check_not_deleted(self, key: SessionKey, request: RunRequest) -> None:
        deleted = await self.store.get_deleted_run(RunKey(key.tenant, request.run_id))
        if deleted is None:
            return
        asked = (key.session_id, request.fingerprint)
        if (deleted.session_id, deleted.prompt_fingerprint) != asked:
            raise RunIdConflict.of(request.run_id)
        raise RunDeleted.of(request.run_id)

    # --- Workers ------------------------------------------------------------------------------

    async def adopt(
        self,
        key: RunKey,
        attempt: int,
        fence: str,
        *,
        allowed_agents: frozenset[str] | None = None,
    ) -> bool:
        """Continues an attempt on this node, where its worker is connected now (R36).

        Returns whether `fence` is the token of the active attempt, of one of the `allowed_agents`;
        None: all.
        """
        run = await self.store.get_run(key)
        if run is None or run.state.is_terminal:
            return False
        agent = self._agents.names.full_name(run.agent)
        if allowed_agents is not None and agent not in allowed_agents:
            return False
        hosted = HostedRun(SessionKey(key.tenant, run.session_id), run.run_id, attempt)
        return await self._executor.adopt(hosted, fence)

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
        """Cancels the runs that the scope covers at this instant, and lists them (R10 to R20).

        With a `run_id` the scope is that run, and `session_id` is optional; the run may be one that
        is being accepted on this node. Raises SessionMissing,
        SessionNotFound and RunNotFound.
        """
        if run_id:
            scope = CancelScope.RUN
            session_id = session_id or await self._session_of(RunKey(tenant, run_id))
        if not session_id:
            raise SessionMissing.of("session_id", "is missing")
        key = SessionKey(tenant, session_id)
        accepting = self._accepting.sessions(RunKey(tenant, run_id))
        receipt = await self._lanes.post(
            key, _cancel(scope, run_id, reason), on_commit=self._observe_cancel(key, scope)
        )
        # An accept in progress that an earlier cancel covers is no run yet (R13).
        if run_id and not receipt.cancelled and key not in accepting:
            run = await self.get_run(run_id, tenant=tenant)
            if run.session_id != session_id:
                raise RunNotFound.of(run_id)
        return receipt

    async def _session_of(self, key: RunKey) -> str:
        """The session of a run. Its accept may be in progress on this node: a caller who made the
        id may cancel the run before the accept is answered (R10). Raises RunNotFound."""
        # Before the read, during which the accept may be committed.
        accepting = self._accepting.sessions(key)
        run = await self.store.get_run(key)
        if run is not None:
            return run.session_id
        if not accepting:
            raise RunNotFound.of(key.run_id)
        return accepting[0].session_id

    async def cancel_all(
        self, *, reason: str = "", tenant: str = DEFAULT_TENANT
    ) -> Sequence[Receipt]:
        """Cancels all runs of a tenant; returns a receipt for each session that had work (R18)."""
        return await self._cancel_all(reason, tenant).at_once()

    async def cancel_page(
        self, *, after: str, max_runs: int, reason: str = "", tenant: str = DEFAULT_TENANT
    ) -> CancelledPage:
        """Cancels about `max_runs` runs of the sessions whose ids follow `after`; "" for the first.

        Repeat it with `next` of the result until that is empty.
        """
        return await self._cancel_all(reason, tenant).page(after, max_runs)

    def _cancel_all(self, reason: str, tenant: str) -> CancelAll:
        def post(key: SessionKey) -> asyncio.Future[Receipt]:
            command = _cancel(CancelScope.SESSION, "", reason)
            return self._lanes.post(key, command, on_commit=self._observe_cancel(key, "all"))

        return CancelAll(self._lanes, self.store, tenant, post)

    def _observe_cancel(self, key: SessionKey, scope: str) -> OnCommit[Receipt]:
        """Passes a cancel that is requested now to the observer once it is committed."""
        return partial(self._observer.on_cancelled, CancelRequest(key, scope, self.now()))

    async def clear_queue(self, session_id: str, *, tenant: str = DEFAULT_TENANT) -> Receipt:
        """Cancels the waiting runs of a session; the active one continues (R18)."""
        return await self.cancel(session_id, scope=CancelScope.WAITING, tenant=tenant)

    # --- Read ---------------------------------------------------------------------------------

    async def is_session_busy(self, session_id: str, *, tenant: str = DEFAULT_TENANT) -> bool:
        """Whether a session has an active run, a waiting one, or a begun accept (R8, R9)."""
        key = SessionKey(tenant, session_id)
        if self._lanes.is_busy(key):
            return True
        session = await self.store.get_session(key)
        return session is not None and session.busy

    def is_busy(self) -> bool:
        """Whether this node has any work."""
        return bool(self._lanes.keys)

    async def queued_prompts(self, session_id: str, *, tenant: str = DEFAULT_TENANT) -> int:
        """The number of waiting runs of a session."""
        return len((await self.store.load_lane(SessionKey(tenant, session_id))).waiting)

    async def queued_prompts_list(
        self, session_id: str, *, tenant: str = DEFAULT_TENANT
    ) -> Sequence[Prompt]:
        """The prompts of the waiting runs of a session, the next one first."""
        lane = await self.store.load_lane(SessionKey(tenant, session_id))
        prompts = [await self.store.get_prompt(RunKey(tenant, run.run_id)) for run in lane.waiting]
        return [prompt for prompt in prompts if prompt is not None]

    async def get_run(self, run_id: str, *, tenant: str = DEFAULT_TENANT) -> Run:
        """Reads a run. Raises RunMissing and RunNotFound."""
        if not run_id:
            raise RunMissing.of("run_id", "is missing")
        run = await self.store.get_run(RunKey(tenant, run_id))
        if run is None:
            raise RunNotFound.of(run_id)
        return run

    async def wait_run(
        self, run_id: str, *, timeout: float | None, tenant: str = DEFAULT_TENANT
    ) -> Run:
        """Waits for the end of a run, for at most `timeout` seconds; returns the run as it is then.

        Raises what `get_run` raises, and Draining when the feed is closed.
        """
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
                    # Events were compacted away while it read; the run itself has the answer.
                    subscription.close()
                    subscription = self.feed.subscribe(tenant, wanted, self.feed.position)
                run = await self.get_run(run_id, tenant=tenant)
            return run
        finally:
            subscription.close()


def _cancel(scope: CancelScope, run_id: str, reason: str) -> Command[Receipt]:
    def command(lane: Lane, at: Micros) -> Transition[Receipt]:
        if not lane.exists and not lane.reservations:
            raise SessionNotFound.of(lane.key.session_id)
        return rules.cancel(lane, scope, at=at, run_id=run_id, reason=reason)

    return command
