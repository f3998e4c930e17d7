"""A node of a simulated world: the real coordinator and feed on a simulated store."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from random import Random
from typing import Any

from proofs.sim.agent import GRACE, LEASE, OTHER, WORKED, SimAgent
from proofs.sim.group import NODE_LEASE, Group
from proofs.sim.history import History
from proofs.sim.loop import NODE, SimLoop, SimTask
from proofs.sim.store import Disk, Meddle, SimStore
from runlane_server.access.caller import DEFAULT_TENANT as TENANT
from runlane_server.agents.worker.agent import WorkerAgent
from runlane_server.agents.worker.workers import Workers
from runlane_server.core.agents import DEFAULT_AGENT
from runlane_server.core.limits import Limits
from runlane_server.core.model import SessionKey
from runlane_server.engine.agent_table import AgentTable, DeclaredAgent
from runlane_server.engine.coordinator import Coordinator
from runlane_server.engine.executor import NodeSettings
from runlane_server.feed.feed import Feed

EPOCH = 1_700_000_000_000_000

SKEW = 2.0
"""Seconds by which the time of day of a node that shares its store is wrong at most."""

STOP_SECONDS = GRACE + 3.0
"""Maximum duration of a stop: the grace periods of a cancel and of strays, and the last writes."""

LAST_READ_SECONDS = 0.1
"""Seconds after which a read that was in progress during the stop has ended."""


class Node:
    """One process. `crash` kills it, `stop` ends it gracefully."""

    def __init__(  # noqa: PLR0917 - what it is made of
        self,
        number: int,
        loop: SimLoop,
        disk: Disk,
        rng: Random,
        history: History,
        meddle: Meddle,
        group: Group | None = None,
    ) -> None:
        self.number = number
        self.name = f"node {number}"
        self.store = SimStore(disk, rng, history, meddle, group)
        self.agents = [
            SimAgent(number, rng, history, DEFAULT_AGENT, None, self._host_of),
            SimAgent(number, rng, history, OTHER, rng.choice([None, 1, 2]), self._host_of),
        ]
        self.feed = Feed(self.store)
        self._loop = loop
        self.history = self._history = history
        self._disk = disk
        self._handlers: dict[SimTask, None] = {}
        self._paused_at = 0
        ids = itertools.count(1)
        self.workers = Workers(LEASE)
        declared = [DeclaredAgent(it.name, it, slots=it.slots) for it in self.agents]
        worked = DeclaredAgent(WORKED, WorkerAgent(self.workers))
        self.coordinator = Coordinator(
            self.store,
            AgentTable([*declared, worked]),
            self.feed,
            Limits(
                max_active_runs=rng.choice([1, 1, 2, 8]),
                max_waiting_runs=rng.choice([2, 4, 64]),
                cancel_grace=GRACE,
                ready_timeout=5.0,
            ),
            node=NodeSettings(NODE_LEASE, new_id=lambda: f"node {number}, {next(ids)}"),
            now=lambda: EPOCH + int((loop.time() + self._skew) * 1e6),
            new_id=lambda: f"n{number}.{next(ids)}",
        )
        self._skew = 0.0 if group is None else rng.uniform(-SKEW, SKEW)

    async def start(self) -> None:
        """Opens the store and restores the work in it."""
        self._history.note(self.name, "starts")
        await self.outside(self._start())

    async def _start(self) -> None:
        await self.store.__aenter__()
        await self.coordinator.start(self.name)

    def _host_of(self, session_id: str) -> str:
        """The id under which this node has the active run of a session."""
        runner = self.coordinator._executor._runners.get(SessionKey(TENANT, session_id))
        return "" if runner is None else runner.job.run.host

    @property
    def _own_ids(self) -> str:
        """The prefix of the ids under which this node joins the others."""
        return f"node {self.number}, "

    def handle(self, work: Coroutine[Any, Any, Any]) -> SimTask:
        """Runs a call of a client; its task belongs to the node and dies with it."""
        task = self._task(work)
        self._handlers[task] = None
        task.add_done_callback(lambda done: self._handlers.pop(task, None))
        return task

    async def outside(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs work of the node itself, and waits for it."""
        task = self._task(work)
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    def _task(self, work: Coroutine[Any, Any, Any]) -> SimTask:
        context: Context = copy_context()
        context.run(NODE.set, self.number)
        task = self._loop.create_task(work, context=context)
        assert isinstance(task, SimTask)
        return task

    def cut_off(self) -> None:
        """The store answers this node no more."""
        self._paused_at = self._history.note(self.name, "is cut off")
        self.store.on_silence()
        self.store.is_cut_off = True

    def connect(self) -> None:
        """The store answers again."""
        self.store.is_cut_off = False
        self._history.pauses.append((self._paused_at, self._history.note(self.name, "is back")))

    def pause(self) -> None:
        """Stops the process, which loses nothing."""
        self._paused_at = self._history.note(self.name, "pauses")
        self._history.paused_nodes.add(self.number)
        self.store.on_silence()
        self._loop.pause(self.number)

    def resume(self) -> None:
        """Continues the process."""
        continued_at = self._history.note(self.name, "continues")
        self._history.pauses.append((self._paused_at, continued_at))
        self._loop.resume(self.number)

    async def crash(self) -> None:
        """Kills the process at this instant."""
        self._history.downs.append(self._history.note(self.name, "crashes"))
        self._history.crashes += 1
        self.store.crash()
        self._loop.dead.add(self.number)
        await self._bury()

    async def _bury(self) -> None:
        for agent in self.agents:
            agent.dead = True
        for execution in self._history.executions:
            execution.has_ended = execution.has_ended or execution.node == self.number
        while tasks := self._loop.tasks_of(self.number):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def stop(self, patience: float, retire: Callable[[], None]) -> None:
        """Stops as the server does, and leaves nothing behind. `retire` stops new calls."""
        history = self._history
        history.downs.append(history.note(self.name, "stops"))
        history.stops += 1
        self.coordinator.begin_drain()
        if patience:
            await self.outside(self._wait_idle(patience))
        self.feed.close()
        retire()
        await self.send_away(0.1 if patience else 0)
        began = history.now
        await self.outside(self.coordinator.stop())
        history.require(history.now - began <= STOP_SECONDS, "a stop takes too long")
        await self.outside(self.store.__aexit__(None, None, None))
        # A run of a worker that was cancelled during the stop ends after the next start.
        history.downs.append(history.note(self.name, "has stopped"))
        # The message of a worker may still be at work; it meets a store that is closed.
        await asyncio.sleep(LAST_READ_SECONDS)
        self._check_gone()
        await self._bury()

    async def _wait_idle(self, patience: float) -> None:
        idle = await self.coordinator.wait_idle(patience)
        self._history.require(not (idle and self._own_active()), "an idle node has an active run")

    async def send_away(self, patience: float) -> None:
        """Waits for the handlers to end because the node drains, then cancels the rest."""
        while handlers := list(self._handlers):
            done = False
            if patience:
                done = bool((await asyncio.wait(handlers, timeout=patience))[0])
            for handler in handlers if not done else ():
                handler.cancel()
            await asyncio.sleep(0)

    def _check_gone(self) -> None:
        """Checks that a stopped node has no active run and no task except stray agents."""
        history = self._history
        strays = [v for v in history.executions if v.node == self.number and not v.has_ended]
        history.require(
            all(v.cancelled_at is not None for v in strays), "an agent continues after the stop"
        )
        left = self._loop.tasks_of(self.number)
        history.require(len(left) <= len(strays), f"tasks are left after the stop: {left}")
        history.require(not self._own_active(), "R17: a run is left active by a stop")

    def _own_active(self) -> list[str]:
        """The active runs that do not outlive this node, as those of workers do."""
        active = (lane.active for lane in self._disk.lanes() if lane.active is not None)
        is_shared = self.coordinator.membership is not None
        return [
            run.run_id
            for run in active
            if run.agent != WORKED and (not is_shared or run.host.startswith(self._own_ids))
        ]

    def check_idle(self) -> None:
        """Checks that an idle node holds no resources."""
        require = self._history.require
        lanes = self.coordinator._lanes
        # Its run may have been executed elsewhere; this node looks at it when it has a slot.
        queued = set(lanes.slots.queue) if self.coordinator.membership is not None else set()
        require(not set(lanes.keys) - queued, f"an idle node is busy with {lanes.keys}")
        require(not set(lanes._mailboxes) - queued, "a mailbox is left")
        require(lanes.slots.in_use == 0, "a slot is left taken")
        require(not set(lanes.slots.queue) - queued, "a lane still waits for a slot")
        free, total = lanes.slots._free, self.coordinator.limits.max_active_runs
        require(free == total, f"{free} of {total} slots are free")
        used = [agent.name for agent in self.coordinator.agents if agent.slots_in_use]
        require(not used, f"slots of the agents {used} are left taken")
        offered = [it.slots_limit for it in self.coordinator.agents if it.name == WORKED]
        require(offered == [0], f"without workers their agent has {offered} slots")
        require(self.feed.subscriptions == 0, "a subscriber is left")
        require(not self.feed._run_tails, "the tail of a run is left")
        tasks = self._loop.tasks_of(self.number)
        getting_ready = sum(not agent.is_ready for agent in self.coordinator.agents)
        own = self.store.own_tasks
        if self.coordinator.membership is not None:
            own += len(self.coordinator.membership._tasks)
        require(len(tasks) == own + getting_ready, f"tasks are left beside these: {tasks}")
