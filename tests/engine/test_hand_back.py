"""Runs that their executor gives back while the store is in trouble (R33, R37)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from runlane_server.agents.base import AgentEvent, Custom, Turn
from runlane_server.agents.worker.agent import WorkerAgent
from runlane_server.agents.worker.messages import Downstream
from runlane_server.agents.worker.slot import Slot
from runlane_server.agents.worker.turn import Emitted, HandedBack, KeptStep
from runlane_server.agents.worker.workers import Workers
from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.limits import Limits
from runlane_server.core.model import FinishReason, TextDelta
from runlane_server.core.transition import Transition
from runlane_server.engine.agent_table import AgentTable, DeclaredAgent
from runlane_server.store.sqlite.store import SqliteStore
from support.node import running
from support.staging import SECONDS


@pytest.mark.parametrize("output", [Custom("progress", "{}"), KeptStep("k", 1), TextDelta("a")])
async def test_r37_a_hand_back_after_output_of_any_kind_consumes_an_attempt(
    tmp_path: Path, output: Emitted
) -> None:
    workers, slot = Workers(), Slot(None, Downstream())
    agent = AgentTable([DeclaredAgent("w", WorkerAgent(workers, "w"))])
    async with (
        SqliteStore(tmp_path / "runlane.db") as store,
        running(store, agent=agent) as node,
    ):
        workers.connect(slot)
        slot.begin_offer(("w",), "w1")
        workers.offer(slot)
        run = (await node.accept("s", "x")).run
        async with asyncio.timeout(SECONDS):
            while slot.execution is None:
                await asyncio.sleep(0)
        slot.begin()
        await slot.emit(1, [output])
        await slot.hand_back()
        end = await node.end(run.run_id)
        assert (end.finish_reason, end.attempt) == (FinishReason.INTERRUPTED, 1)


class Unconfirmed(SqliteStore):
    """A store that loses the confirmation of its next commit on demand."""

    is_losing = False

    async def commit(self, base_version: int, transition: Transition) -> int:
        version = await super().commit(base_version, transition)
        if self.is_losing:
            self.is_losing = False
            raise StoreUnavailable("outcome unknown")
        return version


class GivesBackOnce:
    """Gives the first turn of session `first` back when it may, which the store does not confirm,
    and ends its next one when it may. Session `second` has a latch too."""

    def __init__(self, store: Unconfirmed) -> None:
        self.store = store
        self.attempts: list[int] = []
        self.may_return, self.may_end, self.second_may_end = [asyncio.Event() for _ in range(3)]

    async def start(self) -> None:
        """It is ready."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Executes a turn."""
        if turn.session_id == "second":
            await self.second_may_end.wait()
        if turn.session_id == "first":
            self.attempts.append(turn.attempt)
            if len(self.attempts) == 1:
                await self.may_return.wait()
                self.store.is_losing = True
                raise HandedBack("not now")
            await self.may_end.wait()
        yield TextDelta("done")

    async def close(self) -> None:
        """It holds nothing."""


async def test_r33_a_repeated_hand_back_does_not_reach_the_next_attempt(tmp_path: Path) -> None:
    async with Unconfirmed(tmp_path / "runlane.db") as store:
        agent = GivesBackOnce(store)
        async with running(store, agent=agent, limits=Limits(max_active_runs=2)) as node:
            with capture_logs() as logs:

                async def logged(event: str) -> None:
                    async with asyncio.timeout(SECONDS):
                        while not any(line["event"] == event for line in logs):
                            assert len(agent.attempts) <= 2, "one attempt has two executors"
                            await asyncio.sleep(0)

                # The third session gets the next free slot, so the first run, which keeps its slot
                # until it is known to have gone back, does not start again in the same commit.
                runs = [(await node.accept(name, "x")).run for name in ("first", "second", "third")]
                agent.may_return.set()
                await logged("end of run not written")
                agent.second_may_end.set()
                try:
                    # The supervisor of the first attempt repeats what was not confirmed.
                    await logged("run fenced off")
                finally:
                    agent.may_end.set()
            ends = [await node.end(run.run_id) for run in runs]
            assert [(end.text, end.attempt) for end in ends] == [("done", n) for n in (2, 1, 1)]
            assert agent.attempts == [1, 2]
