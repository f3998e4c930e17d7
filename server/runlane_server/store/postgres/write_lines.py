"""The order of units that are written over two connections at a time.

Writes of a lane or a run keep the order in which they came, so that nothing is appended
to a run after its end, and no output of it is lost to its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Generic, Protocol, TypeAlias, TypeVar

from runlane_server.core.model import RunKey, SessionKey
from runlane_server.store.batching import WriteQueue, WriteUnit


class LoggedUnit(WriteUnit, Protocol):
    """A unit that may have entries of the event log."""

    @property
    def is_logged(self) -> bool:
        """Whether it has entries of the event log."""


Unit = TypeVar("Unit", bound=LoggedUnit)

_Counts: TypeAlias = "Counter[tuple[type, str, str]]"


class WriteLine(Generic[Unit]):
    """Units that one connection writes, and the lanes and runs of those that are not written."""

    def __init__(self, name: str, max_size: int) -> None:
        self.name = name
        self.queue: WriteQueue[Unit] = WriteQueue(max_size)
        self._concerned: _Counts = Counter()
        self._units = 0

    def __len__(self) -> int:
        """The number of units that are not written."""
        return self._units

    def add(self, unit: Unit, older: list[Unit]) -> None:
        """Adds a unit, and the older output that it takes along."""
        self._units += 1 + len(older)
        for it in (*older, unit):
            self._concerned.update(_concerns(it))
        self.queue.add(unit, older)

    def forget(self, units: Iterable[Unit]) -> None:
        """Removes units that were written, or left the line."""
        for unit in units:
            self._units -= 1
            for what in _concerns(unit):
                self._concerned[what] -= 1
                if not self._concerned[what]:
                    del self._concerned[what]

    def concerns(self, unit: Unit) -> bool:
        """Whether a unit of the line is of the same lane or run, and not written."""
        return any(what in self._concerned for what in _concerns(unit))


class WriteLines(Generic[Unit]):
    """Several lines: the last one, `log`, has the units with entries of the event log, the others
    have the rest.

    A unit follows those of its lane and its runs into their line, or waits for them there. So a
    line waits only for lines before it, and none waits for the log.
    """

    def __init__(self, others: int, max_size: int) -> None:
        """`others`: the number of lines besides the log. `max_size`: see `WriteQueue`."""
        self.others = tuple(WriteLine[Unit](f"{n}", max_size) for n in range(1, others + 1))
        self.log: WriteLine[Unit] = WriteLine("log", max_size)
        self.every = (*self.others, self.log)

    def add(self, unit: Unit) -> WriteLine[Unit]:
        """Adds a unit; returns its line."""
        line = self._line_for(unit)
        older: list[Unit] = []
        for other in self.every[: self.every.index(line)]:
            own = other.queue.take_output_of(unit)
            other.forget(own)
            older += own
        line.add(unit, older)
        return line

    def _line_for(self, unit: Unit) -> WriteLine[Unit]:
        if unit.is_logged:
            return self.log
        for line in reversed(self.every):
            if line.concerns(unit):
                return line
        return min(self.others, key=len)

    def must_wait(self, line: WriteLine[Unit], batch: Iterable[Unit]) -> bool:
        """Whether units of other lines come before a batch."""
        before = self.every[: self.every.index(line)]
        return any(other.concerns(unit) for unit in batch for other in before)


def _concerns(unit: LoggedUnit) -> set[tuple[type, str, str]]:
    """The lane and the runs of a unit."""
    runs = (*unit.changed, unit.appended) if unit.appended is not None else unit.changed
    found: set[tuple[type, str, str]] = {(RunKey, unit.tenant, run_id) for run_id in runs}
    if unit.lane is not None:
        found.add((SessionKey, *unit.lane))
    return found
