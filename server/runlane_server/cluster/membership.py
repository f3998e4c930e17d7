"""The membership of this node in the group of nodes that share its store.

A node sends several heartbeats within its lease. Without them, the other nodes declare it dead by
the clock of the database, and recover its active runs. The node notices by its own clock, before
the others do; it then starts no run, stops its agents, and joins again under another id when the
store answers. Its later writes about a recovered run are refused by the version of the lane and the
attempt, never by a clock.

If the store refuses connections it is down for all nodes, and after its start no node is declared
dead for a lease: the agents continue, and the node renews its lease when the store is back. A store
that does not answer may still answer others, so the agents stop.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

import structlog

from runlane_server.cluster.failover import Failover
from runlane_server.core.errors import RunlaneError, StoreDown, StoreUnavailable
from runlane_server.core.model import SessionKey
from runlane_server.harness.clock import real_loop_time
from runlane_server.store.base import ClaimOrder, Cluster, HostedRun

log = structlog.get_logger()

HEARTBEATS = 4
"""Heartbeats per lease."""

HEARTBEAT_RETRIES = 20
"""Heartbeats per lease after a failed one, since the store may be back only briefly."""

LONGEST_PACE = 20.0
"""Heartbeats of longer leases are as frequent as with one of these seconds: a silent node is soon
known to do no work, whenever it is declared dead."""

SAFE_FRACTION = 0.8
"""Fraction of the lease without a heartbeat after which a node declares itself dead."""

POLL_SECONDS = 1.0
"""Average seconds between polls for work that no wake-up announced."""

PAUSE_SECONDS = 0.025
"""Minimum pause between two polls."""

CLAIM_LANES = 64
"""Maximum number of lanes per claim."""

HOLD_SECONDS = 2.0
"""How long a claim excludes other nodes. A node starts claimed lanes at once or not at all."""

ANSWERED_RUNS = 200
"""Maximum number of answered runs that a node takes a look at in one poll."""


STORE_AWAY = "the database did not answer the node that ran it for longer than the node's lease"
DECLARED_DEAD = "the node that ran it was silent for longer than its lease"
"""Why runs end as interrupted."""


class LocalRuns(Protocol):
    """The runs on this node, as far as other nodes affect them."""

    @property
    def free_slots(self) -> int:
        """The number of free slots for active runs."""

    @property
    def claim_order(self) -> ClaimOrder:
        """The order in which tenants get free slots."""

    def line_up(self, key: SessionKey) -> None:
        """Queues a claimed lane for a slot of this node."""

    async def recover_all(self, lost: Sequence[HostedRun]) -> None:
        """Recovers runs whose node is dead."""

    def cancelled_elsewhere(self, run: HostedRun) -> None:
        """Applies a cancel, committed by another node, to a run that is active here."""

    def answered_elsewhere(self, key: SessionKey) -> None:
        """Goes on with a run that has waited for input and needs none any more."""

    def give_up(self, why: str) -> None:
        """Stops all active runs, because other nodes recover them. `why`: for the callers of runs
        that end with it."""

    @property
    def is_stopping(self) -> bool:
        """Whether agents of runs that were given up are still at work."""

    def count_waiting(self, runs: Mapping[str, int]) -> None:
        """Takes the number of waiting runs per tenant in the whole store."""


class Membership:
    """Sends heartbeats, recovers runs of dead nodes, and claims lanes. One per node."""

    def __init__(
        self,
        cluster: Cluster,
        work: LocalRuns,
        *,
        lease: float,
        new_id: Callable[[], str],
    ) -> None:
        self.node_id = ""
        self._cluster = cluster
        self._work = work
        self._address = ""
        self.lease = lease
        self._new_id = new_id
        self._last_heartbeat = float("-inf")
        self._is_connected = True
        self._is_cut_off = False
        self._last_refusal = float("-inf")
        self._lease_timer: asyncio.TimerHandle | None = None
        self._due = asyncio.Event()
        self._failover = Failover(cluster, work.recover_all)
        self._is_failover_due = asyncio.Event()
        self._answered_after = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, address: str) -> None:
        """Joins the group. Other nodes reach this one at `address`. Raises StoreUnavailable."""
        self._address = address
        await self._join()
        self._cluster.on_wake = self.poll_soon
        self._tasks = [
            asyncio.create_task(self._repeat(self._heartbeat, self._until_heartbeat)),
            asyncio.create_task(self._repeat(self._poll, self._until_poll)),
            asyncio.create_task(self._repeat(self._recover_lost_runs, self._until_failover)),
        ]

    async def stop(self) -> None:
        """Leaves the group. No run may be active here any more."""
        self._cluster.on_wake = None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._lease_timer is not None:
            self._lease_timer.cancel()
        try:
            await self._cluster.leave(self.node_id)
        except StoreUnavailable as error:
            log.warning("node left without notice", error=error.message)

    @property
    def alive(self) -> bool:
        """Whether other nodes certainly consider this one alive, so that it may start runs."""
        return real_loop_time() - self._last_heartbeat < self.lease * SAFE_FRACTION

    @property
    def holds_runs(self) -> bool:
        """Whether the runs of this node may still be its own, alive or not."""
        return not self._is_cut_off

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the last heartbeat; infinite if this node considers itself dead."""
        return real_loop_time() - self._last_heartbeat

    def poll_soon(self) -> None:
        """Polls soon, because there may be new work."""
        self._due.set()

    def wake_others(self) -> None:
        """Announces work that this node cannot do."""
        self._cluster.wake()

    # Heartbeats

    async def _join(self) -> None:
        began = real_loop_time()
        node_id = self._new_id()
        await self._cluster.join(node_id, self._address)
        self.node_id = node_id
        self._renew_lease(began)
        log.info("node joined", node_id=node_id, node_address=self._address, lease_s=self.lease)

    async def _until_heartbeat(self) -> None:
        is_soon = self._is_cut_off or not self._is_connected
        await asyncio.sleep(_jittered(heartbeat_pause(self.lease, failed=is_soon)))

    async def _heartbeat(self) -> None:
        # The time before the request: the lease starts at some instant before the answer.
        began = real_loop_time()
        self._is_connected = False
        try:
            async with asyncio.timeout(self.lease / HEARTBEATS):
                known = await self._cluster.heartbeat(self.node_id, self.lease)
        except (TimeoutError, StoreUnavailable) as error:
            if isinstance(error, StoreDown):
                self._last_refusal = began
            return
        self._is_connected = True
        if known and not self._is_cut_off:
            self._renew_lease(began)
        elif not (known and self._work.is_stopping):
            await self._rejoin()
        self._is_failover_due.set()
        self._work.count_waiting(await self._cluster.waiting_runs())

    async def _rejoin(self) -> None:
        """Joins under a new id. The runs of the old one, which this node has given up, are lost for
        all nodes from now on, even if no other node has noticed.

        A node that is back before others declared it dead does so once its agents have returned or
        are fenced off: until then nobody else may start their runs (R9).
        """
        self._abandon("node declared dead by others", DECLARED_DEAD)
        await self._cluster.leave(self.node_id)
        await self._join()

    def _renew_lease(self, since: float) -> None:
        """Starts the lease at a time, and the timer that ends it independently of any request."""
        self._last_heartbeat, self._is_cut_off = since, False
        if self._lease_timer is not None:
            self._lease_timer.cancel()
        self._start_lease_timer()

    @property
    def _seconds_left(self) -> float:
        """Seconds for which no other node can recover the runs of this one."""
        since = max(self._last_heartbeat, self._last_refusal)
        return since + self.lease * SAFE_FRACTION - real_loop_time()

    def _start_lease_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._lease_timer = loop.call_later(self._seconds_left, self._on_lease_end)

    def _on_lease_end(self) -> None:
        # A harness may have moved the clock of the loop, but not that of the database.
        if self._seconds_left > 0:
            self._start_lease_timer()
        else:
            self._abandon("node cut off from its store", STORE_AWAY)

    def _abandon(self, event: str, why: str) -> None:
        # Nothing may start under a node id that is dead.
        self._last_heartbeat = float("-inf")
        if not self._is_cut_off:
            log.warning(event, node_id=self.node_id)
            self._is_cut_off = True
            self._work.give_up(why)

    # Runs of dead nodes

    async def _until_failover(self) -> None:
        await self._is_failover_due.wait()
        self._is_failover_due.clear()

    async def _recover_lost_runs(self) -> None:
        """Beside the heartbeats, which must not wait for it."""
        await self._failover.recover_all(self.node_id)

    # Work

    async def _until_poll(self) -> None:
        await asyncio.sleep(_jittered(PAUSE_SECONDS))
        try:
            async with asyncio.timeout(_jittered(POLL_SECONDS)):
                await self._due.wait()
        except TimeoutError:
            pass

    async def _poll(self) -> None:
        self._due.clear()
        for run in await self._cluster.cancelled_runs(self.node_id):
            self._work.cancelled_elsewhere(run)
        if self.alive:
            await self._look_at_answered_runs()
        free = min(self._work.free_slots, CLAIM_LANES)
        if free <= 0 or not self.alive:
            return
        order = self._work.claim_order
        claimed = await self._cluster.claim(self.node_id, free, HOLD_SECONDS, order)
        for key in claimed:
            self._work.line_up(key)
        if claimed:
            # The shares of tenants have changed.
            self._due.set()

    async def _look_at_answered_runs(self) -> None:
        """Looks at the next of them, and after the last one at the first again: those that cannot
        go on here, for example for want of a slot, must not hide the others."""
        after, limit = self._answered_after, ANSWERED_RUNS
        answered = await self._cluster.answered_runs(self.node_id, after, limit)
        self._answered_after = answered[-1].place if len(answered) == limit else 0
        for run in answered:
            self._work.answered_elsewhere(run.session)

    async def _repeat(
        self,
        do: Callable[[], Coroutine[Any, Any, None]],
        wait: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        while True:
            await wait()
            try:
                await do()
            except RunlaneError as error:
                log.debug("store unavailable", error=error.message)
            except Exception:
                log.exception("cluster task failed")


def heartbeat_pause(lease: float, *, failed: bool) -> float:
    """Seconds until the next heartbeat, without jitter."""
    return min(lease, LONGEST_PACE) / (HEARTBEAT_RETRIES if failed else HEARTBEATS)


def _jittered(seconds: float) -> float:
    """Adds jitter, so that nodes do not act at the same instant."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - nothing secret
