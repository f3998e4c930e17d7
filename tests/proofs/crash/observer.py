"""Reads the final state of a server after all runs have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from itertools import islice

from proofs.crash.history import Final, Replay
from proofs.crash.listeners import connected, last_runs
from proofs.crash.shared import SharedState
from runlane import Client, CursorCompacted, Run, RunComplete, RunNotFound, RunState, convert
from runlane.types import NOT_TERMINAL
from runlane.v1 import run_service_pb2 as pb

AT_ONCE = 20
REPLAYS = 3


async def end_everything(shared: SharedState) -> None:
    """Waits until all runs have ended, and then runs one last run in each session."""
    async with Client(shared.pick()) as client:
        while left := [run async for run in client.list_runs(states=NOT_TERMINAL)]:
            await client.wait_run(left[-1].run_id, timeout=1)
        for session_id, run_id in last_runs(shared.sessions).items():
            handle = await client.run_accepted(session_id, "x", run_id=run_id, allow_missing=True)
            complete = await handle.completed()
            assert complete.state is RunState.COMPLETED


async def ask_for_everything(shared: SharedState) -> None:
    """Adds the final state to the history."""
    final, history = shared.history.final, shared.history
    final.sentinels = set(last_runs(shared.sessions).values())
    async with Client(shared.pick()) as client:
        final.listed = [run async for run in client.list_runs()]
        known = {run.run_id for run in final.listed} | {each.run_id for each in history.accepts}
        await _in_batches(_get(client, run_id, final) for run_id in known)
        await _in_batches(_follow(client, run_id, final) for run_id in final.runs)
        for session_id in shared.sessions:
            messages = client.list_messages(session_id, page_size=50)
            final.messages[session_id] = [message async for message in messages]
    final.log, cursors = await read_log(shared.pick(), shared.sessions)
    # All subscribers get the same cursors, so those of the log equal those received before.
    before = [each.run_id for each in final.log if each.run_id not in final.sentinels]
    for run_id in shared.rng.sample(before, min(REPLAYS, len(before))):
        events, _ = await read_log(shared.pick(), shared.sessions, cursors[run_id])
        final.replays.append(Replay(run_id, events))


async def _get(client: Client, run_id: str, final: Final) -> None:
    try:
        run: Run = await client.get_run(run_id)
    except RunNotFound:
        return
    final.runs[run_id] = run


async def _follow(client: Client, run_id: str, final: Final) -> None:
    events = final.events[run_id] = []
    # A missing event is a violation, which the checker reports.
    with suppress(CursorCompacted):
        async for event in client.subscribe_run(run_id):
            events.append(event)  # noqa: PERF401 - those before the error count


async def read_log(
    address: str, sessions: tuple[str, ...], cursor: str = ""
) -> tuple[list[RunComplete], dict[str, str]]:
    """The terminal events after a cursor, up to the last runs, and the cursor of each."""
    left = set(last_runs(sessions).values())
    events: list[RunComplete] = []
    cursors: dict[str, str] = {}
    request = pb.SubscribeRunCompleteRequest(cursor=cursor)
    if not cursor:
        request = pb.SubscribeRunCompleteRequest(from_beginning=True)
    async with connected(address) as stub:
        call = stub.SubscribeRunComplete(request)
        async for answer in call:
            if answer.WhichOneof("event") == "run_complete":
                complete = convert.run_complete(answer.run_complete)
                events.append(complete)
                cursors[complete.run_id] = answer.cursor
                left.discard(complete.run_id)
            if not left:
                break
        call.cancel()
    return events, cursors


async def _in_batches(work: Iterable[Awaitable[None]]) -> None:
    rest = iter(work)
    while batch := list(islice(rest, AT_ONCE)):
        await asyncio.gather(*batch)
