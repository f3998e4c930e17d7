"""A pulse waits for company only while the event loop is busy."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass

import pytest

from runlane_server.engine.pulse import BUSY, IDLE, MAX_WAIT, Pulse
from runlane_server.store.batching import SAMPLE

_NAME: ContextVar[str] = ContextVar("name", default="")


@dataclass
class Clocks:
    """The time, and how much of it the loop has worked."""

    now: float = 0.0
    worked: float = 0.0

    def pass_by(self, seconds: float, share: float) -> None:
        self.now += seconds
        self.worked += seconds * share


async def waited(share: float, *, longest: float = MAX_WAIT) -> float:
    """The seconds of the loop that a call waits, after the loop has worked for that share."""
    clocks = Clocks()
    pulse = Pulse(longest, clock=lambda: clocks.now, worked=lambda: clocks.worked)
    clocks.pass_by(SAMPLE, share)
    loop = asyncio.get_running_loop()
    called: asyncio.Future[float] = loop.create_future()
    begun = loop.time()
    pulse.call(lambda: called.set_result(loop.time() - begun))
    return await called


async def test_nothing_waits_while_the_loop_has_time() -> None:
    assert await waited(IDLE) < MAX_WAIT / 2


@pytest.mark.parametrize("share", [BUSY, 1.0])
async def test_calls_wait_while_the_loop_has_none(share: float) -> None:
    assert await waited(share) >= MAX_WAIT * 0.9


async def test_pulse_without_a_wait_never_waits() -> None:
    assert await waited(1.0, longest=0.0) < MAX_WAIT / 2


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_calls_of_one_beat_come_together_in_order(share: float) -> None:
    clocks = Clocks()
    pulse = Pulse(clock=lambda: clocks.now, worked=lambda: clocks.worked)
    clocks.pass_by(SAMPLE, share)
    called: list[int] = []
    done = asyncio.Event()
    pulse.call(lambda: called.append(1))
    pulse.call(lambda: called.append(2))
    # One that is added by another waits for the next beat.
    pulse.call(lambda: pulse.call(done.set))
    assert not called
    async with asyncio.timeout(5):
        await done.wait()
        assert called == [1, 2]
        done.clear()
        pulse.call(done.set)
        await done.wait()
    assert called == [1, 2]


async def test_calls_do_not_get_the_context_of_the_caller() -> None:
    _NAME.set("agent")
    seen: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    Pulse().call(lambda: seen.set_result(_NAME.get()))
    assert await seen == ""
