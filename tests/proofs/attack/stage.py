"""A server with a noisy and a quiet tenant, and an attack on it."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

from proofs.attack.neighbour import Noticed, live
from runlane import Client
from runlane_server.access import editing
from runlane_server.access.caller import Role
from support.processes import resident_bytes
from support.server import ServerProcess, clean_environment, serving

ATTACK_SECONDS = 5.0

LONG_LOG = 100_000
"""Number of events of the noisy tenant that a long log has."""

QUOTAS = """
[tenants.noisy]
max_active_runs = 2
max_waiting_runs = 50
max_streams = 500
"""

PROGRAM = """
import os, sys
match sys.stdin.readline().strip():
    case "endless":
        while True:
            os.write(1, b"a" * 65536)
    case "much":
        os.write(1, b"a line of some length\\n" * 100_000)
    case "silent":
        sys.stdin.read()
        os.read(os.pipe()[0], 1)
    case "deep":
        for _ in range(3000):
            os.mkdir("d")
            os.chdir("d")
    case _:
        print("fine")
"""


@dataclass(frozen=True)
class Stage:
    """A server, its size in bytes at the start, and the tokens of its tenants."""

    server: ServerProcess
    size: int
    noisy: str
    reader: str
    quiet: str


@dataclass(frozen=True)
class Figures:
    """The cost of an attack: bytes that the server holds, and what the quiet tenant noticed.

    `control` is what the same tenant noticed at the same time at a server that is not attacked: the
    attacker and other work take time of the machine too.
    """

    attack: str
    held: int
    noticed: Noticed
    control: Noticed

    @property
    def delay(self) -> float:
        """The worst latency of any call of the quiet tenant beyond that of the control, in s."""
        return max(self.noticed.worst.values()) - max(self.control.worst.values())

    def __str__(self) -> str:
        return (
            f"{self.attack}: server +{self.held / 1e6:.0f} MB; quiet tenant: {self.noticed}; "
            f"control: {self.control}"
        )


@asynccontextmanager
async def staged(folder: Path, *flags: str, long_log: bool = False) -> AsyncIterator[Stage]:
    """Starts the server."""
    access, program = folder / "access.toml", folder / "program.py"
    (folder / "programs").mkdir()
    tokens = [
        editing.add(access, name, tenant=tenant, role=role)
        for name, tenant, role in (
            ("noisy", "noisy", Role.RUN),
            ("reader", "noisy", Role.READ),
            ("quiet", "quiet", Role.RUN),
        )
    ]
    access.write_text(access.read_text() + QUOTAS)
    program.write_text(PROGRAM)
    flags = (
        *("--access", str(access), "--store", f"sqlite:///{folder}/runlane.db"),
        *("--agent", f"command:{sys.executable} -S {program}"),
        # What a program leaves behind must not meet other servers of this machine.
        *("--command-dir", str(folder / "programs"), *flags),
    )
    async with (
        _emptied(folder / "programs"),
        serving(folder, *flags, base=clean_environment()) as server,
    ):
        if long_log:
            await _play_one(server.address, tokens[0])
            await server.stop()
            _lengthen_log(folder / "runlane.db")
            await server.start()
        await _play_one(server.address, tokens[2])
        yield Stage(server, resident_bytes(server.pid), *tokens)


async def attacked(stage: Stage, control: Stage, attack: str) -> Figures:
    """Makes an attack, and lives next to it, and at a server that is not attacked."""
    peak = [stage.size]
    attacking = asyncio.create_task(_attack(stage, attack, peak))
    noticed, compared = await asyncio.gather(
        *(live(each.server.address, each.quiet, attacking) for each in (stage, control))
    )
    await attacking
    return Figures(attack, max(peak) - stage.size, noticed, compared)


@asynccontextmanager
async def _emptied(folder: Path) -> AsyncIterator[None]:
    """Removes a folder at the end, however deep it is; the recursion of Python could not."""
    try:
        yield
    finally:
        removing = await asyncio.create_subprocess_exec("rm", "-rf", str(folder))
        await removing.wait()


async def _attack(stage: Stage, attack: str, peak: list[int]) -> None:
    """Runs the attacker in a process of its own, which takes no time from the quiet tenant."""
    module = (sys.executable, "-m", "proofs.attack.attacks")
    attacker = await asyncio.create_subprocess_exec(
        *(*module, attack, stage.server.address, stage.noisy, stage.reader, str(ATTACK_SECONDS)),
        env=clean_environment(),
    )
    ended = asyncio.create_task(attacker.wait())
    try:
        while not ended.done():
            peak.append(resident_bytes(stage.server.pid))
            await asyncio.wait([ended], timeout=0.1)
        assert await ended == 0, "the attacker failed"
    finally:
        if attacker.returncode is None:
            attacker.kill()
            await ended


async def _play_one(address: str, token: str) -> None:
    async with Client(address, token=token) as client:
        handle = await client.run_accepted("first", "hello\n", allow_missing=True)
        await handle.completed(30)


def _lengthen_log(path: Path) -> None:
    """Repeats the only event of a log."""
    with closing(sqlite3.connect(path)) as db:
        db.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "INSERT INTO events (position, tenant, session_id, run_id, ended_at, body, log_bytes) "
            "SELECT position + i, tenant, session_id, run_id || i, ended_at, body, log_bytes * "
            "(i + 1) FROM events, n",
            (LONG_LOG,),
        )
        db.commit()
