"""Prepared stores with a past: written once through the store API, and kept in the cache."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path

from bench import wire
from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.core import lane as rules
from runlane_server.core.model import (
    FinishReason,
    Prompt,
    Role,
    RunEvent,
    RunRequest,
    SessionKey,
    Text,
    TextDelta,
)
from runlane_server.core.transition import Lane, Outcome, Transition
from runlane_server.core.turn import DraftMessage
from runlane_server.store.sqlfiles import migrations
from runlane_server.store.sqlite.store import SqliteStore

PROMPT = Prompt(wire.PROMPT, ())
ANSWER = Outcome(
    FinishReason.STOP, content=(DraftMessage(Role.ASSISTANT, (Text(wire.PROMPT),)),), model="echo"
)
RESERVATION = "seed"

AT_ONCE = 1_000
"""Sessions written concurrently: as many as the store puts into one transaction."""


def accepted(lane: Lane, run: int) -> Transition:
    """A waiting run."""
    request = RunRequest(f"past-{lane.key.session_id}-{run}", PROMPT)
    reserved = rules.reserve(lane, RESERVATION, request.run_id).lane
    return rules.accept(
        reserved, request, at=_now(), token=RESERVATION, max_waiting=1, allow_missing=True
    )


def completed(lane: Lane, run: int) -> Transition:
    """A completed run of the echo agent."""
    waiting = accepted(lane, run)
    started = waiting.then(rules.dispatch(waiting.lane, at=_now()))
    active = started.lane.active
    assert active is not None
    events = active.events + 1
    delta = RunEvent(active.run_id, events, _now(), TextDelta(wire.PROMPT))
    said = started._replace(events=(*started.events, delta))
    return said.then(rules.finish(said.lane, active.run_id, 1, ANSWER, at=_now(), events=events))


async def store_of(
    cache: Path, what: Callable[[Lane, int], Transition], sessions: int, runs: int
) -> Path:
    """A store with `sessions` sessions of `runs` runs each; the cache keeps it."""
    schema = "".join(migration.sql for migration in migrations("sqlite"))
    digest = hashlib.sha256(schema.encode()).hexdigest()[:8]
    path = cache / "stores" / f"{what.__name__}-{sessions}x{runs}-{digest}.db"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {path.name} ...", file=sys.stderr)
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        await _fill(part, what, sessions, runs)
        part.rename(path)
        part.with_name(part.name + ".lock").unlink(missing_ok=True)
    return path


async def _fill(
    path: Path, what: Callable[[Lane, int], Transition], sessions: int, runs: int
) -> None:
    async with SqliteStore(path) as store:
        for first in range(0, sessions, AT_ONCE):
            names = [wire.name(n) for n in range(first, min(first + AT_ONCE, sessions))]
            await asyncio.gather(*(_session(store, name, what, runs) for name in names))


async def _session(
    store: SqliteStore, name: str, what: Callable[[Lane, int], Transition], runs: int
) -> None:
    """All runs of a session as one transition: the store allows it, and it is fast."""
    whole = Transition(Lane(SessionKey(DEFAULT_TENANT, name)))
    whole = reduce(lambda so_far, run: so_far.then(what(so_far.lane, run)), range(runs), whole)
    await store.commit(0, whole.at_version(1))


def _now() -> int:
    return time.time_ns() // 1000
