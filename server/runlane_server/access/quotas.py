"""Quotas of tenants: read from a table and replaceable at runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

from runlane_server.core.errors import QuotaExceeded, Violation

OTHERS = "*"
"""The key of the quota that applies to all tenants that are not named."""


@dataclass(frozen=True, slots=True)
class Quota:
    """The limits of one tenant on one node. None means unlimited.

    `accepts_per_second` refills a bucket of `accepts_burst` accepts; by default the bucket holds
    the accepts of one second. `questions_per_second` does the same for questions of agents.
    """

    max_active_runs: int | None = None
    max_waiting_runs: int | None = None
    accepts_per_second: float | None = None
    accepts_burst: int | None = None
    max_streams: int | None = None
    max_stored_bytes: int | None = None
    questions_per_second: float | None = None
    questions_burst: int | None = None

    @property
    def burst(self) -> int:
        """Size of the bucket of accepts, at least 1. Meaningful only with a rate."""
        return _burst(self.accepts_burst, self.accepts_per_second)

    @property
    def burst_of_questions(self) -> int:
        """Size of the bucket of questions, at least 1. Meaningful only with a rate."""
        return _burst(self.questions_burst, self.questions_per_second)


def _burst(burst: int | None, rate: float | None) -> int:
    return burst or max(1, math.ceil(rate or 1))


NO_LIMIT = Quota()

MAX_LIMIT = 1_000_000_000
"""Upper bound of counts and rates; beyond it, no limit is meant."""

MIN_RATE = 0.000_001
"""Per second. With a lower rate the retry delay would not fit into the answer."""

MAX_BYTES = 1 << 60

_MINIMUMS = {
    "max_active_runs": 0,
    "max_waiting_runs": 0,
    "accepts_burst": 1,
    "max_streams": 0,
    "max_stored_bytes": 0,
    "questions_burst": 1,
}
"""The limits that are whole numbers, each with its minimum."""

_RATES = ("accepts", "questions")
"""The limits per second; each may have a burst."""


@dataclass(frozen=True, slots=True)
class Quotas:
    """The quotas of named tenants, and the quota of all others."""

    named: Mapping[str, Quota] = field(default_factory=lambda: MappingProxyType({}))
    others: Quota = NO_LIMIT

    def of(self, tenant: str) -> Quota:
        """The quota of a tenant. A named quota inherits nothing from `others`."""
        return self.named.get(tenant, self.others)


class QuotaBook:
    """The quotas in force. `of` returns the quota of a tenant."""

    def __init__(self, quotas: Quotas | None = None) -> None:
        self._quotas = quotas or Quotas()
        self._listeners: list[Callable[[], None]] = []
        # The bound method itself, to save a call: each accept uses it several times.
        self.of: Callable[[str], Quota] = self._quotas.of

    def max_active(self, tenant: str) -> int | None:
        """The limit of active runs of a tenant on this node."""
        return self._quotas.of(tenant).max_active_runs

    @property
    def others(self) -> Quota:
        """The quota of the tenants that are not named."""
        return self._quotas.others

    @property
    def named(self) -> Iterator[str]:
        """The tenants with a quota of their own."""
        return iter(self._quotas.named)

    def listen(self, changed: Callable[[], None]) -> None:
        """Calls `changed` after each replacement."""
        self._listeners.append(changed)

    def replace(self, quotas: Quotas) -> None:
        """Replaces the quotas. A tenant above a lowered limit keeps what it has."""
        self._quotas = quotas
        self.of = quotas.of
        for changed in self._listeners:
            changed()


def quota_exceeded(
    tenant: str, quota: str, limit: float, *, retry_after: float | None = None
) -> QuotaExceeded:
    """The error for one exhausted quota; `retry_after` is in seconds, None if waiting is futile."""
    description = f"{quota} is {limit}"
    return QuotaExceeded(
        f"tenant {tenant!r} has used up its quota: {description}",
        violations=[Violation(tenant, description)],
        retry_after=retry_after,
    )


def read_quotas(table: Mapping[str, object]) -> Quotas:
    """Reads quotas from a table that maps tenants to tables of limits; `*` is all others.

    Raises ValueError that names the invalid key.
    """
    quotas = {name: _read_quota(name, limits) for name, limits in table.items()}
    others = quotas.pop(OTHERS, NO_LIMIT)
    return Quotas(MappingProxyType(quotas), others)


def _read_quota(name: str, limits: object) -> Quota:
    place = f"tenants.{name}" if name.isidentifier() else f'tenants."{name}"'
    if not (name and isinstance(limits, Mapping)):
        raise ValueError(f"{place}: must be a table of limits for a non-empty tenant name")
    for key, value in limits.items():
        if problem := _problem(key, value):
            raise ValueError(f"{place}.{key}: {problem}")
    for what in _RATES:
        if f"{what}_burst" in limits and f"{what}_per_second" not in limits:
            raise ValueError(f"{place}.{what}_burst: requires {what}_per_second")
    return Quota(**cast("Mapping[str, int]", limits))


def _problem(key: str, value: object) -> str:
    """Why a limit is invalid; empty if it is valid."""
    if key in [f"{what}_per_second" for what in _RATES]:
        valid = _is_rate(value)
        return "" if valid else f"must be a number from {MIN_RATE:f} to {MAX_LIMIT}"
    minimum = _MINIMUMS.get(key)
    if minimum is None:
        return "is not a known limit"
    maximum = MAX_BYTES if key == "max_stored_bytes" else MAX_LIMIT
    # In Python a bool is an int.
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        return f"must be a whole number from {minimum} to {maximum}"
    return ""


def _is_rate(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and MIN_RATE <= cast("float", value) <= MAX_LIMIT
