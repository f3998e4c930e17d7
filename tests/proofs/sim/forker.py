"""A client that forks sessions, uses some of the forks, and deletes others (R48)."""

from __future__ import annotations

import asyncio
from random import Random

from proofs.sim.agent import agent_of
from proofs.sim.clients import SESSIONS, TENANT, Client, Gone, Place, policy_of
from proofs.sim.history import OK, AcceptOp, ForkOp
from proofs.sim.node import Node
from runlane_server.core.errors import RunlaneError, SessionNotFound
from runlane_server.core.model import Prompt, RunRequest, Session, WhenBusy
from runlane_server.engine.reservation import Acceptance

MOST_FORKS = 10


class Forker:
    """Makes forks until the world is over. It repeats a call without an answer, on any node."""

    def __init__(self, name: str, world: Place, rng: Random) -> None:
        self._client = Client(name, world, rng)
        self._name = name
        self._world = world
        self._history = world.history
        self._rng = rng

    async def work(self) -> None:
        """Forks, and accepts runs in forks or deletes them. A call without an answer may still make
        its fork after the deletion."""
        for _ in range(MOST_FORKS):
            await asyncio.sleep(self._rng.choice([0.05, 0.2, 1.0]))
            if self._world.over:
                return
            op = await self._fork()
            if op.outcome != OK:
                continue
            if self._rng.random() < 0.5:
                await self._accept(op)
            elif not op.may_come_late and self._rng.random() < 0.5:
                await self._delete(op)

    async def _fork(self) -> ForkOp:
        op = ForkOp(f"fork {len(self._history.forks)}", self._rng.choice(SESSIONS))
        op.at_turn = self._rng.choice([0, 0, 1, 2])
        self._history.forks.append(op)
        self._history.note(self._name, f"forks {op.source} at {op.at_turn} as {op.session_id}")
        # Several nodes may copy at once.
        calls = [self._until_made(op) for _ in range(self._rng.choice([1, 2]))]
        await asyncio.gather(*calls)
        return op

    async def _until_made(self, op: ForkOp) -> None:
        while not self._world.over:
            try:
                made: Session = await self._client.call(
                    lambda node: node.coordinator.sessions.fork(
                        op.source, op.session_id, at_turn=op.at_turn
                    ),
                    self._rng.choice([None, None, 0.001, 0.02]),
                )
            except Gone:
                op.may_come_late = True
                await asyncio.sleep(0.01)
                continue
            except RunlaneError as error:
                self._history.note(self._name, f"is refused {op.session_id}: {error.reason}")
                op.outcome = op.outcome if op.outcome == OK else error.reason
                self._history.require(
                    error.reason != "SESSION_EXISTS", f"R48: {op.session_id} is of another call"
                )
                return
            assert made.origin is not None
            first, op.turn = op.turn, made.origin.turn
            self._history.require(
                first in {None, op.turn}, f"R48: {op.session_id} ends at {first} and {op.turn}"
            )
            op.outcome = OK
            return

    async def _accept(self, fork: ForkOp) -> None:
        run_id = f"{self._name}.{len(self._history.forks)}"
        tick = self._history.note(self._name, f"accepts {run_id} in {fork.session_id}")
        op = AcceptOp(run_id, fork.session_id, "do it", WhenBusy.QUEUE, 0, tick)
        self._history.accepts.append(op)
        request = RunRequest(
            run_id, Prompt("do it"), agent=agent_of(run_id), retry=policy_of(run_id)
        )

        async def accept(node: Node) -> Acceptance:
            op.node = node.number
            with node.coordinator.begin_accepted(op.session_id, run_id) as accepted:
                return await node.coordinator.run_accepted(accepted, request)

        try:
            await self._client._accepted(op, accept, None)
        except Gone:
            self._history.note(self._name, "gets no answer")

    async def _delete(self, op: ForkOp) -> None:
        """Deletes a fork that nobody has used."""
        self._history.note(self._name, f"deletes {op.session_id}")
        op.is_deleted = True
        while not self._world.over:
            try:
                await self._client.call(lambda it: it.coordinator.sessions.delete(op.session_id))
            except Gone:
                await asyncio.sleep(0.01)
            except SessionNotFound:
                return
            else:
                session = await self._read(op.session_id)
                self._history.require(session is None, f"{op.session_id} is deleted, and is there")
                return

    async def _read(self, session_id: str) -> Session | None:
        node = await self._world.node_up()
        return node.store.peek_session(TENANT, session_id)
