"""Executes the runs that are active on this node: starts and stops their agents."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hmac import compare_digest
from typing import Any

import structlog
from uuid_utils import uuid7

from runlane_server.access.admission import QuestionRate
from runlane_server.access.grants import GrantBook
from runlane_server.access.quotas import QuotaBook
from runlane_server.agents.worker.agent import WorkerAgent
from runlane_server.cluster.membership import Membership
from runlane_server.core import lane as rules
from runlane_server.core.errors import IllegalCommand
from runlane_server.core.limits import Limits
from runlane_server.core.model import Micros, RunKey, RunRequest, RunState, SessionKey
from runlane_server.core.observer import Load, Observer
from runlane_server.core.transition import Lane, LaneRun, Transition
from runlane_server.engine.agent_code import contain_tasks, create_own_task
from runlane_server.engine.agent_table import AgentTable
from runlane_server.engine.agent_turn import Job
from runlane_server.engine.lane_access import LaneAccess
from runlane_server.engine.lanes import Lanes
from runlane_server.engine.pulse import Pulse
from runlane_server.engine.readiness import Readiness
from runlane_server.engine.recovery import Recovery
from runlane_server.engine.replay import Replays
from runlane_server.engine.run_log import log_ends
from runlane_server.engine.runner import Runner
from runlane_server.engine.standing_approvals import StandingApprovals
from runlane_server.engine.worker_turn import fence_of
from runlane_server.harness.gates import Gates
from runlane_server.store.base import HostedRun, Store

log = structlog.get_logger()

STRAY_GRACE = 1.0
"""Seconds that fenced-off agents get to return when the node stops."""


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """The settings of a node that shares its store: the heartbeat timeout in seconds, after which
    other nodes declare this node dead, and the source of its ids."""

    lease: float = 10.0
    new_id: Callable[[], str] = field(default=lambda: str(uuid7()))


def _ignore(_: str) -> None:
    """Does nothing."""


class Executor:
    """Runs the agents of the runs that the lanes activate. One per node."""

    def __init__(
        self,
        store: Store,
        agents: AgentTable,
        limits: Limits,
        now: Callable[[], Micros],
        node: NodeSettings,
        *,
        observer: Observer,
        quotas: QuotaBook,
        grants: GrantBook,
        gates: Gates,
        pulse: Pulse,
    ) -> None:
        names = agents.names
        self._replays = Replays(store, limits.max_run_output)
        self._recovery = Recovery(store, self, quotas, names, self._replays)
        self.membership: Membership | None = None
        if store.cluster is not None:
            self.membership = Membership(
                store.cluster, self._recovery, lease=node.lease, new_id=node.new_id
            )
        self.lanes = Lanes(
            store,
            self,
            max_active=limits.max_active_runs,
            now=now,
            membership=self.membership,
            quotas=quotas,
            gates=gates,
            agents=names,
            room=agents.room,
        )
        self._readiness = [
            Readiness(each, names, self.lanes, limits, gates=gates, on_ready=self._on_ready)
            for each in agents
        ]
        self.on_agent_ready: Callable[[str], None] = _ignore
        self.is_draining = False
        self._lane_access = LaneAccess(
            self.lanes,
            store,
            observer,
            rate=QuestionRate(quotas),
            approvals=StandingApprovals(grants, self.lanes, names, now),
        )
        self._store = store
        self._agents = agents
        self._limits = limits
        self._now = now
        self._observer = observer
        self._gates = gates
        self._pulse = pulse
        self._runners: dict[SessionKey, Runner] = {}
        self._ending: set[SessionKey] = set()
        self._strays: set[asyncio.Task[Any]] = set()
        self._supervisors: set[asyncio.Task[None]] = set()
        self._connect_workers()

    def _connect_workers(self) -> None:
        """Makes the slots of workers those of their agents."""
        for each in self._agents:
            if isinstance(each.agent, WorkerAgent):
                add_slots = partial(self.lanes.slots.add_offered, each.name)
                each.agent.workers.serve(each.name, add_slots, self._grant_offered)

    def _grant_offered(self) -> None:
        self.lanes.slots.grant_offered()
        if self.membership is not None:
            self.membership.poll_soon()

    @property
    def load(self) -> Load:
        """The load of this node."""
        lanes = self.lanes
        active = dict.fromkeys(self._agents.names.names, 0)
        for runner in self._runners.values():
            active[self._agents.names.full_name(runner.job.run.agent)] += 1
        return Load(
            len(self._runners),
            lanes.waiting_runs,
            lanes.slots.in_use,
            self.is_draining,
            active,
        )

    # --- Start and stop -----------------------------------------------------------------------

    async def start(self, address: str) -> None:
        """Restores the work in the store, and runs it as soon as its agents are ready.

        `address` is where other nodes reach this one.
        """
        contain_tasks(asyncio.get_running_loop())
        self._gates.resume()
        if self.membership is None:
            await self._recovery.restore()
        else:
            await self.membership.start(address)
        if not self.is_draining:
            self.lanes.slots.open()
        for each in self._readiness:
            each.start()

    def _on_ready(self, agent: str) -> None:
        self.lanes.slots.open_agent(agent)
        self.on_agent_ready(agent)
        if self.membership is not None:
            # Other lanes may wait for this agent.
            self.membership.poll_soon()

    def begin_drain(self) -> None:
        """Starts no run from now on; waiting runs stay in the store for the next start."""
        self.is_draining = True
        self.lanes.slots.close()
        # They could wait for months.
        for runner in list(self._runners.values()):
            if runner.is_waiting:
                runner.hand_over(rules.SHUT_DOWN)
        self._gates.suspend()
        if self._agents.workers is not None:
            self._agents.workers.close()
            self._leave_runs_of_workers()

    def _leave_runs_of_workers(self) -> None:
        """They continue on another node, or here after the restart (R36)."""
        for runner in list(self._runners.values()):
            if self.can_continue(runner.job.run):
                runner.hand_over()

    async def wait_idle(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds until no run is active; returns whether that is so."""
        try:
            async with asyncio.timeout(timeout):
                # A run whose start is being committed becomes active in a moment.
                await self.lanes.wait_settled()
                while self._supervisors:
                    await asyncio.wait(self._supervisors)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Stops all agents and commits the end of their runs (R17).

        A run with an attempt left goes back to the head of its lane; any other ends INTERRUPTED.
        Takes at most the grace period of a cancel and the time of the last writes.
        """
        self.begin_drain()
        await asyncio.gather(*(each.stop() for each in self._readiness))
        # A start that was being committed when the drain began gets here; after it none comes.
        await self.lanes.wait_settled()
        self.hand_over_all(rules.SHUT_DOWN)
        while self._supervisors:
            await asyncio.wait(self._supervisors)
        await self.lanes.wait_settled()
        if strays := set(self._strays):
            for stray in strays:
                stray.cancel()
            await asyncio.wait(strays, timeout=STRAY_GRACE)
        if self.membership is not None:
            await self.membership.stop()
        await self._agents.close(self._limits.cancel_grace)

    # --- The actions of the lanes -------------------------------------------------------------

    def on_committed(self, key: SessionKey, transition: Transition) -> None:
        """Passes a committed transition to the log and to the observer."""
        log_ends(key, transition)
        self._observer.on_lane_changed(key, transition)
        if transition.removed:
            self._agents.forget_session(key)

    def start_agent(self, key: SessionKey, run: LaneRun, request: RunRequest | None) -> None:
        """Starts the agent of a run that became active here."""
        self._start_attempt(key, run, request)

    def continue_agent(self, key: SessionKey, run: LaneRun) -> None:
        """Continues an attempt that another process began, once its worker has reconnected."""
        if self.has_agent(key, run):
            self._runners[key].supersede()
        if self._hosts(run) and not self.is_draining:
            self._start_attempt(key, run, None, is_resumed=True)
        else:
            self.lanes.slots.release(key)

    def can_continue(self, run: LaneRun) -> bool:
        """Whether a worker executes the attempt."""
        return self._agents.is_of_workers(run.agent)

    @property
    def has_workers(self) -> bool:
        """Whether workers execute an agent of this node."""
        return self._agents.workers is not None

    async def adopt(self, lost: HostedRun, fence: str | None = None) -> bool:
        """Moves an attempt of a worker to this node, or continues it here, or where it is now if
        it was lost with another node.

        Returns False if no worker executes the active run, if it is another attempt, or if `fence`
        is not its token.
        """

        def command(lane: Lane, _: Micros) -> Transition[LaneRun | None]:
            active = lane.active
            # No worker is at work for a run that waits for input, or has left while it did. An
            # agent that asked in its own process was one that workers did not execute then.
            waits = active is not None and active.state is RunState.INPUT_REQUIRED
            if active is None or waits or active.asking.parked or not self.can_continue(active):
                return Transition(lane, reply=None)
            token = fence_of(self._store, lost.session, active)
            if fence is not None and not compare_digest(token.encode(), fence.encode()):
                return Transition(lane, reply=None)
            host = self.lanes.node_id
            return rules.adopt(lane, lost.run_id, lost.attempt, host=host, lost_with=lost.host)

        try:
            run = await self.lanes.post(lost.session, command)
        except IllegalCommand:
            return False
        if run is not None and run.host == self.lanes.node_id:
            self._restart_if_outdated(lost.session, run)
        return run is not None

    def _restart_if_outdated(self, key: SessionKey, run: LaneRun) -> None:
        """Continues an attempt once more if another node has stored events of it meanwhile.

        That node may have been declared dead while it was still at work. Its events are those that
        the worker would send here: it numbers them.
        """
        is_here = self.membership is not None and self.has_agent(key, run)
        if is_here and self._runners[key].events != run.events:
            self.continue_agent(key, run)
            if run.state is RunState.CANCELLING:
                self.stop_agent(key, run)

    def _start_attempt(
        self,
        key: SessionKey,
        run: LaneRun,
        request: RunRequest | None,
        *,
        is_resumed: bool = False,
    ) -> None:
        run_key = RunKey(key.tenant, run.run_id)
        trace = self._observer.agent_traceparent(run_key, run)
        job = Job(key, run, request, trace, is_resumed)
        try:
            runner = self._make_runner(job)
        except Exception:
            # Its start is committed, so it must have an end (R21).
            log.exception("run could not be started", run_id=run.run_id)
            self._keep(create_own_task(self._lane_access.end_without_output(job, None)))
            return
        self._runners[key] = runner
        self._observer.on_attempt_started(run_key, run)
        self._supervise(runner, runner.start())
        if not self._hosts(run):
            # The commit was confirmed after this node had handed over its runs, or rejoined under
            # another id.
            runner.hand_over()

    def _make_runner(self, job: Job) -> Runner:
        return Runner(
            job,
            agent=self._agents.agent_of(job.run.agent),
            store=self._store,
            lane=self._lane_access,
            now=self._now,
            limits=self._limits,
            gates=self._gates,
            pulse=self._pulse,
        )

    def _keep(self, supervisor: asyncio.Task[None]) -> None:
        """Keeps a supervisor until it is done; the node does not stop before."""
        self._supervisors.add(supervisor)
        supervisor.add_done_callback(self._supervisors.discard)

    def _supervise(self, runner: Runner, supervisor: asyncio.Task[None]) -> None:
        self._keep(supervisor)
        supervisor.add_done_callback(lambda task: self._on_ended(runner, task))

    def _hosts(self, run: LaneRun) -> bool:
        """Whether a run belongs to this node under its current id."""
        node = self.membership
        return node is None or (node.alive and node.node_id == run.host)

    def stop_agent(self, key: SessionKey, run: LaneRun) -> bool:
        """Stops the agent of a run that a cancel covers; returns whether it is at work here."""
        if self._was_left(key, run):
            self._recover_parked(key, run)
            return False
        if not self.has_agent(key, run):
            self.wake_other_nodes()
            return False
        self._runners[key].cancel(run.cancel_reason)
        return True

    def _was_left(self, key: SessionKey, run: LaneRun) -> bool:
        """Whether the agent of a run has left, and no supervisor here will end the run. One that is
        settled has looked for a cancel for the last time."""
        is_here = self.has_agent(key, run) and not self._runners[key].is_settled
        return run.asking.parked and not is_here

    def follow_run(self, key: SessionKey, run: LaneRun) -> None:
        """Passes the state of a run to its supervisor: it waits for input, or goes on after it."""
        if self.has_agent(key, run):
            self._runners[key].follow(run)

    def end_expired(self, key: SessionKey, run: LaneRun) -> None:
        """Ends a run that nobody answered in time."""
        if self._was_left(key, run):
            self._recover_parked(key, run)
        elif self.has_agent(key, run):
            self._runners[key].expire()
        else:
            self.wake_other_nodes()

    def _recover_parked(self, key: SessionKey, run: LaneRun) -> None:
        """Ends a run whose agent has left, with the output that its events show."""
        if key in self._ending:
            return
        self._ending.add(key)
        task = create_own_task(self._recovery.recover(HostedRun(key, run.run_id, run.attempt)))
        task.add_done_callback(lambda _: self._ending.discard(key))
        self._keep(task)

    def has_agent(self, key: SessionKey, run: LaneRun) -> bool:
        """Whether the agent of that attempt is at work here."""
        runner = self._runners.get(key)
        return runner is not None and runner.job.attempt == (run.run_id, run.attempt)

    def abandon_agent(self, key: SessionKey, run: LaneRun) -> None:
        """Stops the agent of a run whose lane can no longer be read."""
        if self.has_agent(key, run):
            self._runners[key].abandon()

    def wake_other_nodes(self) -> None:
        """Wakes the other nodes, if there are any: one of them may be able to act."""
        if self.membership is not None:
            self.membership.wake_others()

    # --- The active runs ----------------------------------------------------------------------

    def cancel(self, run: HostedRun) -> None:
        """Stops the agent of an attempt, if it is at work here, for a committed cancel."""
        runner = self._runners.get(run.session)
        if runner is not None and runner.job.attempt == (run.run_id, run.attempt):
            runner.cancel("")

    def give_up_all(self, why: str) -> None:
        """Stops all agents, because other nodes continue their runs."""
        for runner in list(self._runners.values()):
            runner.give_up(why)

    @property
    def is_supervising(self) -> bool:
        """Whether an agent is at work here, or the end of its run is not committed yet."""
        return bool(self._supervisors)

    def hand_over_all(self, why: str) -> None:
        """Stops all agents; their runs are handed over unless they have ended already."""
        for runner in list(self._runners.values()):
            runner.hand_over(why)

    def _on_left(self, job: Job) -> None:
        """An attempt was left to its worker. Another node has it, or it is still this node's."""
        if self.is_draining:
            return
        node = self.membership
        if node is None or (node.holds_runs and node.node_id == job.run.host):
            self.lanes.reload(job.key)
        else:
            # Other nodes take this one for dead, and so recover the run.
            self.lanes.leave(job.key)

    def _on_ended(self, runner: Runner, supervisor: asyncio.Task[None]) -> None:
        if not runner.is_settled and self._store.failed is None:
            failure = None if supervisor.cancelled() else supervisor.exception()
            log.error("supervisor failed", exc_info=failure, run_id=runner.job.run.run_id)
            self._supervise(runner, runner.start_last_resort())
            return
        self._observer.on_attempt_ended(runner.job.run_key)
        if self.membership is not None:
            # Its slot may be free now.
            self.membership.poll_soon()
        # The lane may have started its next run before the supervisor of this one returned.
        if self._runners.get(runner.job.key) is runner:
            del self._runners[runner.job.key]
            if runner.is_abandoned:
                self.lanes.drop(runner.job.key)
        if runner.was_left and runner.job.key not in self._runners:
            self._on_left(runner.job)
        if runner.strays:
            self._observer.on_fenced_off(runner.job.run_key)
        for stray in runner.strays:
            self._strays.add(stray)
            stray.add_done_callback(self._strays.discard)
