"""A client that deletes sessions with their runs, and uses their ids while the runs are removed.

Its sessions are its own, except that other clients repeat accepts of its runs. The removal goes on
meanwhile, on any node, piece by piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from random import Random
from typing import Any

from proofs.sim.agent import agent_of
from proofs.sim.clients import SESSIONS, Client, Gone, Place, policy_of
from proofs.sim.history import FLEETING, LOST, OK, AcceptOp
from proofs.sim.node import Node
from runlane_server.core.errors import RunlaneError
from runlane_server.core.model import Prompt, RunRequest, WhenBusy
from runlane_server.engine.reservation import Acceptance

ROUNDS = 3

BEING_DELETED = "SESSION_BEING_DELETED"

Work = Callable[[Node], Coroutine[Any, Any, Any]]


class Deleter:
    """Fills sessions and deletes them, until the world is over."""

    def __init__(self, name: str, world: Place, rng: Random) -> None:
        self._client = Client(name, world, rng)
        self._name = name
        self._world = world
        self._history = world.history
        self._rng = rng
        self._run_ids = 0

    async def work(self) -> None:
        """Some sessions, one after another; every second one has the id of one before."""
        for _ in range(ROUNDS):
            session_id = self._rng.choice(FLEETING)
            played = [await self._play(session_id) for _ in range(self._rng.randint(2, 5))]
            run_ids = [run_id for run_id in played if run_id]
            await self._until(session_id, run_ids)
            if self._world.over:
                return

    async def remove(self) -> None:
        """Removes what was deleted, in the background; all of it at the end."""
        while not self._world.over:
            await asyncio.sleep(self._rng.choice([0.0, 0.01, 0.1, 0.5]))
            await self._remove_piece()
        while self._world.is_being_removed(""):
            await self._remove_piece()

    async def _remove_piece(self) -> None:
        try:
            await self._client.call(lambda node: node.store.remove_deleted())
        except Gone:
            await asyncio.sleep(0.01)

    async def _until(self, session_id: str, run_ids: list[str]) -> None:
        """Deletes a session with its runs, then tries what the rules say of its id."""
        before = self._history.deletions(session_id)
        outcome = await self._repeated(
            "deletes", session_id, lambda it: it.coordinator.sessions.delete(session_id)
        )
        if outcome not in {OK, "SESSION_NOT_FOUND"}:
            return  # the world is over
        self._history.require(
            self._history.deletions(session_id) != before,
            f"{session_id} is answered as deleted, and is not",
        )
        tries = [
            *(partial(it, session_id) for it in (self._create, self._fork, self._accept_new)),
            *(partial(self._repeat, session_id, run_id) for run_id in run_ids),
        ]
        self._rng.shuffle(tries)
        await asyncio.gather(*(one() for one in tries[:3]))
        for one in tries[3:]:
            await one()

    async def _play(self, session_id: str) -> str:
        """Accepts a run, and waits for its end; returns its id, empty if another client has used
        it elsewhere."""
        run_id = self._new_run_id()
        while not self._world.over:
            outcome = await self._accept(session_id, run_id)
            if outcome == "RUN_ID_CONFLICT":
                return ""
            if outcome == OK:
                break
            await asyncio.sleep(0.05)
        while not (self._world.over or self._history.has_ended(run_id)):
            await asyncio.sleep(0.1)
        return run_id

    def _new_run_id(self) -> str:
        self._run_ids += 1
        return f"{self._name}.{self._run_ids}"

    async def _accept(self, session_id: str, run_id: str) -> str:
        tick = self._history.note(self._name, f"accepts {run_id} in {session_id}")
        op = AcceptOp(run_id, session_id, "do it", WhenBusy.QUEUE, 0, tick)
        self._history.accepts.append(op)
        request = RunRequest(
            run_id, Prompt("do it"), agent=agent_of(run_id), retry=policy_of(run_id)
        )

        async def accept(node: Node) -> Acceptance:
            op.node = node.number
            with node.coordinator.begin_accepted(session_id, run_id) as accepted:
                await asyncio.sleep(self._rng.choice([0, 0, 0.05]))
                return await node.coordinator.run_accepted(accepted, request, allow_missing=True)

        try:
            await self._client._accepted(op, accept, None)
        except Gone:
            self._history.note(self._name, "gets no answer")
        return op.outcome

    async def _accept_new(self, session_id: str) -> None:
        """The id becomes free; a run is refused until then."""
        run_id = self._new_run_id()
        was_free = 0
        while not self._world.over:
            was_free += not self._world.is_being_removed(session_id)
            outcome = await self._accept(session_id, run_id)
            if outcome != BEING_DELETED:
                return
            self._history.require(was_free < 2, f"R3: the id {session_id} is not free again")
            await asyncio.sleep(self._rng.choice([0.01, 0.1]))

    async def _repeat(self, session_id: str, run_id: str) -> None:
        """R3: the id of a run that was deleted is refused, whether its row is there or not."""
        while not self._world.over:
            outcome = await self._accept(session_id, run_id)
            if outcome != LOST:
                self._history.require(
                    outcome in {"RUN_DELETED", "QUEUE_FULL"},
                    f"R3: {run_id} was deleted, and its id is answered {outcome}",
                )
                return
            await asyncio.sleep(0.01)

    async def _create(self, session_id: str) -> None:
        outcome = await self._once(
            "creates", session_id, lambda it: it.coordinator.sessions.create(session_id)
        )
        allowed = {OK, LOST, BEING_DELETED, "SESSION_EXISTS"}
        self._history.require(outcome in allowed, f"{session_id} is not created: {outcome}")

    async def _fork(self, session_id: str) -> None:
        source = self._rng.choice(SESSIONS)
        await self._once(
            "forks", session_id, lambda it: it.coordinator.sessions.fork(source, session_id)
        )

    async def _once(self, verb: str, session_id: str, work: Work) -> str:
        """Makes a call once; returns OK, the reason of a refusal, or LOST."""
        history = self._history
        tick = history.note(self._name, f"{verb} {session_id}")
        outcome = LOST
        try:
            await self._client.call(work, self._rng.choice([None, None, 0.001, 0.02]))
            outcome = OK
        except Gone:
            pass
        except RunlaneError as error:
            outcome = error.reason
            history.require(
                outcome != "SESSION_EXISTS" or history.existed(session_id, tick),
                f"R3: {session_id} did not exist, and was answered SESSION_EXISTS",
            )
        history.note(self._name, f"{verb} {session_id}: {outcome}")
        return outcome

    async def _repeated(self, verb: str, session_id: str, work: Work) -> str:
        outcome = LOST
        while not self._world.over:
            outcome = await self._once(verb, session_id, work)
            if outcome not in {LOST, "SESSION_BUSY"}:
                break
            await asyncio.sleep(0.05)
        return outcome
