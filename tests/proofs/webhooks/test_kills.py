"""Kills a server that delivers to a webhook, at random: nothing is lost, and the order holds (R55).

`make webhooks` kills it 200 times; here it is a few. The endpoint refuses some deliveries, so that
sessions are held while the server dies.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest

from runlane import Client, RunlaneError
from support.endpoint import Delivery, Endpoint, endpoint
from support.server import ServerProcess

KILLS = int(os.environ.get("RUNLANE_KILLS", "5"))
SESSIONS = 12
ALLOWED = ("--webhook-allow-network", "127.0.0.0/8")

pytestmark = pytest.mark.timeout(120 + 10 * KILLS)


async def load(client: Client, chosen: random.Random, stop: asyncio.Event) -> None:
    """Accepts runs, and cancels some, until the server is killed."""
    while not stop.is_set():
        session = f"s{chosen.randrange(SESSIONS)}"
        with suppress(RunlaneError):
            await client.run_accepted(session, "x", allow_missing=True)
            if chosen.random() < 0.1:
                await client.cancel(session)
        await asyncio.sleep(0.002)


async def one_life(server: ServerProcess, chosen: random.Random) -> None:
    """Starts the server, works for a random time, and kills it."""
    await server.start()
    stop = asyncio.Event()
    async with Client(server.address, timeout=0.5) as client:
        working = [asyncio.create_task(load(client, chosen, stop)) for _ in range(3)]
        await asyncio.sleep(chosen.uniform(0.05, 1.2))
        await server.kill()
        stop.set()
        await asyncio.gather(*working)


async def ends_of(client: Client) -> dict[str, list[str]]:
    """The runs of each session in the order of the event log, when all have ended."""
    async for run in client.list_runs():
        await client.wait_run(run.run_id)
    found: dict[str, list[str]] = defaultdict(list)
    last = [session async for session in client.list_sessions()]
    missing = sum([1 async for _ in client.list_runs()])
    async with client.subscribe_run_complete(from_beginning=True) as subscription:
        while missing:
            complete = await anext(subscription)
            found[complete.session_id].append(complete.run_id)
            missing -= 1
    assert len(found) == len(last)
    return found


def firsts(served: Endpoint) -> dict[str, list[str]]:
    """The runs of each session in the order of their first delivery."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for delivery in served.accepted:
        found[delivery.data["sessionId"]][delivery.data["runId"]] = None
    return {session: list(runs) for session, runs in found.items()}


async def test_r55_kills_lose_no_event_and_keep_the_order(tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    chosen = random.Random(seed)  # noqa: S311 - a test
    refuses = True

    def status(_: Delivery) -> int:
        return 503 if refuses and chosen.random() < 0.01 else 200

    server = ServerProcess(tmp_path, *ALLOWED)
    async with endpoint(answer=status) as served:
        try:
            await server.start()
            async with Client(server.address) as client:
                created = await client.create_webhook(served.url)
            await server.kill()
            for _ in range(KILLS):
                await one_life(server, chosen)
            refuses = False
            await server.start()
            async with Client(server.address) as client:
                expected = await ends_of(client)
                total = sum(map(len, expected.values()))
                await served.until(
                    lambda: sum(map(len, firsts(served).values())) >= total, seconds=100
                )
                health = (await client.get_webhook(created.webhook.webhook_id)).health
        finally:
            await server.kill()
    assert firsts(served) == expected, f"seed {seed}"
    assert health.given_up == 0
    for delivery in served.accepted[-100:]:  # the verifier refuses those that are 5 minutes old
        delivery.verify(created.secret)
    print(
        f"{KILLS} kills, {total} events, {len(served.accepted)} accepted and"
        f" {len(served.attempts) - len(served.accepted)} refused deliveries, seed {seed}"
    )
