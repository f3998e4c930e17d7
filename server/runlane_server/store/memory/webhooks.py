"""Webhooks of the store in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import islice

from runlane_server.core.input import InputChange, InputRequest
from runlane_server.store.base import Page, Position
from runlane_server.store.paging import numbered_page
from runlane_server.store.webhooks import (
    START,
    Lease,
    LoggedInput,
    Most,
    Place,
    Progress,
    Webhook,
    WebhookKey,
    with_revision,
)


class MemoryWebhooks:
    """See `webhooks.WebhookStore`. `find` returns an input request, unless it was deleted."""

    def __init__(self, find: Callable[[str, str], InputRequest | None]) -> None:
        self._find = find
        self._rows: dict[WebhookKey, tuple[int, Webhook]] = {}
        self._made = 0
        self._places: dict[Place, tuple[str, str]] = {}
        self._last = START

    def note_inputs(self, tenant: str, changes: Sequence[InputChange], position: Position) -> None:
        """Gives new requests their places, after the terminal event at a position."""
        for change in changes:
            if change.request is not None:
                after = self._last if self._last.position == position else Place(position)
                self._last = Place(position, after.number + 1)
                self._places[self._last] = (tenant, change.input_request_id)

    async def create(self, webhook: Webhook, *, most: Most) -> bool:
        run_id = webhook.run_id
        runs = [
            other.run_id
            for _, other in self._rows.values()
            if other.key.tenant == webhook.key.tenant and bool(other.run_id) == bool(run_id)
        ]
        if webhook.key in self._rows or len(runs) >= most.of_tenant:
            return False
        if run_id and runs.count(run_id) >= most.of_run:
            return False
        self._made += 1
        self._rows[webhook.key] = (self._made, webhook)
        return True

    async def get(self, key: WebhookKey) -> Webhook | None:
        row = self._rows.get(key)
        return None if row is None else row[1]

    async def list(
        self, tenant: str, *, after: int | None, limit: int, run_id: str = ""
    ) -> Page[Webhook, int]:
        rows = (
            (number, webhook)
            for number, webhook in reversed(self._rows.values())
            if webhook.key.tenant == tenant
            and (after is None or number < after)
            and run_id in {"", webhook.run_id}
        )
        return numbered_page(
            list(islice(rows, limit + 1)),
            limit,
            item=lambda row: row[1],
            number=lambda row: row[0],
        )

    async def replace(self, webhook: Webhook, *, resets: bool) -> bool:
        stored = await self.get(webhook.key)
        if stored is None or stored.revision != webhook.revision:
            return False
        progress = webhook.progress if resets else stored.progress
        changed = replace(webhook, progress=progress, fence=stored.fence)
        self._put(with_revision(changed, resets=resets))
        return True

    async def delete(self, key: WebhookKey) -> bool:
        return self._rows.pop(key, None) is not None

    async def lease(self, node_id: str, seconds: float, limit: int) -> Sequence[Lease]:
        rows = islice(self._rows.values(), limit)
        return [Lease(webhook.key, webhook.revision, webhook.fence) for _, webhook in rows]

    async def release(self, node_id: str, keys: Collection[WebhookKey] | None = None) -> None:
        """Does nothing: there is no other node."""

    async def save(self, key: WebhookKey, fence: int, progress: Progress) -> bool:
        stored = await self.get(key)
        if stored is None or stored.fence != fence:
            return False
        self._put(replace(stored, progress=progress))
        return True

    def _put(self, webhook: Webhook) -> None:
        number, _ = self._rows[webhook.key]
        self._rows[webhook.key] = (number, webhook)

    async def inputs(
        self,
        tenant: str,
        *,
        after: Place,
        upto: Position,
        limit: int,
        session_id: str | None = None,
    ) -> Sequence[LoggedInput]:
        found = (
            LoggedInput(place, request)
            for place, (owner, name) in self._places.items()
            if owner == tenant and after < place and place.position <= upto
            if (request := self._find(tenant, name)) is not None
            and session_id in {None, request.session_id}
        )
        return list(islice(found, limit))

    async def last_input(self) -> Place:
        return self._last
