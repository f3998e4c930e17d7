"""How long an attempt may be active: the timeout of its request and the limits of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.core.limits import Limits, RunTimeout
from runlane_server.core.model import FinishReason, Prompt, RunRequest, RunState, TextDelta
from runlane_server.store.base import Store
from support.node import running
from support.staging import SECONDS

HOUR = 3600 * 1_000_000


@pytest.mark.parametrize(
    ("requested", "default", "most", "expected"),
    [
        (None, 0.0, 0.0, None),
        (None, 5.0, 0.0, (5.0, "--default-run-timeout")),
        (None, 0.0, 7.0, (7.0, "--max-run-time")),
        (None, 5.0, 7.0, (5.0, "--default-run-timeout")),
        (None, 9.0, 7.0, (7.0, "--max-run-time")),
        (HOUR, 5.0, 0.0, (3600.0, "its timeout")),
        (HOUR, 5.0, 7.0, (7.0, "--max-run-time")),
        (6_000_000, 5.0, 7.0, (6.0, "its timeout")),
        (7_000_000, 5.0, 7.0, (7.0, "its timeout")),
    ],
)
def test_the_shortest_limit_of_the_server_and_the_request_applies(
    requested: int | None, default: float, most: float, expected: tuple[float, str] | None
) -> None:
    limits = Limits(default_run_timeout=default, max_run_time=most)
    found = limits.run_timeout(requested)
    assert found == (None if expected is None else RunTimeout(*expected))


class Hanging:
    """An agent whose model never answers."""

    async def start(self) -> None:
        pass

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        yield TextDelta("I am thinking")
        await asyncio.Event().wait()

    async def close(self) -> None:
        pass


@pytest.mark.stores("memory")
@pytest.mark.parametrize(
    ("limits", "timeout", "source"),
    [
        (Limits(cancel_grace=SECONDS, default_run_timeout=0.05), None, "--default-run-timeout"),
        (Limits(cancel_grace=SECONDS, max_run_time=0.05), HOUR, "--max-run-time"),
        (Limits(cancel_grace=SECONDS), 50_000, "its timeout"),
    ],
)
async def test_a_hanging_agent_does_not_hold_its_session(
    store: Store, limits: Limits, timeout: int | None, source: str
) -> None:
    async with running(store, agent=Hanging(), limits=limits) as node:
        request = RunRequest("r", Prompt("x"), timeout=timeout)
        with node.coordinator.begin_accepted("s", "r") as accepted:
            await node.coordinator.run_accepted(accepted, request, allow_missing=True)
        complete = await node.end("r")
        assert (complete.state, complete.finish_reason) == (RunState.FAILED, FinishReason.TIMEOUT)
        assert complete.error is not None
        assert complete.error.reason == "RUN_TIMEOUT"
        assert complete.error.message == f"the run was active for more than 0.05 s ({source})"
        assert not await node.coordinator.is_session_busy("s")
