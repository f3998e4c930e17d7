"""Batches of writes and reads: what may share one, and how long to wait for more of it.

A commit costs the event loop about the same for one unit as for fifty: hops between threads,
statements, and the kernel's work for a synced write. The same is true of a hop of the reader. While
the loop has time to spare, nothing waits. When it has none, many small batches would share the
load, unless each waits a little for more units; the callers, who queue for the loop anyway, are
then served sooner.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from runlane_server.core.model import SessionKey
from runlane_server.core.transition import Transition
from runlane_server.store.fair_queue import FairQueue

Made = TypeVar("Made")
Future: TypeAlias = "asyncio.Future[Any]"

MAX_DELAY = 0.020
"""The longest delay of a writer, in seconds; a reader waits a quarter of it."""

SAMPLE = 0.05
"""Seconds over which the busy share of the event loop is measured."""

IDLE, BUSY = 0.40, 0.75
"""Busy shares of the loop. Up to the first there is no delay; from the second it is longest."""

ALONE, MANY = 1.25, 4.0
"""The same bounds for the average units of a batch: waiting is useless if no others come."""

GROWING, SHRINKING = 8, 2
"""The number of batches over which their average length is smoothed while it grows, and while it
shrinks: a caller alone after a burst must not wait for units that no longer come."""

SILENCE = 0.25
"""Seconds without a batch after which the average is outdated."""

LARGE_PARTS = 8
"""The parts of a turn that are encoded at once; each has up to 1 MiB."""

MAX_UNITS = 1_000
"""The most units in one transaction: bounds its duration, and with it the wait of every caller."""

MAX_APPENDED = 1 << 20
"""The most output of agents in one transaction, in characters or bytes as the store counts: a
cancel waits for the transaction in progress."""


MAX_APPENDED_BESIDE = 1 << 18
"""The same for a transaction that a caller waits for."""


class Pacer:
    """Decides how long a writer or a reader waits for more units. Use it on one thread only."""

    def __init__(
        self,
        longest: float = MAX_DELAY,
        *,
        clock: Callable[[], float] = time.perf_counter,
        worked: Callable[[], float] = time.thread_time,
    ) -> None:
        self._longest = longest
        self._clock = clock
        self._work = worked
        self._since = self._last = clock()
        self._worked = worked()
        self._busy_share = 0.0
        self._average_units = 1.0

    def delay(self) -> float:
        """Seconds to wait before the next batch; 0 unless waiting saves time."""
        if self._clock() - self._last > SILENCE:
            self._average_units = 1.0
        company = position_between(self._average_units, ALONE, MANY)
        if not company:
            return 0.0
        return self._longest * company * position_between(self._busy_share, IDLE, BUSY)

    def record(self, units: int) -> None:
        """Takes the length of a finished batch into account."""
        smoothing = GROWING if units > self._average_units else SHRINKING
        self._average_units += (units - self._average_units) / smoothing
        now = self._last = self._clock()
        if now - self._since >= SAMPLE:
            worked = self._work()
            self._busy_share = (worked - self._worked) / (now - self._since)
            self._since, self._worked = now, worked


def position_between(value: float, low: float, high: float) -> float:
    """The position of a value between two others: from 0 to 1."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


async def encoded(
    encode: Callable[[int, Transition[object], Future], Made],
    base_version: int,
    transition: Transition[object],
    future: Future,
) -> Made:
    """The unit of a transition. That of a long turn is encoded in a thread, as the event loop would
    be held for it."""
    parts = 0
    for message in transition.messages:
        parts += len(message.parts)
    if parts > LARGE_PARTS:
        return await asyncio.to_thread(encode, base_version, transition, future)
    return encode(base_version, transition, future)


class WriteUnit(Protocol):
    """The rows that a writer writes together or not at all."""

    @property
    def tenant(self) -> str:
        """The tenant of all that it writes."""

    @property
    def lane(self) -> SessionKey | None:
        """The lane that it changes."""

    @property
    def changed(self) -> Collection[str]:
        """The ids of the runs that it changes in that lane."""

    @property
    def appended(self) -> str | None:
        """The id of the run that it only appends events to."""

    @property
    def size(self) -> int:
        """The approximate size of its texts."""


Unit = TypeVar("Unit", bound=WriteUnit)


class Batch(Generic[Unit]):
    """Units that may be written table by table without a change of their meaning.

    A batch changes each lane and each run at most once, and appends nothing to a run after it has
    changed that run.
    """

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self._lanes: set[SessionKey] = set()
        self._changed: set[tuple[str, str]] = set()

    def has_room_for(self, unit: Unit) -> bool:
        """Whether the batch may take the unit."""
        if len(self.units) >= MAX_UNITS or unit.lane in self._lanes:
            return False
        if not self._changed:
            return True
        tenant, changed = unit.tenant, self._changed
        return (tenant, unit.appended) not in changed and not any(
            (tenant, run_id) in changed for run_id in unit.changed
        )

    def add(self, unit: Unit) -> None:
        """Takes a unit for which it has room."""
        self.units.append(unit)
        if unit.lane is not None:
            self._lanes.add(unit.lane)
        for run_id in unit.changed:
            self._changed.add((unit.tenant, run_id))


class WriteQueue(Generic[Unit]):
    """Units that wait for a transaction, each of which takes the oldest.

    All others go before the output of agents: callers wait for them, and agents may write as fast
    as they can. The changes of a run and its output keep their order: a change takes the older
    output along. Each transaction takes some output, so that it progresses; its tenants take turns.
    """

    def __init__(self, max_size: int) -> None:
        """`max_size` bounds the other units of a transaction, unless it has only one of them."""
        self._max_size = max_size
        # Each with the output that it takes along.
        self._others: deque[tuple[list[Unit], Unit]] = deque()
        self._changed: Counter[tuple[str, str]] = Counter()
        self._output: FairQueue[Unit] = FairQueue()
        # Units that a change takes along stay in `_output` until they are reached there.
        self._output_of: dict[tuple[str, str], deque[Unit]] = {}

    def __bool__(self) -> bool:
        return bool(self._others or self._output_of)

    def __iter__(self) -> Iterator[Unit]:
        for older, unit in self._others:
            yield from older
            yield unit
        for units in self._output_of.values():
            yield from units

    def add(self, unit: Unit, older: Collection[Unit] = ()) -> None:
        """Adds a unit, with older output of its runs that it takes along from elsewhere."""
        if unit.appended is not None:
            self._output.add(unit.tenant, unit)
            self._output_of.setdefault((unit.tenant, unit.appended), deque()).append(unit)
            return
        own = self.take_output_of(unit)
        self._changed.update((unit.tenant, run_id) for run_id in unit.changed)
        self._others.append(([*older, *own], unit))

    def take_output_of(self, unit: Unit) -> list[Unit]:
        """Removes the output of the runs that a unit changes."""
        runs = [(unit.tenant, run_id) for run_id in unit.changed]
        return [it for run in runs for it in self._output_of.pop(run, ())]

    def take(self) -> list[Unit]:
        """Removes the units of the next transaction."""
        batch = Batch[Unit]()
        self._take_others(batch)
        self._take_output(batch)
        return batch.units

    def clear(self) -> None:
        """Removes all units."""
        self._others.clear()
        self._changed.clear()
        self._output, self._output_of = FairQueue(), {}

    def _take_others(self, batch: Batch[Unit]) -> None:
        size = 0
        # One less, so that output progresses.
        while self._others and len(batch.units) < MAX_UNITS - 1:
            older, unit = self._others[0]
            size += unit.size + sum([it.size for it in older])
            if (batch.units and size > self._max_size) or not batch.has_room_for(unit):
                return
            self._others.popleft()
            for it in (*older, unit):
                batch.add(it)
            for run_id in unit.changed:
                self._changed[unit.tenant, run_id] -= 1
                if not self._changed[unit.tenant, run_id]:
                    del self._changed[unit.tenant, run_id]

    def _take_output(self, batch: Batch[Unit]) -> None:
        size = 0
        most = MAX_APPENDED_BESIDE if batch.units else MAX_APPENDED
        while self._output:
            unit = self._output.first
            run = (unit.tenant, unit.appended or "")
            own = self._output_of.get(run)
            if not own or own[0] is not unit:
                self._output.take()  # a change takes it along
                continue
            is_first, size = not size, size + unit.size
            if size > most and not is_first:
                return
            if run in self._changed or not batch.has_room_for(unit):
                return
            batch.add(self._output.take())
            own.popleft()
            if not own:
                del self._output_of[run]
