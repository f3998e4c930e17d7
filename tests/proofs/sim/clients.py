"""The clients of a simulated world: each makes a few random calls and may give up at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, Protocol

from proofs.sim.agent import agent_of
from proofs.sim.history import OK, AcceptOp, CancelOp, Follow, History, Watch
from proofs.sim.node import Node
from runlane_server.core.errors import CursorCompacted, Draining, RunlaneError, StoreUnavailable
from runlane_server.core.model import (
    CancelScope,
    Prompt,
    RunComplete,
    RunKey,
    RunRequest,
    WhenBusy,
)
from runlane_server.core.retry import RetryPolicy
from runlane_server.engine.reservation import Acceptance
from runlane_server.store.base import EventFilter

TENANT = "default"
SESSIONS = ("a", "b", "c")


POLICY = RetryPolicy((), 3, initial_backoff=50_000, max_backoff=400_000, after_output=True)


def policy_of(run_id: str) -> RetryPolicy | None:
    """The policy of a run: every second one of a client has one (R38)."""
    return POLICY if int(run_id.rpartition(".")[2]) % 2 else None


class Gone(Exception):
    """No answer came: the caller gave up, or the node died."""


class Place(Protocol):
    """The world, as its clients see it."""

    history: History
    over: bool

    async def node_up(self) -> Node:
        """Waits for a node that is up."""

    def durable(self, run_id: str) -> bool:
        """Whether a run is on the disk, or was deleted."""

    def is_being_removed(self, session_id: str) -> bool:
        """Whether records of a deleted session are left; of any one, without an id."""


class Client:
    """A client that makes random calls."""

    def __init__(self, name: str, world: Place, rng: Random) -> None:
        self.name = name
        self._world = world
        self._history = world.history
        self._rng = rng
        self._run_ids = 0
        self._sessions = SESSIONS[: rng.choice([1, 2, 3])]

    async def call(
        self, work: Callable[[Node], Coroutine[Any, Any, Any]], patience: float | None = None
    ) -> Any:
        """The answer of the node. Raises Gone, or what the node raises."""
        node = await self._world.node_up()
        task = node.handle(work(node))
        await asyncio.wait({task}, timeout=patience)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if task.cancelled():
            raise Gone
        error = task.exception()
        if isinstance(error, StoreUnavailable | Draining):
            raise Gone from error
        return task.result()

    async def work(self, acts: int) -> None:
        """Makes a number of random calls."""
        kinds = [self.accept, self.cancel, self.wait, self.follow, self.reserve, self.look]
        for _ in range(acts):
            await asyncio.sleep(self._rng.choice([0, 0, 0.01, 0.2, 1.0]))
            kind = self._rng.choices(kinds, [10, 5, 2, 3, 2, 1])[0]
            try:
                await kind()
            except Gone:
                self._history.note(self.name, "gets no answer")

    def _patience(self) -> float | None:
        return self._rng.choice([None, None, None, None, None, 0, 0.001, 0.02])

    # Accepting

    async def accept(self) -> None:
        """Accepts a run, sometimes one that was accepted before."""
        op, request = self._request()
        allow_missing = self._rng.random() < 0.9

        async def accept(node: Node) -> Acceptance:
            op.node = node.number
            with node.coordinator.begin_accepted(op.session_id, op.run_id) as accepted:
                return await node.coordinator.run_accepted(
                    accepted, request, allow_missing=allow_missing
                )

        await self._accepted(op, accept, self._patience())

    async def reserve(self) -> None:
        """Begins an accept, and later completes or releases it."""
        op, request = self._request()
        gives_up, pause = self._rng.random() < 0.3, self._rng.choice([0, 0.01, 0.5])

        async def accept(node: Node) -> Acceptance | None:
            op.node = node.number
            with node.coordinator.begin_accepted(op.session_id, op.run_id) as accepted:
                await asyncio.sleep(pause)
                busy = await node.coordinator.is_session_busy(op.session_id)
                self._history.require(busy, "R8: a session with a reservation looks idle")
                if gives_up:
                    return None
                return await node.coordinator.run_accepted(accepted, request, allow_missing=True)

        await self._accepted(op, accept, self._patience())

    def _request(self) -> tuple[AcceptOp, RunRequest]:
        rng, history = self._rng, self._history
        if history.accepts and rng.random() < 0.15:
            run_id = rng.choice(history.accepts).run_id
        else:
            self._run_ids += 1
            run_id = f"{self.name}.{self._run_ids}"
        session_id = rng.choice(self._sessions) if rng.random() < 0.1 else self._home(run_id)
        when_busy = rng.choices(list(WhenBusy), [6, 4, 1, 2])[0]
        text = "other" if rng.random() < 0.02 else "do it"
        request = RunRequest(
            run_id,
            Prompt(text),
            when_busy,
            timeout=rng.choice([None, None, None, 50_000, 1_000_000, 3_000_000]),
            max_attempts=rng.choice([1, 1, 2, 3]),
            agent=agent_of(run_id),
            retry=policy_of(run_id),
        )
        what = f"accepts {run_id} in {session_id} {when_busy}"
        op = AcceptOp(run_id, session_id, text, when_busy, 0, history.note(self.name, what))
        history.accepts.append(op)
        return op, request

    def _home(self, run_id: str) -> str:
        known = [op.session_id for op in self._history.accepts if op.run_id == run_id]
        return known[0] if known else self._rng.choice(self._sessions)

    async def _accepted(
        self,
        op: AcceptOp,
        work: Callable[[Node], Coroutine[Any, Any, Acceptance | None]],
        patience: float | None,
    ) -> None:
        try:
            acceptance = await self.call(work, patience)
        except RunlaneError as error:
            op.outcome = error.reason
            op.returned = self._history.note(self.name, f"is refused {op.run_id}: {error.reason}")
            return
        if acceptance is None:
            op.outcome = "given up"
            op.returned = self._history.note(self.name, f"gives {op.run_id} up")
            return
        op.outcome, op.seq = OK, acceptance.run.accept_seq
        op.position = acceptance.position
        op.returned = self._history.note(self.name, f"has {op.run_id} as {op.seq}")
        self._history.require(
            self._world.durable(op.run_id), f"R1: {op.run_id} is answered and not durable"
        )

    # Cancelling

    async def cancel(self) -> None:
        """Cancels a random scope."""
        rng, history = self._rng, self._history
        scope = rng.choices([*CancelScope, None], [4, 2, 2, 4, 1])[0]
        run_id, session_id = "", rng.choice(self._sessions) if scope is not None else None
        if scope is CancelScope.RUN:
            if not history.accepts:
                return
            of = rng.choice(history.accepts)
            run_id, session_id = of.run_id, of.session_id
        reason = f"cancel {len(history.cancels)}"
        tick = history.note(self.name, f"cancels {scope} {session_id} {run_id}: {reason}")
        op = CancelOp(reason, scope or CancelScope.SESSION, session_id, run_id, 0, tick)
        history.cancels.append(op)
        try:
            receipts = await self.call(lambda node: _cancel(node, op), self._patience())
        except RunlaneError as error:
            history.note(self.name, f"is refused {reason}: {error.reason}")
            op.receipts = ()
        else:
            op.receipts = tuple(receipts)
            named = [f"{c.run_id} {c.state}" for r in op.receipts for c in r.cancelled]
            history.note(self.name, f"has the receipt of {reason}: {', '.join(named)}")
        op.returned, op.at = history.tick(), history.now

    # Looking

    async def look(self) -> None:
        """Reads random state."""
        session_id = self._rng.choice(self._sessions)
        await self.call(lambda node: node.coordinator.queued_prompts_list(session_id))

    async def wait(self) -> None:
        """Waits for the end of a run."""
        acked = self._history.lasting()
        if not acked:
            return
        run_id = self._rng.choice(acked).run_id
        timeout = self._rng.choice([None, 0, 0.5])
        self._history.note(self.name, f"waits for {run_id}, {timeout}")
        run = await self.call(
            lambda node: node.coordinator.wait_run(run_id, timeout=timeout), self._patience()
        )
        self._history.note(self.name, f"sees {run_id} {run.state}")
        self._history.require(
            run.state.is_terminal or timeout is not None, f"R24: the wait for {run_id} ends early"
        )

    async def follow(self) -> None:
        """Follows a run to its end, across nodes."""
        acked = self._history.lasting()
        if not acked:
            return
        # One of the latest, which is likely to be active.
        follow = Follow(self._rng.choice(acked[-2:]).run_id, self._rng.choice([0, 0, 1]))
        self._history.follows.append(follow)
        while not follow.ended:
            try:
                await self.call(lambda node: self._follow(node, follow), self._patience())
            except Gone:
                await asyncio.sleep(0.1)

    async def _follow(self, node: Node, follow: Follow) -> None:
        after = follow.came[-1].index if follow.came else follow.after
        follower = node.feed.follow(RunKey(TENANT, follow.run_id), after)
        try:
            while not follow.ended:
                for event in await follower.next():
                    follow.came.append(event)
                    follow.ended = isinstance(event.body, RunComplete)
                    await self._read()
        except CursorCompacted:
            follow.ended = follow.cut = True
        finally:
            follower.close()

    # Watching

    async def watch(self) -> None:
        """Subscribes until the world ends, and resumes by cursor after each interruption."""
        rng, history = self._rng, self._history
        wanted = EventFilter()
        if rng.random() < 0.5:
            ids = frozenset(f"client {n}.{m}" for n in (1, 2) for m in (1, 2, 3))
            wanted = EventFilter(frozenset(rng.sample(SESSIONS, 1)), rng.choice([ids, frozenset()]))
        watch = Watch(self.name, wanted)
        history.watches.append(watch)
        from_now = rng.random() < 0.5
        while not self._world.over:
            try:
                await self.call(lambda node: self._watch(node, watch, from_now=from_now))
            except Gone:
                await asyncio.sleep(rng.choice([0, 0.01]))

    async def _watch(self, node: Node, watch: Watch, *, from_now: bool) -> None:
        if watch.start is None:
            oldest = node.store.compacted_of(TENANT)
            watch.start = watch.cursor = node.feed.position if from_now else oldest
        length = self._rng.choice([1, 3, 10, 100, 100])
        if watch.cursor > node.feed.position:
            await node.store.catch_up()
        try:
            subscription = node.feed.subscribe(TENANT, watch.wanted, watch.cursor)
        except CursorCompacted:
            self._compacted(node, watch)
            return
        try:
            for _ in range(length):
                page = await subscription.next(self._rng.choice([0.01, 1.0, 1000.0]))
                for event in page.events:
                    self._came(watch, event.position)
                    watch.came.append(event)
                    watch.cursor = event.position
                    await self._read()
                if not page.events:
                    self._came(watch, page.scanned + 1)
                    watch.cursor = page.scanned
        except CursorCompacted:
            self._compacted(node, watch)
        finally:
            subscription.close()

    def _came(self, watch: Watch, position: int) -> None:
        self._history.note(watch.name, f"is at {position}")
        self._history.require(position > watch.cursor, "R25: the log goes back in time")

    def _compacted(self, node: Node, watch: Watch) -> None:
        oldest = node.store.compacted_of(TENANT)
        self._history.require(watch.cursor < oldest, "R25: nothing was compacted away")
        watch.lost.append((watch.cursor, oldest))
        watch.cursor = oldest

    async def _read(self) -> None:
        """Takes a while to handle an event."""
        if self._rng.random() < 0.2:
            await asyncio.sleep(self._rng.choice([0, 0.05, 0.5]))


async def _cancel(node: Node, op: CancelOp) -> Any:
    op.node = node.number
    if op.session_id is None:
        return await node.coordinator.cancel_all(reason=op.reason)
    return [
        await node.coordinator.cancel(
            op.session_id, scope=op.scope, run_id=op.run_id, reason=op.reason
        )
    ]
