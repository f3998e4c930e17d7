"""The gates of the harness over the wire: the points at which they hold a run, and the results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from runlane import (
    Client,
    DeadlineExceeded,
    GateNotFound,
    InvalidArgument,
    RunState,
    Started,
    WhenBusy,
)
from runlane.harness import Arrival, GatePoint, Harness
from runlane_server.testing.server import LocalServer
from support.staging import SECONDS, say
from support.wire import Wire, check_turn, wait_for_text

S, P = RunState, GatePoint
STEP = {"step": True}


@pytest.fixture
async def server(store_url: str) -> AsyncIterator[LocalServer]:
    """A server in this process: no test here ends it, and it starts faster."""
    async with LocalServer("scripted", store=store_url, harness=True) as made:
        yield made


@pytest.fixture
async def client(server: LocalServer) -> AsyncIterator[Client]:
    async with server.client() as made:
        yield made


@pytest.fixture
async def harness(server: LocalServer) -> AsyncIterator[Harness]:
    async with Harness(server.address) as made:
        yield made


@pytest.mark.parametrize(
    ("point", "state", "text"),
    [
        (P.BEFORE_ACTIVE, S.ACCEPTED, ""),
        (P.BEFORE_FIRST_MESSAGE, S.ACTIVE, ""),
        (P.BEFORE_STEP, S.ACTIVE, "a"),
        (P.BEFORE_FINISH, S.ACTIVE, "ab"),
    ],
)
async def test_a_run_held_at_a_gate_can_be_cancelled(
    harness: Harness, wire: Wire, point: GatePoint, state: RunState, text: str
) -> None:
    async with await harness.arm(point, session_id="s") as gate:
        handle = await wire.accept("s", say("a"), STEP, say("b"))
        assert await gate.reached() == [Arrival("s", handle.run_id)]
        receipt = await wire.client.cancel("s")
        assert [(c.run_id, c.state_when_cancelled) for c in receipt.cancelled] == [
            (handle.run_id, state)
        ]
        # A cancelled run passes every gate except the one at its very end.
        if point is P.BEFORE_FINISH:
            assert (await wire.client.get_run(handle.run_id)).state is S.CANCELLING
            await gate.release()
        complete = await wire.end(handle)
    assert (complete.state, complete.text) == (S.CANCELLED, text)
    check_turn(complete, await wire.messages("s"))


@pytest.mark.parametrize("point", [P.BEFORE_ACTIVE, P.BEFORE_FIRST_MESSAGE, P.BEFORE_FINISH])
async def test_a_released_run_completes(harness: Harness, wire: Wire, point: GatePoint) -> None:
    gate = await harness.arm(point)
    handles = [await wire.accept(f"s{n}", say("x")) for n in range(5)]
    arrivals = await gate.reached(5)
    assert {each.run_id for each in arrivals} == {handle.run_id for handle in handles}
    await gate.release()
    for handle in handles:
        assert (await wire.end(handle)).state is S.COMPLETED


async def test_an_accept_is_held_after_its_commit(harness: Harness, wire: Wire) -> None:
    gate = await harness.arm(P.ACCEPT_COMMITTED, run_id="r")
    answered = asyncio.create_task(wire.accept("s", say("x"), run_id="r"))
    await gate.reached()
    assert (await wire.client.wait_run("r", timeout=SECONDS)).state is S.COMPLETED
    assert not answered.done()
    await gate.release()
    assert (await answered).run_id == "r"


async def test_r08_a_session_held_at_the_handoff_is_busy(harness: Harness, wire: Wire) -> None:
    first = await wire.start_blocked("s", "g")
    gate = await harness.arm(P.HANDOFF, session_id="s")
    second, third = [await wire.accept("s", say("x")) for _ in range(2)]
    await wire.open_latch("g")
    assert await gate.reached() == [Arrival("s", second.run_id)]
    assert (await wire.client.get_run(first.run_id)).state is S.COMPLETED
    session = await wire.client.get_session("s")
    assert (session.busy, session.active_run_id, session.waiting_runs) == (True, None, 2)
    # The run stays at its gate while other calls change the session.
    await wire.accept("s", say("y"))
    assert (await wire.client.get_run(second.run_id)).state is S.ACCEPTED
    receipt = await second.cancel()
    assert [c.state_when_cancelled for c in receipt.cancelled] == [S.ACCEPTED]
    await gate.release()
    assert (await wire.end(third)).state is S.COMPLETED
    assert (await wire.end(second)).state is S.CANCELLED


async def test_a_run_released_at_the_handoff_stops_at_the_next_gate(
    harness: Harness, wire: Wire
) -> None:
    await wire.start_blocked("s", "g")
    second = await wire.accept("s", say("x"))
    handoff = await harness.arm(P.HANDOFF, run_id=second.run_id)
    active = await harness.arm(P.BEFORE_ACTIVE, run_id=second.run_id)
    await wire.open_latch("g")
    await handoff.reached()
    assert [gate.arrivals for gate in await harness.gates()] == [[Arrival("s", second.run_id)], []]
    await handoff.release()
    await active.reached()
    await active.release()
    assert (await wire.end(second)).state is S.COMPLETED


async def test_r26_a_run_accepted_while_a_step_is_held_is_folded_at_that_step(
    harness: Harness, wire: Wire
) -> None:
    gate = await harness.arm(P.BEFORE_STEP, session_id="s")
    first = await wire.accept("s", say("a"), STEP)
    await gate.reached()
    folded = await wire.client.run_accepted("s", "more", when_busy=WhenBusy.FOLD)
    await gate.release()
    assert (await wire.end(folded)).folded_into == first.run_id
    assert (await wire.end(first)).text == "[folded: more]"


async def test_a_run_waits_for_every_matching_gate_of_a_point(harness: Harness, wire: Wire) -> None:
    gates = [await harness.arm(P.BEFORE_ACTIVE, session_id=s) for s in ("s", "", "other")]
    handle = await wire.accept("s", say("x"))
    for gate in gates[:2]:
        assert await gate.reached() == [Arrival("s", handle.run_id)]
        assert (await wire.client.get_run(handle.run_id)).state is S.ACCEPTED
        await gate.release()
    assert (await wire.end(handle)).state is S.COMPLETED
    (left,) = await harness.gates()
    assert (left.gate_id, left.session_id, left.point) == (
        gates[2].gate_id,
        "other",
        P.BEFORE_ACTIVE,
    )
    assert left.arrivals == []


async def test_an_invalid_gate_call_is_refused_with_the_reason(harness: Harness) -> None:
    with pytest.raises(InvalidArgument) as error:
        await harness.arm(P.BEFORE_AGENT_READY, session_id=" s", run_id="x" * 200)
    fields = [violation.field for violation in error.value.violations]
    assert fields == ["session_id", "run_id", "session_id", "run_id"]
    for call in (harness.await_gate("none"), harness.release("none")):
        with pytest.raises(GateNotFound, match="no gate 'none' is armed; armed gates: none"):
            await call
    async with await harness.arm(P.HANDOFF) as gate:
        with pytest.raises(GateNotFound, match=f"armed gates: {gate.gate_id}"):
            await harness.release("misspelt")
    with pytest.raises(ValueError, match=r"point: .* not one of .*; did you mean 'handoff'"):
        await harness.arm("hand-off")  # type: ignore[arg-type]
    for call in (harness.await_gate(""), harness.release("")):
        with pytest.raises(InvalidArgument, match="gate_id: is missing"):
            await call
    gate = await harness.arm(P.BEFORE_ACTIVE)
    with pytest.raises(DeadlineExceeded):
        await gate.reached(timeout=0.1)
    with pytest.raises(InvalidArgument, match="arrivals: is 10001"):
        await gate.reached(10_001)
    waiting = asyncio.create_task(gate.reached())
    while not (await harness.gates()):  # until the server has the call
        pass
    await gate.release()
    with pytest.raises(GateNotFound):
        await waiting
    with pytest.raises(InvalidArgument, match="by: must be positive"):
        await harness.advance_clock(0)
    with pytest.raises(InvalidArgument, match="by: is more than 3650 days"):
        await harness.advance_clock(3651 * 86400)


async def test_a_removed_gate_holds_no_run(harness: Harness, wire: Wire) -> None:
    async with await harness.arm(P.BEFORE_FIRST_MESSAGE) as gate:
        await gate.release()
    handle = await wire.accept("s", say("x"))
    assert await wait_for_text(handle, "x") == "x"
    kinds = [type(event.body) async for event in handle.events()]
    assert Started in kinds
