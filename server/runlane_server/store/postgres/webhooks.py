"""Webhooks in a PostgreSQL database. The clock of the database decides which node delivers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

from runlane_server.store.base import Page, Position
from runlane_server.store.inputs import input_from
from runlane_server.store.paging import numbered_page
from runlane_server.store.postgres.pool import Pool
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.text import escape, unescape
from runlane_server.store.records import END_OF_LIST
from runlane_server.store.webhooks import (
    START,
    Lease,
    LoggedInput,
    Most,
    Place,
    Progress,
    Webhook,
    WebhookKey,
    decode_webhook,
    encode_progress,
    encode_webhook,
)


class PostgresWebhooks:
    """See `webhooks.WebhookStore`. One round trip each. Every statement may be repeated.

    Leases go over `relaxed`, whose commits do not wait for the disk.
    """

    def __init__(self, pool: Pool, relaxed: Pool) -> None:
        self._pool = pool
        self._relaxed = relaxed

    async def create(self, webhook: Webhook, *, most: Most) -> bool:
        numbers = webhook.revision, webhook.fence, webhook.created_at, webhook.updated_at
        [row] = await self._rows(
            "insert_webhook",
            *map(escape, webhook.key),
            webhook.enabled,
            *numbers,
            *encode_webhook(webhook),
            escape(webhook.run_id),
            *most,
        )
        return bool(row["created"])

    async def get(self, key: WebhookKey) -> Webhook | None:
        rows = await self._rows("webhook", *map(escape, key))
        return decode_webhook(key, rows[0]) if rows else None

    async def list(
        self, tenant: str, *, after: int | None, limit: int, run_id: str = ""
    ) -> Page[Webhook, int]:
        before = END_OF_LIST if after is None else after
        where = escape(tenant), before, limit + 1
        if run_id:
            rows = await self._rows("webhooks_of_run", *where, escape(run_id))
        else:
            rows = await self._rows("webhooks", *where)
        return numbered_page(
            rows,
            limit,
            item=lambda row: decode_webhook(WebhookKey(tenant, unescape(row["webhook_id"])), row),
            number=lambda row: int(row["webhook_no"]),
        )

    async def replace(self, webhook: Webhook, *, resets: bool) -> bool:
        texts = encode_webhook(webhook)
        values = webhook.enabled, webhook.updated_at, texts.settings, texts.secrets
        progress = texts.progress if resets else None
        where = *map(escape, webhook.key), webhook.revision
        return bool(await self._rows("update_webhook", *where, *values, progress))

    async def delete(self, key: WebhookKey) -> bool:
        return bool(await self._rows("delete_webhook", *map(escape, key)))

    async def lease(self, node_id: str, seconds: float, limit: int) -> Sequence[Lease]:
        duration = timedelta(seconds=seconds)
        rows = await self._relaxed.fetch(SQL["lease_webhooks"], escape(node_id), duration, limit)
        return [
            Lease(
                WebhookKey(unescape(row["tenant"]), unescape(row["webhook_id"])),
                row["revision"],
                row["fence"],
                is_excess=n >= row["share"],
            )
            for n, row in enumerate(sorted(rows, key=lambda row: int(row["webhook_no"])))
        ]

    async def release(self, node_id: str, keys: Collection[WebhookKey] | None = None) -> None:
        # The ids are unique among all tenants.
        ids = None if keys is None else [escape(key.webhook_id) for key in keys]
        await self._relaxed.fetch(SQL["release_webhooks"], escape(node_id), ids)

    async def save(self, key: WebhookKey, fence: int, progress: Progress) -> bool:
        text = encode_progress(progress)
        return bool(await self._rows("save_webhook", *map(escape, key), fence, text))

    async def inputs(
        self,
        tenant: str,
        *,
        after: Place,
        upto: Position,
        limit: int,
        session_id: str | None = None,
    ) -> Sequence[LoggedInput]:
        args = (escape(tenant), *after, upto, limit)
        if session_id is None:
            rows = await self._rows("inputs_in_log", *args)
        else:
            rows = await self._rows("inputs_of_session_in_log", *args, escape(session_id))
        return [
            LoggedInput(
                Place(row["log_position"], row["log_number"]), input_from(tenant, row, unescape)
            )
            for row in rows
        ]

    async def last_input(self) -> Place:
        rows = await self._rows("last_input")
        return Place(rows[0]["log_position"], rows[0]["log_number"]) if rows else START

    async def _rows(self, name: str, *args: object) -> Sequence[Any]:
        return await self._pool.fetch(SQL[name], *args)
