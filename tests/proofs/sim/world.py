"""A simulated world: one disk, nodes that start and end on it, and their clients.

Several nodes may be live at once: they share the disk, and are paused for longer than their lease,
crash and stop while the others go on. Everything in it is drawn from its seed, so the same seed
gives the same world.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import structlog

from proofs.lanecheck.invariants import Broken
from proofs.sim.agent import OTHER, WORKED, agent_of
from proofs.sim.check import check
from proofs.sim.clients import TENANT, Client
from proofs.sim.deleter import Deleter
from proofs.sim.forker import Forker
from proofs.sim.group import NODE_LEASE, Group
from proofs.sim.history import OK, AcceptOp, CancelOp, History, Line
from proofs.sim.loop import SimLoop, SimTask, Stuck
from proofs.sim.node import EPOCH, Node
from proofs.sim.store import Disk, at_once
from proofs.sim.updater import Updater
from proofs.sim.worker import SimWorker
from runlane_server.cluster import membership
from runlane_server.core import lane as rules
from runlane_server.core.agents import DEFAULT_AGENT, AgentNames
from runlane_server.core.model import CancelScope, Prompt, RunKey, RunRequest, SessionKey, WhenBusy
from runlane_server.core.transition import Lane, Transition
from runlane_server.engine import agent_turn, batches, lane_cache, outbox, replay
from runlane_server.feed import feed

HORIZON = 1_500.0
"""Virtual seconds within which a world must end."""

MAX_STEPS = 60_000

QUIET = 5
"""Seconds without work after which the world is over."""

MEDDLING = 0.04
"""Probability that another node changes a lane just before a commit."""

PAUSES = (0.5, 3.0, 7.0, 12.0, 12.0)
"""Seconds that a node is paused, most of them longer than its lease."""

EXPECTED_ERRORS = {"agent failed", "agent is not ready"}
"""Errors that may be logged, because simulated agents fail."""

NARROW: Sequence[tuple[Any, str, float]] = (
    (feed, "LOG_TAIL_BYTES", 5 * 4096),
    (feed, "RUN_TAIL_BYTES", 5 * 512),
    (feed, "PAGE_EVENTS", 2),
    (outbox, "DELTA_CHARS", 12),
    (outbox, "OUTBOX_CHARS", 20),
    (replay, "EVENTS_PAGE", 3),
    (batches, "BATCH_SIZE", 2),
    (agent_turn, "HISTORY_PAGE", 3),
    (lane_cache, "CAPACITY", 1),
    (lane_cache, "LIKELY", 0.4),
    (lane_cache, "SMOOTHING", 2),
)
"""Limits low enough to be reached in a small world, and assumptions that are often wrong."""


@dataclass(slots=True)
class Outcome:
    """The outcome of a world: the broken rule, if any, and the digest of its trace."""

    seed: int
    digest: str
    trace: list[Line]
    failure: str | None = None
    live: int = 1
    counts: dict[str, int] = field(default_factory=dict)


class World:
    """One world, from the first node to the end of the last."""

    def __init__(self, seed: int, live: int = 1, *, cuts: bool = False) -> None:
        self.loop = SimLoop(seed, horizon=HORIZON, max_steps=MAX_STEPS * live)
        self.history = History(self.loop)
        self.over = False
        self.nodes: list[Node] = []
        self._live = live
        self._cuts = cuts
        self._rng = Random(f"world {seed}")  # noqa: S311
        # Of its own, so that the other clients do the same without updates.
        self._updates = Random(f"updates {seed}") if seed % 2 else None  # noqa: S311
        forks = live > 1 and seed % 3 == 0
        self._forks = Random(f"forks {seed}") if forks else None  # noqa: S311
        self._deletes = Random(f"deletes {seed}") if seed % 4 == 2 else None  # noqa: S311
        # Of its own, so that worlds of one node are the same without it.
        self._many = Random(f"nodes {seed}")  # noqa: S311
        self._disk = Disk(self.history)
        self._group = Group(self._disk, self._many, self.history) if live > 1 else None
        self._workers: list[SimWorker] = []
        self._pausing: dict[Node, SimTask] = {}
        self._up = asyncio.Event()
        self._nodes = 0
        self._meddling = MEDDLING if self._rng.random() < 0.6 and live == 1 else 0.0
        self._meddled = 0

    # The view of the clients

    async def node_up(self) -> Node:
        """Waits for a node that is up, or paused."""
        while not self.nodes:
            await self._up.wait()
        return self.nodes[0] if self._group is None else self._many.choice(self.nodes)

    def durable(self, run_id: str) -> bool:
        """Whether a run is on the disk, or was deleted."""
        data, key = self._disk.data, RunKey(TENANT, run_id)
        return bool(at_once(data.get_run(key)) or at_once(data.get_deleted_run(key)))

    def is_being_removed(self, session_id: str = "") -> bool:
        """Whether records of a deleted session are left; of any one, without an id."""
        removals = self._disk.data._tables.removals
        return SessionKey(TENANT, session_id) in removals if session_id else bool(removals)

    # The course of a world

    async def run(self) -> None:
        """From the beginning to the end, and the checks."""
        rng = self._rng
        for _ in range(self._live):
            await self._start_node()
        watchers = [Client(f"watcher {n}", self, self._fork()) for n in range(rng.randint(1, 2))]
        watching = [self._task(watcher.watch()) for watcher in watchers]
        workers = [SimWorker(f"worker {n}", self, self._fork()) for n in range(rng.randint(1, 3))]
        self._workers = workers
        serving = [self._task(worker.serve()) for worker in workers]
        clients = [Client(f"client {n}", self, self._fork()) for n in range(rng.randint(2, 4))]
        working = [self._task(client.work(rng.randint(2, 9))) for client in clients]
        if self._updates is not None:
            updater = Updater("updater", self, self._updates)
            serving.append(self._task(updater.work()))
        if self._forks is not None:
            serving.append(self._task(Forker("forker", self, self._forks).work()))
        if self._deletes is not None:
            deleter = Deleter("deleter", self, self._deletes)
            working.append(self._task(deleter.work()))
            serving.append(self._task(deleter.remove()))
        await (self._direct() if self._group is None else self._direct_many())
        await self._all(working)
        await self._settle()
        await self._take_leave([*watching, *serving])
        await self._end()
        check(self.history, at_once(self._disk.data.busy_sessions()), self._disk)

    async def _direct(self) -> None:
        """Crashes, stops and compactions."""
        rng = self._rng
        for _ in range(rng.choice([0, 0, 1, 2, 3, 4])):
            await asyncio.sleep(rng.choice([0.0, 0.02, 0.1, 0.5, 1.0, 3.0]) * rng.random())
            node, drawn = await self.node_up(), rng.random()
            if drawn < 0.15:
                before = EPOCH + int(self.loop.time() * 1e6)
                await node.outside(_compact(node, before, rng.randint(1, 3)))
                continue
            if drawn < 0.65:
                self._down(node)
                await node.crash()
            else:
                # It still answers while it stops.
                await node.stop(rng.choice([0.0, 0.05, 3.0]), lambda: self._down(self.nodes[0]))
            await asyncio.sleep(rng.choice([0.0, 0.01, 1.0]))
            await self._start_node()

    def _down(self, node: Node) -> None:
        self.nodes.remove(node)
        if not self.nodes:
            self._up.clear()

    async def _direct_many(self) -> None:
        """Crashes, stops, pauses and compactions of nodes while others are up."""
        rng = self._many
        for _ in range(rng.randint(1, 5)):
            await asyncio.sleep(rng.choice([0.02, 0.1, 0.5, 1.0, 3.0]) * rng.random())
            node, drawn = rng.choice(self.nodes), rng.random()
            if node in self._pausing:
                continue
            if drawn < 0.1:
                before = EPOCH + int(self.loop.time() * 1e6)
                await node.outside(_compact(node, before, rng.randint(1, 3)))
            elif drawn < 0.6:
                self._pausing[node] = self._task(self._pause(node, rng.choice(PAUSES)))
            else:
                await self._replace(node, crashes=drawn < 0.8)
        await self._all(list(self._pausing.values()))

    async def _pause(self, node: Node, seconds: float) -> None:
        if self._cuts and self._many.random() < 0.5:
            node.cut_off()
            await asyncio.sleep(seconds)
            node.connect()
            del self._pausing[node]
            return
        node.pause()
        for worker in self._workers:
            worker.on_paused(node, self._many.choice([0.01, 0.5, 2.0, 20.0]))
        await asyncio.sleep(seconds)
        node.resume()
        for worker in self._workers:
            worker.on_resumed(node)
        del self._pausing[node]

    async def _replace(self, node: Node, *, crashes: bool) -> None:
        """Ends a node, and starts another one."""
        if crashes:
            self._down(node)
            await node.crash()
        else:
            await node.stop(self._many.choice([0.0, 0.05, 3.0]), lambda: self._down(node))
        await asyncio.sleep(self._many.choice([0.0, 0.01, 1.0]))
        await self._start_node()

    async def _start_node(self) -> None:
        self._nodes += 1
        node = Node(
            self._nodes,
            self.loop,
            self._disk,
            self._fork(),
            self.history,
            self._meddle,
            self._group,
        )
        await node.start()
        self.nodes.append(node)
        self._up.set()

    async def _settle(self) -> None:
        """Waits until all runs have ended, and all agents have returned."""
        quiet = 0
        # Everything in progress arrives; no waiting client runs into its timeout.
        while quiet < QUIET:
            await asyncio.sleep(1)
            quiet = 0 if self._at_work() else quiet + 1
        self.history.note("world", "all runs have ended")

    def _at_work(self) -> bool:
        busy = at_once(self._disk.data.busy_sessions())
        return bool(busy) or any(not execution.has_ended for execution in self.history.executions)

    async def _take_leave(self, tasks: list[SimTask]) -> None:
        self.over = True
        for watch in self.history.watches:
            self.history.note(watch.name, f"leaves at {watch.cursor}")
        for node in list(self.nodes):
            await node.send_away(0.1)
        await self._all(tasks)

    async def _end(self) -> None:
        await asyncio.sleep(1 if self._group is None else NODE_LEASE)
        for node in list(self.nodes):
            node.check_idle()
            if not self._meddled:
                waiting = node.coordinator._lanes.waiting_runs
                self.history.require(waiting == 0, f"{waiting} runs are counted as waiting")
        for node in list(self.nodes):
            await node.stop(0, partial(self._down, node))

    async def _all(self, tasks: list[SimTask]) -> None:
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            task.result()

    def _task(self, work: Any) -> SimTask:
        task = self.loop.create_task(work)
        assert isinstance(task, SimTask)
        task.add_done_callback(self._look_at)
        return task

    def _look_at(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.loop.failure = Broken(f"a call failed: {error!r}")

    def _fork(self) -> Random:
        return Random(self._rng.random())  # noqa: S311

    # Another node

    def _meddle(self, key: SessionKey) -> None:
        """Accepts or cancels on the lane that is about to be written, as another node would."""
        if not self._meddling or self._rng.random() >= self._meddling:
            return
        lane = at_once(self._disk.data.load_lane(key))
        if not lane.exists:
            return
        self._meddled += 1
        if self._rng.random() < 0.5:
            self._accept_elsewhere(lane)
        else:
            self._cancel_elsewhere(lane)

    def _accept_elsewhere(self, lane: Lane) -> None:
        history, run_id = self.history, f"far.{self._meddled}"
        when_busy = self._rng.choice([WhenBusy.QUEUE, WhenBusy.FOLD])
        session_id = lane.key.session_id
        tick = history.note("elsewhere", f"accepts {run_id} in {session_id}")
        op = AcceptOp(run_id, session_id, "far", when_busy, 0, tick)
        history.accepts.append(op)
        reserved = rules.reserve(lane, "far", run_id).lane
        request = RunRequest(run_id, Prompt("far"), when_busy, agent=agent_of(run_id))
        made = rules.accept(
            reserved,
            request,
            at=self._now(),
            token="far",  # noqa: S106 - not a secret
            max_waiting=1000,
            agents=AgentNames.of((DEFAULT_AGENT, OTHER, WORKED)),
        )
        self._commit(lane, made)
        op.outcome, op.seq, op.returned = OK, made.reply.accept_seq, history.tick()
        op.position = self._disk.data.position

    def _cancel_elsewhere(self, lane: Lane) -> None:
        history, reason = self.history, f"cancel {len(self.history.cancels)}"
        made = rules.cancel(lane, CancelScope.WAITING, at=self._now(), reason=reason)
        if not made.needs_commit:
            return
        session_id = lane.key.session_id
        tick = history.note("elsewhere", f"cancels what waits in {session_id}: {reason}")
        op = CancelOp(reason, CancelScope.WAITING, session_id, "", 0, tick)
        history.cancels.append(op)
        self._commit(lane, made)
        op.receipts, op.returned, op.at = (made.reply,), history.tick(), history.now

    def _commit(self, lane: Lane, made: Transition) -> None:
        at_once(self._disk.data.commit(lane.version, made.at_version(lane.version + 1)))

    def _now(self) -> int:
        return EPOCH + int(self.loop.time() * 1e6)


async def _compact(node: Node, before: int, limit: int) -> None:
    await node.store.compact(before, limit)


def simulate(seed: int, live: int = 1, *, cuts: bool = False) -> Outcome:
    """Simulates a world with a number of live nodes, some of which are cut off from the store with
    `cuts`. The same seed gives the same world."""
    with narrow(), _uncollected(), _seeded(seed), ExitStack() as closing:
        world = World(seed, live, cuts=cuts)
        closing.callback(_tear_down, world)
        closing.enter_context(_logged(world.history))
        failure = None
        try:
            world.loop.run_until_complete(world.run())
            if world.loop.complaints:
                failure = f"the loop complains: {world.loop.complaints[0]}"
        except (Broken, Stuck) as error:
            failure = str(error)
        history = world.history
        return Outcome(seed, history.digest(), list(history.trace), failure, live, _counts(world))


def _counts(world: World) -> dict[str, int]:
    history = world.history
    return {
        "steps": world.loop.steps,
        "runs": sum(op.outcome == OK for op in history.accepts),
        "cancels": len(history.cancels),
        "crashes": history.crashes,
        "stops": history.stops,
        "pauses": len(history.pauses),
        "forks": sum(it.outcome == OK for it in history.forks),
        "deletions": sum(not it.exists for it in history.fleeting),
        "lost nodes": len(history.lost_hosts),
        "stales": history.stales,
        "turns of workers": sum(it.agent == WORKED for it in history.executions),
        "lost connections": history.lost_links,
        "returns": history.returns,
        "completes": len(history.completes),
        "events": sum(map(len, history.events.values())),
        "watched": sum(len(watch.came) for watch in history.watches),
        "followed": sum(len(follow.came) for follow in history.follows),
    }


def _tear_down(world: World) -> None:
    """Ends the remaining tasks of a world, so that nothing is left for the garbage collector."""
    loop = world.loop
    loop.failure = None
    world.over = True
    for node in world.nodes:
        node.store.dead = True
        loop.resume(node.number)
    loop.set_exception_handler(lambda loop, context: None)
    for _ in range(100):
        if not (tasks := asyncio.all_tasks(loop)):
            break
        try:
            loop.run_until_complete(_cancel_all(tasks))
        except (Broken, Stuck):
            continue
    loop.close()


async def _cancel_all(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=10)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Disables the garbage collector, whose effects do not depend on the seed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Lets the heartbeats and polls of nodes depend on nothing but the seed."""
    module: Any = membership
    before = module.random
    module.random = Random(f"jitter {seed}")  # noqa: S311
    try:
        yield
    finally:
        module.random = before


@contextmanager
def narrow() -> Iterator[None]:
    """Lowers the limits of caches and pages."""
    before = [getattr(module, name) for module, name, _ in NARROW]
    for module, name, value in NARROW:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(NARROW, before, strict=True):
            setattr(module, name, value)


@contextmanager
def _logged(history: History) -> Iterator[None]:
    """Treats logged errors as failures, and prints nothing else."""

    def judge(
        logger: Any, method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        if event["event"] not in EXPECTED_ERRORS:
            history.broken(f"logged as an error: {event}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(
        processors=[judge], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR)
    )
    try:
        yield
    finally:
        structlog.configure(**before)


def shortened(trace: Sequence[Line], number: int) -> str:
    """The last lines of a trace."""
    return "\n".join(map(str, trace[-number:]))
