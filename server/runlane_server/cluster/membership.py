"""This node among the others that share its store.

A node is alive as long as it says so in time. It says so several times within its lease, by the
database's clock; one that does not is taken for lost by the others, who see to its active runs. It
notices by its own clock, and before the others do, so that it starts nothing any more and stops its
agents. Whatever it still tries to write about a run that was taken away is refused: the version of
the lane and the attempt decide that, and no clock.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

import structlog

from runlane_server.core.errors import RunlaneError, StoreUnavailable
from runlane_server.core.model import SessionKey
from runlane_server.harness.clock import unmoved_time
from runlane_server.store.base import ClaimOrder, Cluster, HostedRun

log = structlog.get_logger()

BEATS = 4
"""How often within its lease a node says that it is alive."""

RETRIES = 20
"""The same while it could not: the store may be back for a moment."""

SAFE = 0.8
"""The share of its lease after which a node that could not say so takes itself for lost."""

POLL_SECONDS = 1.0
"""After how long, on average, it looks for what no wake-up told of."""

PAUSE_SECONDS = 0.025
"""Between two looks, however often it is woken."""

CLAIM = 64
"""How many lanes a node claims at a time."""

HOLD_SECONDS = 2.0
"""For how long others leave alone what it claimed; it starts them at once, or cannot."""

LOST_RUNS = 100
"""How many runs of lost nodes it sees to at a time."""


class Work(Protocol):
    """What there is to do on this node, as far as others have a part in it."""

    @property
    def free_slots(self) -> int:
        """How many more lanes could have an active run here."""

    @property
    def claim_order(self) -> ClaimOrder:
        """Whose turn it is here, of the tenants."""

    def line_up(self, key: SessionKey) -> None:
        """A lane waits for a node, and this one is to serve it."""

    async def recover(self, lost: HostedRun) -> None:
        """The node of an attempt is gone."""

    def cancelled_elsewhere(self, run: HostedRun) -> None:
        """Another node committed a cancel of a run that is active here."""

    def give_up(self) -> None:
        """What is active here is another node's by now, or soon will be."""

    def count_waiting(self, runs: Mapping[str, int]) -> None:
        """So many runs of each tenant wait in the whole store."""


class Membership:
    """Keeps this node alive, and does its part for all. One per node of a shared store."""

    def __init__(
        self,
        cluster: Cluster,
        work: Work,
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
        self._beaten = float("-inf")
        self._heard = True
        self._cut_off = False
        self._doom: asyncio.TimerHandle | None = None
        self._due = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, address: str) -> None:
        """Joins the others, who reach this node at that address. Raises StoreUnavailable."""
        self._address = address
        await self._join()
        self._cluster.on_wake = self.look
        self._tasks = [
            asyncio.create_task(self._repeat(self._beat, self._until_beat)),
            asyncio.create_task(self._repeat(self._look, self._until_look)),
        ]

    async def stop(self) -> None:
        """Leaves; to be called when nothing is active here any more."""
        self._cluster.on_wake = None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._doom is not None:
            self._doom.cancel()
        try:
            await self._cluster.leave(self.node_id)
        except StoreUnavailable as error:
            log.warning("the node could not say that it leaves", error=error.message)

    @property
    def alive(self) -> bool:
        """Whether the others are sure to take this node for alive, so that it may start runs."""
        return unmoved_time() - self._beaten < self.lease * SAFE

    @property
    def beat_age(self) -> float:
        """Seconds since the others heard of this node; infinite if it takes itself for lost."""
        return unmoved_time() - self._beaten

    def look(self) -> None:
        """There may be something to do that is not known here yet."""
        self._due.set()

    def wake_others(self) -> None:
        """There is something to do that this node cannot do."""
        self._cluster.wake()

    # Being alive

    async def _join(self) -> None:
        began = unmoved_time()
        node_id = self._new_id()
        await self._cluster.join(node_id, self._address)
        self.node_id = node_id
        self._is_alive(began)
        log.info("joined", node_id=node_id, node_address=self._address, lease_s=self.lease)

    async def _until_beat(self) -> None:
        await asyncio.sleep(_about(self.lease / (BEATS if self._heard else RETRIES)))

    async def _beat(self) -> None:
        # From before the question: the lease may run from any instant until its answer.
        began = unmoved_time()
        self._heard = False
        try:
            async with asyncio.timeout(self.lease / BEATS):
                known = await self._cluster.heartbeat(self.node_id, self.lease)
        except (TimeoutError, StoreUnavailable):
            return
        self._heard = True
        if known:
            self._is_alive(began)
        else:
            self._give_up("the node was taken for lost")
            await self._join()
        await self._see_to_others()

    def _is_alive(self, since: float) -> None:
        """The lease runs from then on. No answer to a question is waited for when it ends."""
        self._beaten, self._cut_off = since, False
        if self._doom is not None:
            self._doom.cancel()
        self._await_doom()

    def _await_doom(self) -> None:
        loop = asyncio.get_running_loop()
        left = self._beaten + self.lease * SAFE - unmoved_time()
        self._doom = loop.call_later(left, self._doomed)

    def _doomed(self) -> None:
        # A harness that moves the loop's clock does not move the database's.
        if self.alive:
            self._await_doom()
        else:
            self._give_up("the node is cut off from its store")

    def _give_up(self, why: str) -> None:
        # Nothing is to be started under the name that is lost.
        self._beaten = float("-inf")
        if not self._cut_off:
            log.warning(why, node_id=self.node_id)
            self._cut_off = True
            self._work.give_up()

    async def _see_to_others(self) -> None:
        for lost in await self._cluster.lost_runs(LOST_RUNS):
            log.warning("the node of a run is gone", run_id=lost.run_id, attempt=lost.attempt)
            await self._work.recover(lost)
        self._work.count_waiting(await self._cluster.waiting_runs())

    # Looking for work

    async def _until_look(self) -> None:
        await asyncio.sleep(_about(PAUSE_SECONDS))
        try:
            async with asyncio.timeout(_about(POLL_SECONDS)):
                await self._due.wait()
        except TimeoutError:
            pass

    async def _look(self) -> None:
        self._due.clear()
        for run in await self._cluster.cancelled_runs(self.node_id):
            self._work.cancelled_elsewhere(run)
        free = min(self._work.free_slots, CLAIM)
        if free <= 0 or not self.alive:
            return
        order = self._work.claim_order
        claimed = await self._cluster.claim(self.node_id, free, HOLD_SECONDS, order)
        for key in claimed:
            self._work.line_up(key)
        if claimed:
            # A tenant may have more than its share was, and others less.
            self._due.set()

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
                log.debug("the store is away", error=error.message)
            except Exception:
                log.exception("the node could not do its part")


def _about(seconds: float) -> float:
    """Not all nodes at the same instant."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - nothing secret
