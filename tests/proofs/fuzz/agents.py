"""A wild agent in a real server, over each store.

After each batch of runs: every run has ended, every list and subscription works, the transcript is
valid, and another tenant has noticed nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import structlog

from proofs.fuzz.tries import Broken, Tries
from proofs.fuzz.wild_agent import CALM, WildAgent
from runlane import Client, RunHandle, RunState, ToolCall, WhenBusy
from runlane.errors import RunlaneError
from runlane_server.config import Config
from runlane_server.core.limits import Limits
from runlane_server.core.model import Prompt
from runlane_server.engine.agent_code import contain_exits, contained
from runlane_server.testing import LocalServer
from support.postgres import fresh_database, own_postgres

SESSIONS, RUNS = 12, 4
"""Sessions of a batch, and runs of each."""

PATIENCE = 30.0
"""Seconds within which every call is answered and every run of a batch ends."""

CALM_SECONDS = 10.0
"""Seconds within which the other tenant gets its answer, on a machine as busy as this one."""

GRACE = 0.3

_CONFIG = replace(Config(drain_timeout=0.0), limits=Limits(cancel_grace=GRACE))


def search_agents(store: str, tries: Tries, seconds: float, seed: int) -> None:
    """Fuzzes a server over the store for `seconds`, and prints the figures."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with asyncio.Runner(loop_factory=contained(asyncio.SelectorEventLoop)) as runner:
        try:
            runner.run(_search(store, tries, seconds, seed))
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            tries.crashed(f"seed {seed}".encode(), error)


@asynccontextmanager
async def _store_url(kind: str) -> AsyncIterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        if kind == "postgresql":
            with own_postgres() as server:
                async with fresh_database(server.url) as url:
                    yield url
        else:
            yield "memory:" if kind == "memory" else f"sqlite:///{Path(folder) / 'fuzz.db'}"


async def _search(kind: str, tries: Tries, seconds: float, seed: int) -> None:
    loop = asyncio.get_running_loop()
    contain_exits(loop)
    loop.set_exception_handler(lambda *_: None)  # nobody retrieves what the agent's tasks raise
    agent = WildAgent()
    async with (
        _store_url(kind) as url,
        LocalServer(agent, store=url, config=_CONFIG) as server,
        server.client(timeout=PATIENCE) as client,
    ):
        batches = _Batches(server, client, Random(seed))  # noqa: S311 - a seed repeats it
        following = asyncio.create_task(batches.follow())
        began = time.monotonic()
        number = 0
        while time.monotonic() < began + seconds:
            started = time.perf_counter()
            await batches.play(f"{seed}-{number}")
            tries.slowest = max(tries.slowest, (time.perf_counter() - started) / SESSIONS / RUNS)
            tries.inputs = len(batches.ended)
            number += 1
            if following.done():
                raise Broken("the subscription ended") from following.exception()
        took = time.monotonic() - began
        following.cancel()
        states = ", ".join(f"{count:,} {state.name}" for state, count in batches.states.items())
        print(
            f"    {agent.events:,} events in {took:.0f} s, {agent.events / took:,.0f}/s; "
            f"{len(batches.ended):,} runs: {states}; "
            f"another tenant waited at most {batches.slowest_calm * 1e3:.0f} ms",
            flush=True,
        )


class _Batches:
    """Plays batches of runs and checks what became of them."""

    def __init__(self, server: LocalServer, client: Client, random: Random) -> None:
        self.ended: set[str] = set()
        self.states: Counter[RunState] = Counter()
        self.slowest_calm = 0.0
        self._coordinator = server.coordinator
        self._client = client
        self._random = random
        self._arrived = asyncio.Condition()

    async def follow(self) -> None:
        """Follows the ends of all runs, each of which comes once."""
        async for complete in self._client.subscribe_run_complete(from_beginning=True):
            if complete.run_id in self.ended:
                raise Broken(f"run {complete.run_id} ended twice")
            self.ended.add(complete.run_id)
            self.states[complete.state] += 1
            async with self._arrived:
                self._arrived.notify_all()

    async def play(self, name: str) -> None:
        """Plays a batch; raises Broken if anything is not as it must be."""
        sessions = [f"{name}-{n}" for n in range(SESSIONS)]
        calm = asyncio.create_task(self._calm())
        played = await asyncio.gather(*(self._play(session) for session in sessions))
        await calm
        handles = [handle for some in played for handle in some]
        async with asyncio.timeout(PATIENCE):
            async with self._arrived:
                await self._arrived.wait_for(lambda: self.ended >= {it.run_id for it in handles})
        for session in sessions:
            await self._check_session(session)
        await self._check_events(self._random.choice(handles))
        page = await self._client.list_sessions(page_size=50).page()
        if not page.items:
            raise Broken("no session is listed")

    async def _play(self, session: str) -> list[RunHandle]:
        """Accepts the runs of a session, and cancels some of them."""
        random, handles = self._random, []
        for n in range(RUNS):
            handles.append(
                await self._client.run_accepted(
                    session,
                    f"{session}-{n}",
                    allow_missing=True,
                    when_busy=random.choice((WhenBusy.QUEUE, WhenBusy.QUEUE, WhenBusy.FOLD)),
                    timeout=random.choice((None, None, None, 0.005, 2.0)),
                    max_attempts=random.choice((1, 1, 3)),
                )
            )
            if random.random() < 0.1:
                await self._client.cancel(run_id=random.choice(handles).run_id)
            if random.random() < 0.05:
                await self._client.cancel(session)
        return handles

    async def _calm(self) -> None:
        """Another tenant runs a prompt of its own."""
        began = time.monotonic()
        async with asyncio.timeout(CALM_SECONDS):
            complete = await self._coordinator.run("calm", Prompt(CALM), tenant="another")
        if complete.text != CALM:
            raise Broken(f"another tenant got {complete}")
        self.slowest_calm = max(self.slowest_calm, time.monotonic() - began)

    async def _check_session(self, session: str) -> None:
        runs = [run async for run in self._client.list_runs(session)]
        if len(runs) != RUNS or any(run.run_complete is None for run in runs):
            raise Broken(f"{session} has other runs: {runs}")
        if await self._coordinator.is_session_busy(session):
            raise Broken(f"{session} is busy although its runs have ended")
        async for message in self._client.list_messages(session):
            for part in message.parts:
                if isinstance(part, ToolCall) and not _is_object(part.arguments_json):
                    raise Broken(f"{session} has a call with {part.arguments_json[:80]!r}")

    async def _check_events(self, handle: RunHandle) -> None:
        try:
            indexes = [event.index async for event in self._client.subscribe_run(handle.run_id)]
        except RunlaneError as error:
            raise Broken(f"the events of {handle.run_id} cannot be read") from error
        if indexes != list(range(1, len(indexes) + 1)):
            raise Broken(f"the events of {handle.run_id} have a gap: {indexes}")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_constant=_refuse), dict)
    except ValueError:
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
