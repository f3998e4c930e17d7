"""Whose turn it is on this node, told to the store for what it is to serve next."""

from __future__ import annotations

from runlane_server.access.quotas import QuotaBook
from runlane_server.engine.slots import UNLIMITED, Slots
from runlane_server.store.base import ClaimOrder, TenantShare


def claim_order_of(slots: Slots, book: QuotaBook) -> ClaimOrder:
    """The tenants that had slots of late come last; those that have none so far, first."""
    served = slots.tenant_shares
    known = {share.tenant for share in served}
    fresh = tuple(TenantShare(name, _most(book, name)) for name in book.named if name not in known)
    return ClaimOrder((*fresh, *served), _room(book.others.max_active_runs))


def _most(book: QuotaBook, tenant: str) -> int:
    return _room(book.max_active(tenant))


def _room(most: int | None) -> int:
    return UNLIMITED if most is None else most
