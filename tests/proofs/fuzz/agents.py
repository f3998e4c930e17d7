"""A wild agent, or a chat agent at a wild endpoint, in a real server over each store.

After each batch of runs: every run has ended, every list and subscription works, the transcript is
valid, the next turn of each session works, and another tenant has noticed nothing. A failure comes
with what the slowest calls waited for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Protocol, TypeAlias

import structlog

from proofs.fuzz.stalls import Stalls
from proofs.fuzz.tries import Broken, Tries
from proofs.fuzz.wild_agent import CALM, wild_agent
from proofs.fuzz.wild_endpoint import wild_chat
from runlane import Client, RunError, RunHandle, RunState, ToolCall, WhenBusy
from runlane.errors import RunlaneError
from runlane_server.agents.base import Agent
from runlane_server.config import Config
from runlane_server.core.limits import Limits
from runlane_server.core.model import Prompt
from runlane_server.engine.agent_code import contain_exits, contained
from runlane_server.testing import LocalServer
from support.postgres import fresh_database, own_postgres

SESSIONS, RUNS = 12, 4
"""Sessions of a batch, and wild runs of each; a calm one follows them."""

PATIENCE = 30.0
"""Seconds within which every call is answered, and the next run of a batch ends."""

CALM_SECONDS = 10.0
"""Seconds within which the other tenant gets its answer, on a machine as busy as this one."""

GRACE = 0.3

_CONFIG = replace(Config(drain_timeout=0.0), limits=Limits(cancel_grace=GRACE))


class Wild(Protocol):
    """The source of the harm: the agent itself, or its endpoint."""

    events: int
    """How many events it has yielded or sent."""

    invalid: list[str]
    """The things that it got and should not get."""

    def is_own_fault(self, error: RunError) -> bool:
        """Whether a run with the reason AGENT_ERROR may fail like this."""


OpenAgent: TypeAlias = Callable[[], AbstractAsyncContextManager[tuple[Agent, Wild]]]

WILD: dict[str, OpenAgent] = {"agent": wild_agent, "chat": wild_chat}


def search_agents(kind: str, store: str, tries: Tries, seconds: float, seed: int) -> None:
    """Fuzzes a server with an agent of `WILD` for `seconds`, and prints the figures."""
    stalls = Stalls()
    structlog.configure(
        processors=[stalls.keep_line],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    )
    with (
        warnings.catch_warnings(action="ignore"),  # pydantic-ai warns of values it cannot use
        asyncio.Runner(loop_factory=contained(asyncio.SelectorEventLoop)) as runner,
    ):
        try:
            runner.run(_search(_serving(kind, store), tries, seconds, seed, stalls))
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            error.add_note(stalls.report())
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


@asynccontextmanager
async def _serving(kind: str, store: str) -> AsyncIterator[tuple[LocalServer, Wild]]:
    async with (
        _store_url(store) as url,
        WILD[kind]() as (agent, wild),
        LocalServer(agent, store=url, config=_CONFIG) as server,
    ):
        yield server, wild


async def _search(
    serving: AbstractAsyncContextManager[tuple[LocalServer, Wild]],
    tries: Tries,
    seconds: float,
    seed: int,
    stalls: Stalls,
) -> None:
    loop = asyncio.get_running_loop()
    contain_exits(loop)
    loop.set_exception_handler(lambda *_: None)  # nobody retrieves what the agent's tasks raise
    async with serving as (server, wild), server.client(timeout=PATIENCE) as client:
        batches = _Batches(server, client, wild, Random(seed), stalls)  # noqa: S311 - a seed repeats it
        following = asyncio.create_task(batches.follow())
        began = time.monotonic()
        number = 0
        while time.monotonic() < began + seconds:
            started = time.perf_counter()
            try:
                await batches.play(f"{seed}-{number}")
            except TimeoutError:
                if following.done():  # then nobody noticed the ends
                    following.result()
                raise
            tries.slowest = max(
                tries.slowest, (time.perf_counter() - started) / SESSIONS / (RUNS + 1)
            )
            tries.inputs = len(batches.ended)
            number += 1
            if following.done():
                raise Broken("the subscription ended") from following.exception()
            if wild.invalid:
                raise Broken(f"the endpoint got an invalid request: {wild.invalid[0]}")
        took = time.monotonic() - began
        following.cancel()
        stalls.save(tries.folder / f"{tries.name}-slow.txt")
        states = ", ".join(f"{count:,} {state.name}" for state, count in batches.states.items())
        print(
            f"    {wild.events:,} events in {took:.0f} s, {wild.events / took:,.0f}/s; "
            f"{len(batches.ended):,} runs: {states}; "
            f"another tenant waited at most {stalls.slowest['calm run'] * 1e3:.0f} ms",
            flush=True,
        )


class _Batches:
    """Plays batches of runs and checks what became of them."""

    def __init__(
        self, server: LocalServer, client: Client, wild: Wild, random: Random, stalls: Stalls
    ) -> None:
        self.ended: set[str] = set()
        self.states: Counter[RunState] = Counter()
        self._coordinator = server.coordinator
        self._client = client
        self._wild = wild
        self._random = random
        self._stalls = stalls
        self._arrived = asyncio.Condition()

    async def follow(self) -> None:
        """Follows the ends of all runs, each of which comes once."""
        async for complete in self._client.subscribe_run_complete(from_beginning=True):
            if complete.run_id in self.ended:
                raise Broken(f"run {complete.run_id} ended twice")
            self.ended.add(complete.run_id)
            self.states[complete.state] += 1
            error = complete.error
            if error and error.reason == "AGENT_ERROR" and not self._wild.is_own_fault(error):
                raise Broken(f"{complete.run_id} failed by an unexpected {error.message[:200]}")
            async with self._arrived:
                self._arrived.notify_all()

    async def play(self, name: str) -> None:
        """Plays a batch; raises Broken if anything is not as it must be."""
        sessions = [f"{name}-{n}" for n in range(SESSIONS)]
        calm = asyncio.create_task(self._calm(name))
        played = await asyncio.gather(*(self._play(session) for session in sessions))
        await calm
        handles = [handle for some in played for handle in some]
        with self._stalls.call("end of a batch", PATIENCE / 2):
            await self._await_ends({handle.run_id for handle in handles})
        await asyncio.gather(*(self._check_next_turn(session) for session in sessions))
        for session in sessions:
            with self._stalls.call("check of a session"):
                await self._check_session(session)
        await self._check_events(self._random.choice(handles))
        page = await self._client.list_sessions(page_size=50).page()
        if not page.items:
            raise Broken("no session is listed")

    async def _await_ends(self, run_ids: set[str]) -> None:
        """Waits for the ends of runs, as long as others end: on a busy machine a batch of large
        answers takes longer than any one of its runs may."""
        async with self._arrived:
            while left := len(run_ids - self.ended):
                async with asyncio.timeout(PATIENCE):
                    await self._arrived.wait_for(lambda left=left: len(run_ids - self.ended) < left)  # type: ignore[misc]

    async def _play(self, session: str) -> list[RunHandle]:
        """Accepts the runs of a session, and cancels some of them."""
        random, handles = self._random, []
        for n in range(RUNS):
            with self._stalls.call("RunAccepted"):
                handle = await self._client.run_accepted(
                    session,
                    f"{session}-{n}",
                    allow_missing=True,
                    when_busy=random.choice((WhenBusy.QUEUE, WhenBusy.QUEUE, WhenBusy.FOLD)),
                    timeout=random.choice((None, None, None, 0.005, 2.0)),
                    max_attempts=random.choice((1, 1, 3)),
                )
            handles.append(handle)
            with self._stalls.call("Cancel"):
                if random.random() < 0.1:
                    await self._client.cancel(run_id=random.choice(handles).run_id)
                if random.random() < 0.05:
                    await self._client.cancel(session)
        return handles

    async def _calm(self, name: str) -> None:
        """Another tenant runs a prompt of its own."""
        with self._stalls.call("calm run"):
            async with asyncio.timeout(CALM_SECONDS):
                complete = await self._coordinator.run(name, Prompt(CALM), tenant="another")
        if complete.text != CALM:
            raise Broken(f"another tenant got {complete}")

    async def _check_next_turn(self, session: str) -> None:
        """A calm run of the session completes after any turns before it."""
        with self._stalls.call("next turn"):
            complete = await (await self._client.run_accepted(session, CALM)).completed()
        if complete.text != CALM:
            raise Broken(f"the next turn of {session} got {complete.error or complete}")

    async def _check_session(self, session: str) -> None:
        runs = [run async for run in self._client.list_runs(session)]
        if len(runs) != RUNS + 1 or any(run.run_complete is None for run in runs):
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
