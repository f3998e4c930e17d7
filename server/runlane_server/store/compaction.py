"""How far the event log of each tenant was removed, and how much of it each tenant may keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from runlane_server.store.base import BEGINNING, Position

EVERY_TENANT = ""
"""The name under which a store keeps the position up to which it removed the events of all tenants
alike, as it did before it counted the log of each."""


class CompactedPositions:
    """The position up to which the events of each tenant were removed."""

    def __init__(self, known: Mapping[str, Position] | None = None) -> None:
        self._by_tenant = dict(known or {})
        self.latest = max(self._by_tenant.values(), default=BEGINNING)
        """The position of the last event that was removed. Earlier ones of other tenants may
        remain."""

    def of(self, tenant: str) -> Position:
        """The position up to which the events of a tenant were removed."""
        alike = self._by_tenant.get(EVERY_TENANT, BEGINNING)
        return max(alike, self._by_tenant.get(tenant, BEGINNING))

    def note(self, tenant: str, position: Position) -> None:
        """Records that a tenant's events up to a position were removed."""
        self._by_tenant[tenant] = max(position, self._by_tenant.get(tenant, BEGINNING))
        self.latest = max(self.latest, position)


def largest_log(sizes: Iterable[int], keep_bytes: int | None) -> int | None:
    """The size to which larger logs of tenants are cut so that all fit into `keep_bytes`.

    None if they fit. Every tenant has an equal share, and what some leave of theirs is shared by
    the others: a log below its share is never cut.
    """
    if keep_bytes is None:
        return None
    left = keep_bytes
    ordered = sorted(sizes)
    for n, size in enumerate(ordered):
        share = left // (len(ordered) - n)
        if size > share:
            return share
        left -= size
    return None
