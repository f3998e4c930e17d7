"""How many runs wait, of all tenants and of each."""

from __future__ import annotations

from collections.abc import Mapping


class WaitingRuns:
    """Counts them. On a node that shares its store the total is told by the store, and kept up with
    what this node does in between."""

    def __init__(self) -> None:
        self.total = 0
        self._of: dict[str, int] = {}

    def of(self, tenant: str) -> int:
        """How many runs of a tenant wait."""
        return self._of.get(tenant, 0)

    def add(self, tenant: str, runs: int) -> None:
        """So many more of a tenant wait; less, if negative."""
        if not runs:
            return
        self.total += runs
        left = self._of.get(tenant, 0) + runs
        if left:
            self._of[tenant] = left
        else:
            del self._of[tenant]

    def told(self, counts: Mapping[str, int]) -> None:
        """The store says so."""
        self._of = dict(counts)
        self.total = sum(counts.values())
