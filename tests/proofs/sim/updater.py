"""A client that edits, sends and moves waiting runs of others (R46, R47)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random

from proofs.sim.clients import TENANT, Client, Gone, Place
from proofs.sim.history import OK, UpdateOp
from runlane_server.core.errors import RunlaneError
from runlane_server.core.model import Run, WhenBusy
from runlane_server.core.update import Move, RunPatch
from runlane_server.core.update import Place as Spot

SENDS: Sequence[WhenBusy | None] = (
    *(None, None, None),
    *(WhenBusy.QUEUE, WhenBusy.FOLD, WhenBusy.INTERRUPT),
)


class Updater:
    """Makes random updates until the world is over, and repeats those without an answer."""

    def __init__(self, name: str, world: Place, rng: Random) -> None:
        self._client = Client(name, world, rng)
        self._name = name
        self._world = world
        self._history = world.history
        self._rng = rng

    async def work(self) -> None:
        """Makes updates of the latest runs."""
        while not self._world.over:
            await asyncio.sleep(self._rng.choice([0.01, 0.05, 0.2]))
            accepted = [op.run_id for op in self._history.lasting()]
            if accepted:
                await self._update(self._rng.choice(accepted[-4:]), accepted[-4:])

    async def _update(self, run_id: str, known: Sequence[str]) -> None:
        op = UpdateOp(run_id, self._patch(known, run_id), 0)
        if op.patch.move is None and not op.patch.has_content and op.patch.when_busy is None:
            return
        op.invoked = self._history.note(self._name, f"updates {run_id}: {op.patch}")
        self._history.updates.append(op)
        for _ in range(2):
            try:
                run: Run = await self._client.call(
                    lambda node: node.coordinator.updates.update(TENANT, run_id, op.patch),
                    self._rng.choice([None, None, 0.001, 0.02]),
                )
            except Gone:
                continue
            except RunlaneError as error:
                op.outcome = error.reason if op.outcome != OK else OK
                self._history.note(self._name, f"is refused {run_id}: {error.reason}")
                return
            op.outcome = OK
            self._history.note(self._name, f"has updated {run_id}: {run.revision} {run.state}")
            return

    def _patch(self, known: Sequence[str], run_id: str) -> RunPatch:
        rng = self._rng
        sends = rng.choice(SENDS)
        anchors = [other for other in known if other != run_id]
        spots = [Spot.FIRST, Spot.LAST, *([Spot.BEFORE, Spot.AFTER] if anchors else [])]
        spot = rng.choice(spots)
        anchor = rng.choice(anchors) if spot in {Spot.BEFORE, Spot.AFTER} else ""
        moves = sends is not WhenBusy.INTERRUPT and rng.random() < 0.6
        return RunPatch(
            text=f"edit {len(self._history.updates)}" if rng.random() < 0.6 else None,
            when_busy=sends,
            move=Move(spot, anchor) if moves else None,
            revision=rng.choice([None, None, 0, 1]),
        )
