"""The agent that gives its turns to workers."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import AsyncGenerator
from typing import cast

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.agents.worker.execution import Execution
from runlane_server.agents.worker.turn import DurableTurn
from runlane_server.agents.worker.workers import Workers

DEFAULT_NAME = "default"


class WorkerAgent:
    """An agent named `name` whose turns `workers` execute. It is always ready: a run waits for an
    offer of a worker, as for a slot (R32)."""

    outlives_node = True
    """Whether an attempt can continue on another node, or after a restart of this one (R36)."""

    resumable = True
    """A run that waits for input starts again, on any worker (R44)."""

    def __init__(self, workers: Workers, name: str = DEFAULT_NAME) -> None:
        self.workers = workers
        self.name = name

    async def start(self) -> None:
        """Does nothing: workers connect on their own."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Waits until a worker has executed the turn; yields its report."""
        workers = self.workers
        execution = Execution(
            cast("DurableTurn", turn), self.name, workers.lease, why_lost=workers.why_lost
        )
        if not self.outlives_node:
            # The turn itself may be what ends the process: it must count as an attempt.
            execution.begin()
            execution.takes_checkpoints = True
        self.workers.begin(execution)
        execution.turn.end.is_followed.set()
        try:
            if execution.turn.is_resumed:
                execution.wait_for_worker()
            else:
                await self.workers.assign(execution)
            report, result, error = await execution.wait()
            error = workers.judge(execution, error)
            if report is not None:
                yield report
            if result is not None:
                yield result
            if error is not None:
                raise error
        except CancelledError:
            await execution.stop()
            raise
        finally:
            self.workers.end(execution)

    async def close(self) -> None:
        """Does nothing: the streams have ended."""
