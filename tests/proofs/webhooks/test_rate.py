"""Deliveries a second to a fast endpoint, while another one answers slowly."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from runlane import Client
from support.endpoint import endpoint
from support.server import ServerProcess

EVENTS = 4_000
SESSIONS = 200
WANTED = 500
"""Deliveries a second on two cores, which the endpoint and this test share."""


async def test_r55_a_slow_endpoint_holds_up_no_other(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--webhook-allow-network", "127.0.0.0/8")
    async with endpoint() as fast, endpoint() as slow:
        try:
            await server.start()
            async with Client(server.address) as client:
                webhook = (await client.create_webhook(fast.url, enabled=False)).webhook
                slow.gate.clear()
                await client.create_webhook(slow.url)
                await _play(client)
                await slow.until(lambda: slow.in_flight > 0)
                began = time.monotonic()
                await client.update_webhook(webhook.webhook_id, enabled=True)
                await fast.until(lambda: len(fast.accepted) >= EVENTS, seconds=100)
                took = time.monotonic() - began
                waiting = slow.in_flight
        finally:
            await server.kill()
            slow.gate.set()
    rate = EVENTS / took
    print(f"{rate:.0f} deliveries/s to the fast endpoint, {waiting} wait at the slow one")
    assert len(fast.run_ids()) == EVENTS
    assert 0 < waiting <= 16
    assert rate > WANTED / 5, "far too slow, on any machine"


async def _play(client: Client) -> None:
    """Runs that end before the fast endpoint is looked at."""

    async def some(first: int) -> None:
        for n in range(first, EVENTS, 16):
            handle = await client.run_accepted(f"s{n % SESSIONS}", "x", allow_missing=True)
            await handle.completed()

    await asyncio.gather(*(some(n) for n in range(16)))
