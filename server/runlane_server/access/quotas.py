"""What a tenant may take of a node: read from a table, and replaceable while the node serves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

from runlane_server.core.errors import QuotaExceeded, Violation

OTHERS = "*"
"""The name under which the quota of all tenants is that have none of their own."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What one tenant may take of one node. None is without limit.

    `accepts_per_second` refills a bucket of `accepts_burst` accepts, by default those of a second.
    """

    max_active_runs: int | None = None
    max_waiting_runs: int | None = None
    accepts_per_second: float | None = None
    accepts_burst: int | None = None
    max_streams: int | None = None
    max_stored_bytes: int | None = None

    @property
    def burst(self) -> int:
        """How many accepts may come at once, where there is a rate. At least 1."""
        return self.accepts_burst or max(1, math.ceil(self.accepts_per_second or 1))


NO_LIMIT = Quota()

MOST = 1_000_000_000
"""Limits of numbers, and rates, are this at the most: who wants more wants none."""

LEAST_RATE = 0.000_001
"""Of accepts a second; with less of it who is refused could not be told when to come back."""

MOST_BYTES = 1 << 60

_LEAST = {
    "max_active_runs": 0,
    "max_waiting_runs": 0,
    "accepts_burst": 1,
    "max_streams": 0,
    "max_stored_bytes": 0,
}
"""The whole numbers among the limits, and the least that each may be."""


@dataclass(frozen=True, slots=True)
class Quotas:
    """The quotas of all tenants: those that are named, and that of the others."""

    named: Mapping[str, Quota] = field(default_factory=lambda: MappingProxyType({}))
    others: Quota = NO_LIMIT

    def of(self, tenant: str) -> Quota:
        """The quota of a tenant. One that is named takes nothing over from that of the others."""
        return self.named.get(tenant, self.others)


class QuotaBook:
    """The quotas that are in force. `of` tells that of a tenant."""

    def __init__(self, quotas: Quotas | None = None) -> None:
        self._quotas = quotas or Quotas()
        self._listeners: list[Callable[[], None]] = []
        # Without a step in between: each accept asks several times.
        self.of: Callable[[str], Quota] = self._quotas.of

    def max_active(self, tenant: str) -> int | None:
        """How many active runs a tenant may have on this node."""
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
        """Has somebody called each time the quotas were replaced."""
        self._listeners.append(changed)

    def replace(self, quotas: Quotas) -> None:
        """Puts other quotas in force. What a tenant has beyond a lower limit by then it keeps."""
        self._quotas = quotas
        self.of = quotas.of
        for changed in self._listeners:
            changed()


def quota_exceeded(
    tenant: str, quota: str, limit: float, *, retry_after: float | None = None
) -> QuotaExceeded:
    """The error for one quota of a tenant; `retry_after` is in seconds, where waiting helps."""
    description = f"{quota} is {limit}"
    return QuotaExceeded(
        f"tenant {tenant!r} has used up its quota: {description}",
        violations=[Violation(tenant, description)],
        retry_after=retry_after,
    )


def read_quotas(table: Mapping[str, object]) -> Quotas:
    """The quotas in a table of tenants, each a table of its limits; `*` is all others.

    Raises ValueError, which names the key that is wrong.
    """
    quotas = {name: _read_quota(name, limits) for name, limits in table.items()}
    others = quotas.pop(OTHERS, NO_LIMIT)
    return Quotas(MappingProxyType(quotas), others)


def _read_quota(name: str, limits: object) -> Quota:
    place = f"tenants.{name}" if name.isidentifier() else f'tenants."{name}"'
    if not (name and isinstance(limits, Mapping)):
        raise ValueError(f"{place}: has to be a table of limits, for a tenant with a name")
    for key, value in limits.items():
        wrong = _wrong(key, value)
        if wrong:
            raise ValueError(f"{place}.{key}: {wrong}")
    if "accepts_burst" in limits and "accepts_per_second" not in limits:
        raise ValueError(f"{place}.accepts_burst: goes with accepts_per_second")
    return Quota(**cast("Mapping[str, int]", limits))


def _wrong(key: str, value: object) -> str:
    """Why a limit is none, or is not of its kind; empty where it is right."""
    if key == "accepts_per_second":
        right = _is_rate(value)
        return "" if right else f"has to be a number, {LEAST_RATE:f} or more, {MOST} at the most"
    least = _LEAST.get(key)
    if least is None:
        return "there is no such limit"
    most = MOST_BYTES if key == "max_stored_bytes" else MOST
    # For Python, and only for it, a bool is a number.
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        return f"has to be a whole number, {least} or more, {most} at the most"
    return ""


def _is_rate(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and LEAST_RATE <= cast("float", value) <= MOST
