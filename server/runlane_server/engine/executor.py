"""The runs that are active on this node: starts them, stops them, and takes up what was left.

It acts on what the lanes committed, and posts to the lanes what its runs report.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog
from uuid_utils import uuid7

from runlane_server.access.quotas import QuotaBook
from runlane_server.agents.base import Agent
from runlane_server.cluster.membership import Membership
from runlane_server.core import lane as rules
from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.limits import RETRY_PAUSE, Limits
from runlane_server.core.model import (
    Micros,
    RunComplete,
    RunError,
    RunEvent,
    RunKey,
    RunRequest,
    RunState,
    SessionKey,
    WhenBusy,
)
from runlane_server.core.observer import NO_OBSERVER, Load, Observer
from runlane_server.core.transition import Lane, LaneRun, Outcome, Transition
from runlane_server.core.turn import draft_of
from runlane_server.engine.agent_turn import Job
from runlane_server.engine.lanes import Lanes
from runlane_server.engine.runner import Runner
from runlane_server.engine.turns import claim_order_of
from runlane_server.harness.gates import Point, Stage
from runlane_server.store.base import ClaimOrder, HostedRun, Store
from runlane_server.store.retry import retry_read

log = structlog.get_logger()

READY_BACKOFF = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds between two tries to get the agent ready; the last one is repeated."""

STRAY_GRACE = 1.0
"""Seconds that agents which were fenced off have for a last time when the node stops."""

AT_ONCE = 500
"""How many sessions are worked on together where all of them are meant."""

EVENTS_PAGE = 1000
EVENTS_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What this node is to the others, where the store is shared: after how many seconds of silence
    they take it for lost, and what it calls itself."""

    lease: float = 10.0
    new_id: Callable[[], str] = field(default=lambda: str(uuid7()))


class Executor:
    """Runs what the lanes activate. One per node."""

    def __init__(
        self,
        store: Store,
        agent: Agent,
        limits: Limits,
        now: Callable[[], Micros],
        node: NodeSettings | None = None,
        *,
        observer: Observer = NO_OBSERVER,
        quotas: QuotaBook | None = None,
        stage: Stage | None = None,
    ) -> None:
        self.membership = _membership(store, self, node or NodeSettings())
        self._quotas = quotas or QuotaBook()
        self._stage = stage or Stage()
        self.lanes = Lanes(
            store,
            self,
            max_active=limits.max_active_runs,
            now=now,
            host=self.membership,
            quotas=self._quotas,
            stage=self._stage,
        )
        self.ready = False
        self.draining = False
        self._store = store
        self._agent = agent
        self._limits = limits
        self._now = now
        self._observer = observer
        self._runners: dict[SessionKey, Runner] = {}
        self._strays: set[asyncio.Task[None]] = set()
        self._supervisors: set[asyncio.Task[None]] = set()
        self._getting_ready: asyncio.Task[None] | None = None

    @property
    def load(self) -> Load:
        """What there is to do on this node, now."""
        lanes = self.lanes
        return Load(len(self._runners), lanes.waiting_runs, lanes.slots.in_use, self.draining)

    # --- Life ---------------------------------------------------------------------------------

    async def start(self, address: str) -> None:
        """Takes up what the store holds, then begins to run it as soon as the agent is ready.

        `address` is where other nodes reach this one.
        """
        self._stage.resume()
        if self.membership is None:
            await self._take_up()
        else:
            await self.membership.start(address)
        if self._limits.max_active_runs > 0:
            self._getting_ready = asyncio.create_task(self._get_ready())

    async def _take_up(self) -> None:
        """No other node has a part in the store: what is active in it is of one that is gone."""
        busy = await self._store.busy_sessions()
        for session in busy:
            self.lanes.take_up(session)
        lost = [session.key for session in busy if session.active]
        await _in_batches(self._recover(key) for key in lost)
        if busy:
            log.info("took up unfinished work", sessions=len(busy), active=len(lost))

    def begin_drain(self) -> None:
        """Takes no new run and starts none from now on; what waits is left for the next start."""
        self.draining = True
        self.lanes.slots.shut()
        self._stage.suspend()

    async def wait_idle(self, timeout: float) -> bool:
        """Waits until no run is active; returns whether that came true within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                # A run whose start is being committed is active in a moment.
                await self.lanes.settled()
                while self._supervisors:
                    await asyncio.wait(self._supervisors)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Stops what is active and writes what becomes of it (R17): a run that has an attempt left
        goes back to the head of its lane, any other ends INTERRUPTED.

        Takes the grace period of a cancel and the time of the last writes at the most.
        """
        self.begin_drain()
        if self._getting_ready is not None:
            self._getting_ready.cancel()
            await asyncio.wait({self._getting_ready}, timeout=self._limits.cancel_grace)
        # A start that was being committed when the node refused gets here; after it none comes.
        await self.lanes.settled()
        for runner in list(self._runners.values()):
            runner.hand_over()
        while self._supervisors:
            await asyncio.wait(self._supervisors)
        await self.lanes.settled()
        if strays := set(self._strays):
            for stray in strays:
                stray.cancel()
            await asyncio.wait(strays, timeout=STRAY_GRACE)
        if self.membership is not None:
            await self.membership.stop()
        await self._agent.close()

    # --- What the lanes ask for ---------------------------------------------------------------

    def committed(self, key: SessionKey, made: Transition) -> None:
        """Passes on what was committed."""
        self._observer.on_lane_changed(key, made)

    def started(self, key: SessionKey, run: LaneRun, request: RunRequest | None) -> None:
        """Starts the agent of a run that became active here."""
        run_key = RunKey(key.tenant, run.run_id)
        runner = Runner(
            Job(key, run, request, self._observer.agent_traceparent(run_key, run)),
            agent=self._agent,
            store=self._store,
            lane=self,
            now=self._now,
            cancel_grace=self._limits.cancel_grace,
            stage=self._stage,
        )
        self._runners[key] = runner
        self._observer.on_attempt_started(run_key, run)
        supervisor = runner.start()
        self._supervisors.add(supervisor)
        supervisor.add_done_callback(lambda task: self._ended(runner, task))
        if not self._hosts(run):
            # The answer came too late: what was to be given up was, and this is to go with it.
            runner.hand_over()

    def _hosts(self, run: LaneRun) -> bool:
        """Whether a run is this node's, by the name that it has now."""
        node = self.membership
        return node is None or (node.alive and node.node_id == run.host)

    def cancelling(self, key: SessionKey, run: LaneRun) -> bool:
        """Stops the agent of a run that a cancel covers; returns whether it is at work here."""
        if not self.runs_here(key, run):
            self._wake_others()
            return False
        self._runners[key].cancel(run.cancel_reason)
        return True

    def runs_here(self, key: SessionKey, run: LaneRun) -> bool:
        """Whether that attempt has an agent at work here."""
        runner = self._runners.get(key)
        return runner is not None and runner.job.attempt == (run.run_id, run.attempt)

    def left_waiting(self) -> None:
        """Another node may have a slot for a lane that has a run to start."""
        self._wake_others()

    def _wake_others(self) -> None:
        if self.membership is not None:
            self.membership.wake_others()

    # --- What other nodes have to do with -----------------------------------------------------

    @property
    def free_slots(self) -> int:
        """How many more lanes could have an active run here."""
        return self.lanes.slots.free

    @property
    def claim_order(self) -> ClaimOrder:
        """Whose turn it is here."""
        return claim_order_of(self.lanes.slots, self._quotas)

    def line_up(self, key: SessionKey) -> None:
        """A lane waits for a node, and this one is to serve it."""
        self.lanes.look_at(key)

    def cancelled_elsewhere(self, run: HostedRun) -> None:
        """Stops the agent of a run for a cancel that another node committed."""
        runner = self._runners.get(run.session)
        if runner is not None and runner.job.attempt == (run.run_id, run.attempt):
            runner.cancel("")

    def give_up(self) -> None:
        """Stops all agents: their runs are, or will be, another node's."""
        for runner in list(self._runners.values()):
            runner.hand_over()

    def count_waiting(self, runs: Mapping[str, int]) -> None:
        """So many runs of each tenant wait in the whole store."""
        self.lanes.waiting.told(runs)

    def _ended(self, runner: Runner, supervisor: asyncio.Task[None]) -> None:
        self._supervisors.discard(supervisor)
        self._observer.on_attempt_ended(runner.job.run_key)
        if self.membership is not None:
            # Its slot may be free now.
            self.membership.look()
        # The lane may have started its next run before the supervisor of this one returned.
        if self._runners.get(runner.job.key) is runner:
            del self._runners[runner.job.key]
        if runner.stray is not None:
            self._strays.add(runner.stray)
            runner.stray.add_done_callback(self._strays.discard)
        if not supervisor.cancelled() and (failure := supervisor.exception()) is not None:
            log.error("a supervisor failed", exc_info=failure, run_id=runner.job.run.run_id)

    # --- What the runners ask for -------------------------------------------------------------

    def may_fold(self, key: SessionKey) -> bool:
        """Whether a run waits to be folded in, as far as this node knows."""
        if self.membership is not None:
            return True  # who knows what was accepted elsewhere
        lane = self.lanes.peek(key)
        return lane is None or any(run.when_busy is WhenBusy.FOLD for run in lane.waiting)

    async def fold(self, job: Job, events: int, taken: Container[str]) -> Sequence[LaneRun]:
        """Folds what waits to be folded into the turn of that run.

        Where the store did not confirm it, the lane tells what was folded and is not `taken` yet.
        """
        while True:
            try:
                folded: Sequence[LaneRun] = await self.lanes.post(
                    job.key,
                    lambda lane, at: rules.drain_for_step(lane, *job.attempt, at=at, events=events),
                )
            except StoreUnavailable:
                if self._store.failed is not None:
                    raise
            else:
                return folded
            await asyncio.sleep(RETRY_PAUSE)
            lane = await retry_read(self._store, lambda: self._store.load_lane(job.key))
            missed = [run for run in lane.folded if run.run_id not in taken]
            active = lane.active
            if missed and active and (active.run_id, active.attempt) == job.attempt:
                return missed

    async def finish(self, job: Job, outcome: Outcome, events: int, cancelled: str | None) -> None:
        """Ends a run."""
        self._observer.on_agent_returned(job.run_key)
        complete: RunComplete = await self.lanes.post(
            job.key,
            lambda lane, at: rules.finish(
                lane, *job.attempt, outcome, at=at, events=events, cancelled=cancelled
            ),
        )
        # What went well is told on demand only, as with calls: it would be a line for every run.
        tell = log.info if complete.state is RunState.FAILED else log.debug
        tell("run ended", state=complete.state, finish_reason=complete.finish_reason)

    async def hand_over(self, job: Job, outcome: Outcome, events: int) -> None:
        """Gives a run up, as this node stops."""
        self._observer.on_agent_returned(job.run_key)
        await self.lanes.post(
            job.key,
            lambda lane, at: rules.hand_over(lane, *job.attempt, outcome, at=at, events=events),
        )
        log.info("run handed over")

    # --- Recovery and readiness ---------------------------------------------------------------

    async def _recover(self, key: SessionKey) -> None:
        lane = await self._store.load_lane(key)
        if lane.active is not None:
            await self.recover(HostedRun(key, lane.active.run_id, lane.active.attempt))

    async def recover(self, lost: HostedRun) -> None:
        """Takes care of an attempt whose node is gone: its events tell how far it came."""
        events = await self._events_of(RunKey(lost.session.tenant, lost.run_id))
        content = draft_of(events).messages()
        await self.lanes.post(
            lost.session,
            lambda lane, at: rules.node_lost(
                lane, lost.run_id, lost.attempt, at=at, content=content, events=len(events)
            ),
        )

    async def _events_of(self, key: RunKey) -> Sequence[RunEvent]:
        events: list[RunEvent] = []
        while page := await self._store.run_events(
            key, after=len(events), limit=EVENTS_PAGE, max_bytes=EVENTS_BYTES
        ):
            events += page
        return events

    async def _get_ready(self) -> None:
        """Gets the agent ready, however often that takes. What waited in vain ends failed (R30)."""
        for tries in itertools.count():
            failure = await self._try_to_start()
            if failure is None:
                break
            log.error("agent is not ready", error=failure)
            error = RunError("AGENT_NOT_READY", f"the agent did not get ready: {failure}")
            await self._fail_waiting(error)
            await asyncio.sleep(READY_BACKOFF[min(tries, len(READY_BACKOFF) - 1)])
        self.ready = True
        if not self.draining:
            self.lanes.slots.open()

    async def _try_to_start(self) -> str | None:
        try:
            async with asyncio.timeout(self._limits.ready_timeout):
                await self._stage.pass_by(Point.BEFORE_AGENT_READY)
                await self._agent.start()
        except TimeoutError:
            return f"not within {self._limits.ready_timeout:g} s"
        except Exception as error:  # noqa: BLE001 - an agent may raise anything; it is logged
            return f"{type(error).__name__}: {error}"
        return None

    async def _fail_waiting(self, error: RunError) -> None:
        keys = self.lanes.slots.line
        await _in_batches(
            self.lanes.post(key, lambda lane, at: _fail_what_waits_here(lane, error, at))
            for key in keys
        )


def _membership(store: Store, executor: Executor, node: NodeSettings) -> Membership | None:
    if store.cluster is None:
        return None
    return Membership(store.cluster, executor, lease=node.lease, new_id=node.new_id)


def _fail_what_waits_here(lane: Lane, error: RunError, at: Micros) -> Transition:
    """Where another node got ready before this one, and serves the lane, nothing has to fail."""
    if not lane.can_start:
        return Transition(lane)
    return rules.fail_waiting(lane, error, at=at)


async def _in_batches(work: Iterable[Awaitable[object]]) -> None:
    """Awaits all of it, `AT_ONCE` at a time."""
    rest = iter(work)
    while batch := list(itertools.islice(rest, AT_ONCE)):
        await asyncio.gather(*batch)
