"""Defects that random rounds found, each reproduced step by step."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runlane_server.core.errors import RunlaneError
from runlane_server.core.limits import Limits
from runlane_server.core.model import RunState, WhenBusy
from runlane_server.store.base import Store
from support.node import Node, running
from support.staging import script, wait

pytestmark = pytest.mark.stores("sqlite", "postgresql")

ROUNDS = 30


async def test_r20_no_receipt_names_a_run_that_had_ended(store: Store) -> None:
    """Cancels while the accept of an ended run is repeated."""
    async with running(store) as node:
        ended = await node.queue("s", "x", run_id="ended")
        await node.end(ended.run_id)
        repeating = asyncio.create_task(node.queue("s", "x", run_id="ended"))
        receipts = await asyncio.gather(*_cancels(node, "s"))
        again = await repeating
        assert again.state is RunState.COMPLETED
        assert [receipt.cancelled for receipt in receipts] == [()] * ROUNDS


@pytest.mark.parametrize("refusal", [WhenBusy.REJECT, WhenBusy.QUEUE])
async def test_r20_no_receipt_names_a_run_that_was_refused(store: Store, refusal: WhenBusy) -> None:
    async with running(store, limits=Limits(max_waiting_runs=0, cancel_grace=20)) as node:
        active = await node.start_blocked("s", "gate")
        accept = node.accept("s", "x", run_id="refused", when_busy=refusal)
        accepting = asyncio.create_task(accept)
        receipts = await asyncio.gather(*_cancels(node, "s"))
        with pytest.raises(RunlaneError):
            await accepting
        named = [run.run_id for receipt in receipts for run in receipt.cancelled]
        assert named == [active.run_id]


def _cancels(node: Node, session_id: str) -> list[asyncio.Future[Any]]:
    """Cancels at every step of the event loop."""

    async def cancel(steps: int) -> Any:
        for _ in range(steps):
            await asyncio.sleep(0)
        return await node.coordinator.cancel(session_id)

    return [asyncio.ensure_future(cancel(steps)) for steps in range(ROUNDS)]


async def test_r03_a_repeated_accept_returns_the_run_cancelled_in_the_same_batch(
    store: Store,
) -> None:
    """The cancel and the repeated accept are in one batch: the lane must not accept the run
    a second time."""
    async with running(store) as node:
        await node.start_blocked("s", "gate")
        prompt = script(wait("gate"))
        waiting = await node.accept("s", prompt, run_id="waiting")
        receipt, again, other = await asyncio.gather(
            node.coordinator.cancel("s"),
            node.accept("s", prompt, run_id="waiting"),
            node.accept("s", prompt, run_id="other"),
        )
        assert [run.run_id for run in receipt.cancelled][1:] == ["waiting"]
        assert again.run.accept_seq == waiting.run.accept_seq
        assert again.run.state is RunState.CANCELLED
        assert other.run.accept_seq == waiting.run.accept_seq + 1
        assert [complete.run_id for complete in await node.completes()].count("waiting") == 1


@pytest.mark.parametrize("steps", range(0, 40, 4))
async def test_r17_a_stop_ends_the_run_that_starts_at_that_instant(
    store: Store, steps: int
) -> None:
    """The commit that starts a run is in progress when the node stops."""
    async with running(store) as node:
        accepting = asyncio.create_task(node.accept("s", script(wait("gate")), run_id="r"))
        for _ in range(steps):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await node.coordinator.stop()
        await asyncio.gather(accepting, return_exceptions=True)
        states = [run.state for run in (await store.list_runs("default", limit=9)).items]
    assert states in ([], [RunState.ACCEPTED], [RunState.FAILED])
