"""Servers that are killed while they remove a large session that was deleted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from runlane import Client, SessionBeingDeleted, SessionNotFound
from runlane.errors import RunDeleted, RunNotFound
from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.core import lane as rules
from runlane_server.core.model import CancelScope, RunKey, SessionKey
from runlane_server.core.transition import Transition
from runlane_server.store.open import StoreUrl, open_store
from support.server import run_to_exit, serving
from support.staging import SECONDS
from support.story import Story, request

RUNS = 8_000
AT_ONCE = 800

KILLS = 2


async def fill(store_url: str) -> None:
    """A session with many runs, which cancels have ended."""
    async with open_store(StoreUrl.parse(store_url)) as store:
        story = Story(store, "large", DEFAULT_TENANT)
        for first in range(0, RUNS, AT_ONCE):
            base = story.lane
            merged: Transition[object] = Transition(base)
            for n in range(first, first + AT_ONCE):
                merged = merged.then(story.accepting(request(f"r{n}")))
                story.lane = merged.lane
            merged = merged.then(rules.cancel(story.lane, CancelScope.SESSION, at=story.tick()))
            story.lane = base
            await story.commit(merged)


async def is_being_removed(store_url: str) -> bool:
    async with open_store(StoreUrl.parse(store_url)) as store:
        lane = await store.load_lane(SessionKey(DEFAULT_TENANT, "large"))
        return lane.is_being_removed


async def is_sound(folder: Path, store_url: str) -> bool:
    code, out, err = await asyncio.to_thread(run_to_exit, folder, "check", "--store", store_url)
    assert code == 0, out + err
    return True


@pytest.mark.stores("sqlite", "postgresql")
@pytest.mark.timeout(300)
async def test_r03_servers_that_are_killed_in_a_removal_leave_it_to_the_next(
    store_url: str, tmp_path: Path
) -> None:
    await fill(store_url)
    flags = ("--store", store_url)
    async with serving(tmp_path, *flags) as server, Client(server.address) as client:
        await client.delete_session("large")
        await server.kill()
    assert await is_being_removed(store_url)
    assert await is_sound(tmp_path, store_url)

    for _ in range(KILLS):
        async with serving(tmp_path, *flags) as server, Client(server.address) as client:
            with pytest.raises(SessionNotFound):
                await client.get_session("large")
            with pytest.raises(RunNotFound):
                await client.get_run(f"r{RUNS - 1}")
            with pytest.raises(RunDeleted):
                await client.run_accepted("large", "hello", run_id="r0", allow_missing=True)
            await server.kill()
        assert await is_sound(tmp_path, store_url)

    async with (
        serving(tmp_path, *flags) as server,
        asyncio.timeout(4 * SECONDS),
        Client(server.address) as client,
    ):
        while True:
            try:
                await client.create_session("large")
            except SessionBeingDeleted:
                await asyncio.sleep(0.05)  # removed by the clock of the server
            else:
                break
        with pytest.raises(RunDeleted):
            await client.run_accepted("large", "hello", run_id="r7")
        handle = await client.run_accepted("large", "hello", run_id="new")
        assert (await handle.completed()).text
    assert await is_sound(tmp_path, store_url)
    async with open_store(StoreUrl.parse(store_url)) as store:
        for n in range(RUNS):
            assert await store.get_deleted_run(RunKey(DEFAULT_TENANT, f"r{n}")) is not None
