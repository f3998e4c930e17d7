"""Workers at fault again and again get turns only after a backoff.

A worker is known by its tenant and its id. An id costs nothing, so the caller whose token the
workers use is counted too, with more patience: one bad worker must not stop its siblings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

WORKER_FAULTS = 5
"""Faults of a worker in a row; with the last one its backoff begins."""

CALLER_FAULTS = 25
"""The same for all workers of a caller together."""

FIRST_BACKOFF = 2.0
"""Seconds of the first backoff. Each fault after it doubles them."""

MAX_BACKOFF = 60.0
"""Seconds of the longest backoff."""

MAX_KNOWN = 10_000
"""Workers and callers whose faults are known. The one with the oldest fault is forgotten first."""


class Fault(StrEnum):
    """The fault of a worker, as the log says it: never in the words of its agent, which may
    repeat a prompt."""

    LOST = "an attempt was lost"
    RETURNED = "a turn was lost before it began"
    REFUSED = "a message was refused"


class Party(NamedTuple):
    """A worker, or a caller with all its workers if `worker_id` is None."""

    tenant: str
    caller: str
    worker_id: str | None

    @property
    def patience(self) -> int:
        """Faults in a row before the first backoff."""
        return CALLER_FAULTS if self.worker_id is None else WORKER_FAULTS


@dataclass(slots=True)
class _Conduct:
    faults: int = 0
    is_barred: bool = False


class Quarantine:
    """Counts the faults in a row of workers and callers.

    A turn that ends well clears the count. `started` counts the backoffs.
    """

    def __init__(self) -> None:
        self.started = 0
        self._known: dict[Party, _Conduct] = {}

    @property
    def barred(self) -> int:
        """The workers and callers that get no turns now."""
        return sum(conduct.is_barred for conduct in self._known.values())

    def is_barred(self, tenant: str, caller: str, worker_id: str) -> bool:
        """Whether a worker gets no turns now."""
        return any(
            party in self._known and self._known[party].is_barred
            for party in _parties(tenant, caller, worker_id)
        )

    def add(self, tenant: str, caller: str, worker_id: str) -> list[tuple[Party, float]]:
        """Counts a fault; returns whose backoff begins with it, and its seconds.

        Turns that were given before a backoff began and fail during it do not prolong it.
        """
        begun: list[tuple[Party, float]] = []
        for party in _parties(tenant, caller, worker_id):
            conduct = self._known.pop(party, None) or _Conduct()
            self._known[party] = conduct
            if conduct.is_barred:
                continue
            conduct.faults += 1
            if conduct.faults >= party.patience:
                conduct.is_barred = True
                self.started += 1
                doublings = min(conduct.faults - party.patience, 10)
                begun.append((party, min(FIRST_BACKOFF * 2**doublings, MAX_BACKOFF)))
        self._forget_oldest()
        return begun

    def clear(self, tenant: str, caller: str, worker_id: str) -> None:
        """A turn ended well. A backoff that has begun still ends in its time."""
        for party in _parties(tenant, caller, worker_id):
            conduct = self._known.get(party)
            if conduct is not None and not conduct.is_barred:
                del self._known[party]

    def release(self, party: Party) -> None:
        """Ends a backoff; the next fault begins a longer one."""
        if party in self._known:
            self._known[party].is_barred = False

    def _forget_oldest(self) -> None:
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]


def _parties(tenant: str, caller: str, worker_id: str) -> Iterator[Party]:
    yield Party(tenant, caller, worker_id)
    yield Party(tenant, caller, None)
