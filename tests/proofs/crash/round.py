"""One round: load, a server that is killed during the load, and a check of the result."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from proofs.crash.actor import Actor
from proofs.crash.checker import Violation, check
from proofs.crash.disk import Disk
from proofs.crash.observer import ask_for_everything, end_everything
from proofs.crash.report import RoundReport
from proofs.crash.server import CrashServer
from proofs.crash.shared import SharedState

ACTORS = 6
SESSIONS = 5
PATIENCE = 30.0
"""Seconds after which an expected end counts as stuck."""


class End(StrEnum):
    """A way in which a server ends."""

    KILL = "kill"
    DRAIN = "drain"
    KILL_IN_DRAIN = "kill in drain"
    TWO_KILLS = "two kills"
    KILL_AT_START = "kill at start"
    SYNC_FAILS = "sync fails"
    DISK_FULL = "disk full"


FAULTS = {End.SYNC_FAILS: "fail_syncs", End.DISK_FULL: "fail_writes"}
"""The ends that need the simulated disk."""

STORE_FAILED = "store no longer writable"
ENDS = (*[End.KILL] * 6, End.DRAIN, End.KILL_IN_DRAIN, End.TWO_KILLS, End.KILL_AT_START)


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan that a seed stands for. Instants count the messages sent and received."""

    seed: str
    agent: str
    ends: tuple[tuple[End, int], ...]
    last: int
    lines: int

    @classmethod
    def draw(cls, seed: str) -> Plan:
        """Draws a plan."""
        rng = random.Random(seed)  # noqa: S311 - it is to repeat itself
        ends: list[tuple[End, int]] = []
        instant = 0
        for _ in range(rng.choice((1, 1, 1, 2))):
            end = rng.choice(ENDS)
            instant += rng.randint(40, 500)
            ends.append((end, instant))
            if end is End.TWO_KILLS:
                instant += rng.randint(0, 20)
                ends.append((End.KILL, instant))
        agent = rng.choice(("scripted", "scripted", "scripted", "echo:delay=2ms"))
        return cls(seed, agent, tuple(ends), instant + 100, rng.randint(1, 3))


@dataclass(slots=True)
class Report(RoundReport):
    """The result of a round."""

    plan: Plan
    kills: int = 0
    drains: int = 0

    def figures(self) -> dict[str, int]:
        """The round in numbers."""
        return {"kills": self.kills, "drains": self.drains, **self.load_figures()}


async def play(
    seed: str,
    folder: Path,
    disk: Disk | None = None,
    ends: tuple[tuple[End, int], ...] = (),
) -> Report:
    """Plays the round of a seed in an empty folder. Ends all processes that it starts.

    With a simulated disk each kill is a power cut. `ends` replaces the random ends.
    """
    plan = Plan.draw(seed)
    if ends:
        plan = replace(plan, ends=ends, last=ends[-1][1] + 100)
    report = Report(plan)
    server = CrashServer(folder, plan.agent, disk)
    rng = random.Random(f"{seed} load")  # noqa: S311 - it is to repeat itself
    shared = SharedState(rng, tuple(f"s{n}" for n in range(SESSIONS)), history=report.history)
    tasks: list[asyncio.Task[None]] = []
    try:
        await server.start()
        shared.address = server.address
        shared.up.set()
        scripted = plan.agent == "scripted"
        actors = [Actor(shared, f"c{n}", scripted=scripted) for n in range(ACTORS)]
        tasks += [asyncio.create_task(actor.work()) for actor in actors]
        for end, instant in plan.ends:
            await _unless_failed(tasks, shared.reached(instant))
            await _end(server, end, shared, report)
        await _unless_failed(tasks, shared.reached(plan.last))
        shared.over.set()
        await bounded("the clients", asyncio.gather(*tasks), report.violations)
        await bounded("the runs", end_everything(shared), report.violations)
        await bounded("subscribers", asyncio.gather(*shared.listening), report.violations)
        await bounded("the observer", ask_for_everything(shared), report.violations)
    finally:
        await server.kill()
        for task in (*tasks, *shared.listening):
            task.cancel()
        await asyncio.gather(*tasks, *shared.listening, return_exceptions=True)
    report.violations += check(shared.history)
    errors = [line for line in server.log.splitlines() if '"level": "error"' in line]
    report.violations += [Violation("log", line) for line in errors if STORE_FAILED not in line]
    if sum(STORE_FAILED in line for line in errors) != sum(end in FAULTS for end, _ in plan.ends):
        report.violations.append(
            Violation("log", "the log does not report the store failure exactly once")
        )
    return report


async def _end(server: CrashServer, end: End, shared: SharedState, report: Report) -> None:
    """Ends the server, and starts it again."""
    if end in {End.DRAIN, End.KILL_IN_DRAIN}:
        report.drains += 1
        draining = asyncio.create_task(server.drain())
        if end is End.KILL_IN_DRAIN:
            await shared.reached(shared.now + shared.rng.randint(1, 15))
            await server.kill()
        code = await draining
        shared.up.clear()
        report.kills += end is End.KILL_IN_DRAIN
        if end is End.DRAIN and code:
            report.violations.append(Violation("exit", f"the server exited with {code}"))
    elif end in FAULTS:
        code = await server.fail(**{FAULTS[end]: shared.rng.randint(0, 3)})
        shared.up.clear()
        if code != 1:
            report.violations.append(Violation("exit", f"the server exited with {code}"))
        if shared.rng.random() < 0.5:
            await server.kill()
    else:
        shared.up.clear()
        await server.kill()
        report.kills += 1
    if end is End.KILL_AT_START:
        await server.start_and_kill(report.plan.lines)
        report.kills += 1
    await server.start()
    shared.up.set()


async def _unless_failed(tasks: list[asyncio.Task[None]], wait: Awaitable[None]) -> None:
    """Waits, but raises at once if a client fails."""
    waiting = asyncio.ensure_future(wait)
    async with asyncio.timeout(PATIENCE):
        await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            waiting.cancel()
            task.result()
            raise RuntimeError("a client left early")


async def bounded(
    what: str, work: Awaitable[object], violations: list[Violation], patience: float = PATIENCE
) -> None:
    """Awaits something that has to end; otherwise that is a violation."""
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            await work
            return
    violations.append(Violation("stuck", f"{what} did not come to an end"))
