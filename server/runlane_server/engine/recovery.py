"""Takes over the work that earlier or other nodes left in the store."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import structlog

from runlane_server.access.quotas import QuotaBook
from runlane_server.core import lane as rules
from runlane_server.core.agents import ONE_AGENT, AgentNames
from runlane_server.core.errors import CorruptRecord, StoreUnavailable
from runlane_server.core.model import RunKey, RunState, SessionKey
from runlane_server.core.turn import DraftMessage
from runlane_server.engine.agent_room import UNLIMITED
from runlane_server.engine.batches import await_in_batches
from runlane_server.engine.lanes import Lanes
from runlane_server.engine.replay import Replays
from runlane_server.engine.slots import Slots
from runlane_server.store.base import (
    AgentShare,
    BusySession,
    ClaimOrder,
    HostedRun,
    Store,
    TenantShare,
)

log = structlog.get_logger()

AT_ONCE = 64
"""Lost runs that a node recovers at a time. Their reads leave connections to other callers."""


class ActiveRuns(Protocol):
    """The runs that are active on this node."""

    @property
    def lanes(self) -> Lanes:
        """The lanes of this node."""

    @property
    def has_workers(self) -> bool:
        """Whether workers execute an agent of this node. Their runs outlive their node."""

    async def adopt(self, lost: HostedRun) -> bool:
        """Continues an attempt of a worker on this node; False if it is none."""

    def cancel(self, run: HostedRun) -> None:
        """Stops the agent of that attempt, if it is at work here, for a committed cancel."""

    @property
    def is_supervising(self) -> bool:
        """Whether an agent is at work here, or the end of its run is not committed yet."""

    def give_up_all(self, why: str) -> None:
        """Stops all agents without ending their runs, which other nodes continue if attempts are
        left. `why` is for the others."""


class Recovery:
    """Recovers runs of lost nodes, and does this node's share of the work of all nodes.

    It is the `cluster.membership.Work` of a node that shares its store. Each recovery stands
    alone: a run that cannot be recovered with its output is recovered without it, and a session
    that cannot be read is left to its operator. The others go on.
    """

    def __init__(
        self,
        store: Store,
        runs: ActiveRuns,
        quotas: QuotaBook,
        agents: AgentNames,
        replays: Replays,
    ) -> None:
        self._store = store
        self._runs = runs
        self._quotas = quotas
        self._agents = agents
        self._replays = replays

    # --- A store of its own -------------------------------------------------------------------

    async def restore(self) -> None:
        """Restores the work in a store that no other node uses: runs that are active in it were
        active on a process that is gone."""
        busy = await self._store.busy_sessions()
        for session in busy:
            self._runs.lanes.restore(session)
        # A run that asks has lost nothing, and an answer, a cancel or an expiry finds it.
        lost = [session.key for session in busy if session.active and not session.asks]
        await await_in_batches(self._recover_active(key) for key in lost)
        if busy:
            log.info("unfinished work restored", sessions=len(busy), active=len(lost))
        self._log_undeclared(busy)

    def _log_undeclared(self, busy: Iterable[BusySession]) -> None:
        """Logs the agents that runs wait for in vain: the settings no longer declare them."""
        waiting = Counter(
            session.agent for session in busy if session.agent and session.waiting_runs
        )
        for agent, sessions in waiting.items():
            if agent not in self._agents.names:
                log.warning("runs wait for an undeclared agent", agent=agent, sessions=sessions)

    async def _recover_active(self, key: SessionKey) -> None:
        try:
            lane = await self._store.load_lane(key)
            if lane.active is None:
                return
            if lane.active.state is RunState.INPUT_REQUIRED and lane.active.asking.parked:
                # It has lost nothing; it may have all its answers.
                self._runs.lanes.look_again(key)
            else:
                await self.recover(HostedRun(key, lane.active.run_id, lane.active.attempt))
        except Exception as error:
            if self._is_store_away(error):
                raise
            log.exception("session not recovered", session_id=key.session_id)

    def _is_store_away(self, error: Exception) -> bool:
        """Whether everything must be repeated later. A file that is open is never away: what cannot
        be read from it is a bad record."""
        is_possible = self._store.cluster is not None or self._store.failed is not None
        return is_possible and isinstance(error, StoreUnavailable)

    # --- A shared store -----------------------------------------------------------------------

    @property
    def free_slots(self) -> int:
        """The number of further lanes that could have an active run here."""
        return self._runs.lanes.slots.free

    @property
    def claim_order(self) -> ClaimOrder:
        """The order in which this node claims lanes."""
        return claim_order_of(self._runs.lanes.slots, self._quotas, self._agents)

    def line_up(self, key: SessionKey) -> None:
        """This node claimed a lane with a run to start."""
        self._runs.lanes.refresh(key)

    async def recover_all(self, lost: Sequence[HostedRun]) -> None:
        """Recovers runs of dead nodes, `AT_ONCE` at a time. Raises StoreUnavailable."""
        places = asyncio.Semaphore(AT_ONCE)

        async def recover(one: HostedRun) -> None:
            async with places:
                await self.recover(one)

        for result in await asyncio.gather(*map(recover, lost), return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def recover(self, lost: HostedRun) -> None:
        """Retries or ends a run whose node is gone, with the output that its events show.

        A run of a worker continues here, and is lost only if the worker does not return in time
        (R36).
        """
        if self._runs.has_workers and await self._runs.adopt(lost):
            return
        key = RunKey(lost.session.tenant, lost.run_id)
        try:
            async with self._replays.replay(key) as replay:
                if replay.is_cut:
                    log.warning("output cut to --max-run-output", run_id=lost.run_id)
                await self._post_lost(lost, replay.messages(), replay.events)
        except Exception as error:
            if self._is_store_away(error):
                raise
            log.exception("output of a lost run not recovered", run_id=lost.run_id)
            await self._recover_without_output(lost)

    async def _recover_without_output(self, lost: HostedRun) -> None:
        try:
            active = (await self._store.load_lane(lost.session)).active
            if active is not None and (active.run_id, active.attempt) == (
                lost.run_id,
                lost.attempt,
            ):
                await self._post_lost(lost, (), active.events)
        except CorruptRecord as error:
            # The others are recovered; this one ends when its session is deleted.
            log.warning("run not recovered", run_id=lost.run_id, error=error.message)
        except Exception as error:
            if self._is_store_away(error):
                raise
            log.exception("run not recovered", run_id=lost.run_id)

    async def _post_lost(
        self, lost: HostedRun, content: tuple[DraftMessage, ...], events: int
    ) -> None:
        await self._runs.lanes.post(
            lost.session,
            lambda lane, at: rules.node_lost(
                lane,
                lost.run_id,
                lost.attempt,
                at=at,
                content=content,
                events=events,
                lost_with=lost.host,
            ),
        )

    def answered_elsewhere(self, key: SessionKey) -> None:
        """Goes on with a run that got its answers on another node, or that waits for none."""
        self._runs.lanes.look_again(key)

    def cancelled_elsewhere(self, run: HostedRun) -> None:
        """Stops the agent of a run whose cancel another node committed."""
        self._runs.cancel(run)

    def give_up(self, why: str) -> None:
        """Stops all agents: their runs belong to other nodes now, or soon will."""
        self._runs.give_up_all(why)

    @property
    def is_stopping(self) -> bool:
        """Whether agents of runs that were given up are still at work."""
        return self._runs.is_supervising

    def count_waiting(self, runs: Mapping[str, int]) -> None:
        """Takes over the number of waiting runs of each tenant in the whole store."""
        self._runs.lanes.waiting.replace(runs)


def claim_order_of(slots: Slots, quotas: QuotaBook, agents: AgentNames = ONE_AGENT) -> ClaimOrder:
    """Tenants that have used no slot come first; then the others, the last one served last. Of the
    agents it has those that are ready here and have room (R32)."""
    served = slots.tenant_shares
    known = {share.tenant for share in served}
    fresh = tuple(
        TenantShare(name, _allowance(quotas.max_active(name)))
        for name in quotas.named
        if name not in known
    )
    shares = tuple(it for it in map(slots.agent_share, agents.names) if it.room > 0)
    unnamed = tuple(AgentShare("", it.room) for it in shares if it.agent == agents.default)
    others = _allowance(quotas.others.max_active_runs)
    return ClaimOrder((*fresh, *served), others, (*unnamed, *shares))


def _allowance(limit: int | None) -> int:
    return UNLIMITED if limit is None else limit
