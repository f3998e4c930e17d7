"""A cancel and the end of its run share one commit if the agent returns at once."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest

from runlane_server.core.errors import RunIdConflict, StoreUnavailable
from runlane_server.core.model import RunState, WhenBusy
from runlane_server.core.transition import Lane, Transition
from runlane_server.engine.lane_access import LARGE_END
from runlane_server.engine.mailbox import Mailbox, PendingCommand
from runlane_server.store.memory.store import MemoryStore
from support.node import Node, running
from support.staging import say, script, wait

S = RunState


class Watched(MemoryStore):
    """A store that counts commits and fails a given number of them without writing."""

    def __init__(self) -> None:
        super().__init__()
        self.commits = 0
        self.to_fail = 0

    async def commit(self, base_version: int, transition: Transition) -> int:
        self.commits += 1
        if self.to_fail:
            self.to_fail -= 1
            raise StoreUnavailable("nothing was written")
        return await super().commit(base_version, transition)


async def test_r09_a_cancel_and_the_end_of_its_run_share_one_commit() -> None:
    async with Watched() as store, running(store) as node:
        run = await node.start_blocked("s", "g")
        before = store.commits
        receipt = await node.coordinator.cancel("s", reason="enough")
        assert [(it.run_id, it.state) for it in receipt.cancelled] == [(run.run_id, S.ACTIVE)]
        end = await node.end(run.run_id)
        assert (end.state, end.cancel_reason) == (S.CANCELLED, "enough")
        assert store.commits == before + 1


async def test_r09_the_next_run_starts_in_the_commit_of_the_cancel() -> None:
    async with Watched() as store, running(store) as node:
        run = await node.start_blocked("s", "g")
        waiting = await node.accept("s", script(wait("h")))
        before = store.commits
        await node.coordinator.cancel("s", run_id=run.run_id)
        assert await node.state(run.run_id) is S.CANCELLED
        assert await node.state(waiting.run.run_id) is S.ACTIVE
        assert store.commits == before + 1
        node.latches.open("h")
        assert (await node.end(waiting.run.run_id)).state is S.COMPLETED


async def test_r09_a_slow_agent_does_not_delay_the_answer_to_a_cancel() -> None:
    async with Watched() as store, running(store) as node:
        accepted = await node.accept("s", script(wait("g", ignore_cancel=True)))
        await node.latches.reached("g")
        async with asyncio.timeout(2.0):
            receipt = await node.coordinator.cancel("s")
        assert len(receipt.cancelled) == 1
        assert await node.state(accepted.run.run_id) is S.CANCELLING
        node.latches.open("g")
        assert (await node.end(accepted.run.run_id)).state is S.CANCELLED


@pytest.mark.parametrize("failures", [1, 2])
async def test_r19_a_stopped_run_ends_cancelled_even_if_the_cancel_was_not_stored(
    failures: int,
) -> None:
    """The caller of the cancel got an error that says its outcome is unknown."""
    async with Watched() as store, running(store) as node:
        run = await node.start_blocked("s", "g")
        store.to_fail = failures
        with pytest.raises(StoreUnavailable):
            await node.coordinator.cancel("s", reason="enough")
        end = await node.end(run.run_id)
        assert (end.state, end.cancel_reason) == (S.CANCELLED, "enough")


async def test_r27_a_refused_interrupt_does_not_touch_the_active_run(
    node: Node,
) -> None:
    taken = await node.queue("another", "x")
    await node.end(taken.run_id)
    run = await node.accept("s", script(wait("g"), say("done")))
    await node.latches.reached("g")
    with pytest.raises(RunIdConflict):
        await node.queue("s", "y", run_id=taken.run_id, when_busy=WhenBusy.INTERRUPT)
    assert await node.state(run.run.run_id) is S.ACTIVE
    node.latches.open("g")
    assert (await node.end(run.run.run_id)).text == "done"


async def test_r09_a_cancel_does_not_wait_for_the_end_of_a_long_turn() -> None:
    """A cancel and a long end that come together are committed one after another."""
    async with Watched() as store, running(store) as node:
        run = await node.accept("s", script(say("x" * (LARGE_END + 1)), wait("g")))
        await node.latches.reached("g")
        before = store.commits
        await node.coordinator.cancel("s")
        assert (await node.end(run.run.run_id)).state is S.CANCELLED
        assert store.commits == before + 2


def test_large_command_lets_the_others_go_first_once() -> None:
    def command(lane: Lane, at: int) -> Transition:
        raise AssertionError

    large = PendingCommand(command, is_large=True)
    first, second = PendingCommand(command), PendingCommand(command)
    mailbox = Mailbox(commands=deque([first, large, second]))
    assert mailbox.take() == [first, second]
    mailbox.commands.append(first)
    late = mailbox.take()
    assert [it.is_large for it in late] == [False, False]
    assert late[1] is first
    assert not mailbox.commands
