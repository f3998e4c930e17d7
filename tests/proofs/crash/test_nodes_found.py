"""Defects that rounds of several nodes found, other than in ordering, reproduced step by step."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from proofs.crash.network import reached_at, target_of
from proofs.crash.proxy import Proxy
from runlane_server.core.model import SessionKey
from support.staging import SECONDS

pytest.importorskip("asyncpg", reason="asyncpg is not installed")

from support.postgres import postgres_store


async def test_r09_a_cancelled_agent_does_not_wait_for_an_unreachable_database(
    postgres_url: str,
) -> None:
    """Otherwise an agent that reads the transcript would outlive the lease of its node."""
    key = SessionKey("default", "s")
    async with Proxy() as proxy:
        proxy.target = target_of(postgres_url)
        async with postgres_store(reached_at(postgres_url, "127.0.0.1", proxy.port)) as store:
            await store.load_lane(key)
            proxy.cut(reset=False)
            reading = asyncio.create_task(store.load_lane(key))
            await proxy.holding.wait()
            reading.cancel()
            with suppress(asyncio.CancelledError):
                async with asyncio.timeout(SECONDS / 10):
                    await reading
            assert reading.cancelled()
            proxy.mend()
            assert (await store.load_lane(key)).active is None
