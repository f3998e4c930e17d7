"""Many races: cancels against accepts, and many concurrent sessions."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from runlane import Client, FinishReason, RunComplete, RunHandle, RunState, TextDelta
from support.server import serving
from support.staging import SECONDS
from support.wire import Wire, check_turn

CANCELS = 160
"""Cancels of each of the three kinds, each sent at the moment of an accept."""

FEW = 60
"""The number of them in a test that runs over each store."""

AT_ONCE = 20

S = RunState


@pytest.fixture
def cancels(store_kind: str, request: pytest.FixtureRequest) -> int:
    return CANCELS if store_kind in {"sqlite", request.config.getoption("--store")} else FEW


@pytest.mark.stores("sqlite", "postgresql")
@pytest.mark.parametrize(
    "flags",
    [
        ("--agent", "echo"),
        ("--agent", "echo:delay=50ms"),
        ("--agent", "echo:delay=5ms", "--max-active-runs", "3"),
    ],
)
async def test_r10_r19_a_cancel_racing_its_accept_leaves_one_outcome(
    tmp_path: Path, flags: tuple[str, ...], cancels: int
) -> None:
    """Receipt, GetRun, ListMessages and RunComplete agree after every race."""
    async with serving(tmp_path, *flags) as server, Client(server.address) as client:
        wire = Wire(client)
        ended: dict[str, RunComplete] = {}
        counted: Counter[tuple[RunState | None, RunState, bool]] = Counter()

        async def listen() -> None:
            async for complete in client.subscribe_run_complete(from_beginning=True):
                assert complete.run_id not in ended, "a terminal event came twice"
                ended[complete.run_id] = complete
                if len(ended) == cancels:
                    return

        async def race(session: int) -> None:
            for n in range(cancels // AT_ONCE):
                handle = await client.run_accepted(
                    f"s{session}", f"{n}: one two three four five", allow_missing=True
                )
                receipt = await client.cancel(f"s{session}")
                run = await client.wait_run(handle.run_id, timeout=SECONDS)
                assert run.run_complete is not None
                await check(wire, handle, run.run_complete)
                covered = {c.run_id: c.state_when_cancelled for c in receipt.cancelled}
                assert set(covered) <= {handle.run_id}
                assert receipt.fence_accept_seq == n + 1
                assert (handle.run_id in covered) == (run.state is S.CANCELLED)
                started = run.attempt > 0
                counted[covered.get(handle.run_id), run.state, started] += 1

        listening = asyncio.create_task(listen())
        await asyncio.gather(*(race(session) for session in range(AT_ONCE)))
        async with asyncio.timeout(SECONDS):
            await listening
        assert sum(counted.values()) == cancels
        if "delay" in flags[1]:
            # The cancel wins unless the machine stalls.
            cancelled = sum(n for (_, state, _), n in counted.items() if state is S.CANCELLED)
            assert cancelled > cancels / 2
        for run_id, complete in ended.items():
            assert (await client.get_run(run_id)).run_complete == complete
        print(f"\n{' '.join(flags)}: {dict(counted)}")


async def check(wire: Wire, handle: RunHandle, complete: RunComplete) -> None:
    """The transcript agrees with the terminal event (R14 if it never started, else R15, R16)."""
    messages = await wire.messages(handle.session_id)
    check_turn(complete, messages)
    if complete.state is S.CANCELLED:
        assert complete.finish_reason is FinishReason.CANCELED
        assert complete.error is None
        assert (complete.started_at is None) == (complete.attempt == 0)
    said = ""
    async for event in handle.events():
        said += event.body.text if isinstance(event.body, TextDelta) else ""
    assert said == complete.text


async def test_r04_r07_r21_many_concurrent_sessions_keep_order_and_end_once(tmp_path: Path) -> None:
    """200 sessions of 10 runs each: a subscriber sees all in order, each with one end."""
    sessions, runs = 200, 10
    async with serving(tmp_path, "--agent", "echo") as server, Client(server.address) as client:
        heard: defaultdict[str, list[RunComplete]] = defaultdict(list)
        accepted: dict[str, list[str]] = {}

        async def listen() -> None:
            left = sessions * runs
            async for complete in client.subscribe_run_complete(from_beginning=True):
                heard[complete.session_id].append(complete)
                left -= 1
                if not left:
                    return

        async def use(session_id: str) -> None:
            handles = [
                await client.run_accepted(session_id, f"{session_id} {n}", allow_missing=True)
                for n in range(runs)
            ]
            accepted[session_id] = [handle.run_id for handle in handles]

        listening = asyncio.create_task(listen())
        await asyncio.gather(*(use(f"s{n}") for n in range(sessions)))
        async with asyncio.timeout(2 * SECONDS):
            await listening
        for session_id, run_ids in accepted.items():
            completes = heard[session_id]
            assert [c.run_id for c in completes] == run_ids
            assert [c.accept_seq for c in completes] == list(range(1, runs + 1))
            assert [c.text for c in completes] == [f"{session_id} {n}" for n in range(runs)]
        assert sum(len(completes) for completes in heard.values()) == sessions * runs
