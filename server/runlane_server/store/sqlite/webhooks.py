"""Webhooks in a SQLite file. Its one node delivers for all of them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from runlane_server.store.base import Page, Position, Stale
from runlane_server.store.inputs import input_from
from runlane_server.store.paging import numbered_page
from runlane_server.store.records import END_OF_LIST
from runlane_server.store.sqlite.connection import as_is
from runlane_server.store.sqlite.rows import Rows, Unit
from runlane_server.store.sqlite.transaction import SQL
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


class SqliteWebhooks:
    """See `webhooks.WebhookStore`. `read` calls a function with the reader's connection, `write`
    commits a unit."""

    def __init__(
        self,
        read: Callable[..., Awaitable[Any]],
        write: Callable[[Unit], Awaitable[object]],
    ) -> None:
        self._read = read
        self._write = write

    async def create(self, webhook: Webhook, *, most: Most) -> bool:
        texts = encode_webhook(webhook)
        numbers = webhook.revision, webhook.fence, webhook.created_at, webhook.updated_at
        run = webhook.key.tenant, webhook.run_id
        of_run = most.of_run if webhook.run_id else most.of_tenant
        limits = *run, most.of_tenant, *run, of_run
        row = (*webhook.key, int(webhook.enabled), *numbers, *texts, webhook.run_id, *limits)
        return await self._change(webhook.key, {"insert_webhook": [row]})

    async def get(self, key: WebhookKey) -> Webhook | None:
        webhook: Webhook | None = await self._read(_webhook, key)
        return webhook

    async def list(
        self, tenant: str, *, after: int | None, limit: int, run_id: str = ""
    ) -> Page[Webhook, int]:
        page: Page[Webhook, int] = await self._read(_webhooks, tenant, after, limit, run_id)
        return page

    async def replace(self, webhook: Webhook, *, resets: bool) -> bool:
        texts = encode_webhook(webhook)
        where = (*webhook.key, webhook.revision)
        values = int(webhook.enabled), webhook.updated_at, texts.settings, texts.secrets
        rows: Rows = {"update_webhook": [(*values, *where)]}
        if resets:
            rows["reset_webhook"] = [(texts.progress, *where)]
        return await self._change(webhook.key, rows)

    async def delete(self, key: WebhookKey) -> bool:
        return await self._change(key, {"delete_webhook": [key]})

    async def lease(self, node_id: str, seconds: float, limit: int) -> Sequence[Lease]:
        found: Sequence[Lease] = await self._read(_leases, limit)
        return found

    async def release(self, node_id: str, keys: Collection[WebhookKey] | None = None) -> None:
        """Does nothing: there is no other node."""

    async def save(self, key: WebhookKey, fence: int, progress: Progress) -> bool:
        row = (encode_progress(progress), *key, fence)
        return await self._change(key, {"save_webhook": [row]})

    async def inputs(
        self,
        tenant: str,
        *,
        after: Place,
        upto: Position,
        limit: int,
        session_id: str | None = None,
    ) -> Sequence[LoggedInput]:
        where = after._asdict() | {"upto": upto, "limit": limit, "session_id": session_id}
        found: Sequence[LoggedInput] = await self._read(_inputs, tenant, where)
        return found

    async def last_input(self) -> Place:
        place: Place = await self._read(_last_input)
        return place

    async def _change(self, key: WebhookKey, rows: Rows) -> bool:
        try:
            await self._write(_unit(key, rows))
        except Stale:
            return False
        return True


def _unit(key: WebhookKey, rows: Rows) -> Unit:
    return Unit(key.tenant, rows, asyncio.get_running_loop().create_future())


def _webhook(db: sqlite3.Connection, key: WebhookKey) -> Webhook | None:
    row = db.execute(SQL["webhook"], key).fetchone()
    return None if row is None else decode_webhook(key, row)


def _webhooks(
    db: sqlite3.Connection, tenant: str, after: int | None, limit: int, run_id: str
) -> Page[Webhook, int]:
    before = END_OF_LIST if after is None else after
    where = {"tenant": tenant, "before": before, "limit": limit + 1}
    if run_id:
        rows = db.execute(SQL["webhooks_of_run"], where | {"run_id": run_id})
    else:
        rows = db.execute(SQL["webhooks"], where)
    return numbered_page(
        rows.fetchall(),
        limit,
        item=lambda row: decode_webhook(WebhookKey(tenant, row["webhook_id"]), row),
        number=lambda row: int(row["webhook_no"]),
    )


def _leases(db: sqlite3.Connection, limit: int) -> Sequence[Lease]:
    rows = db.execute(SQL["every_webhook"], (limit,))
    return [
        Lease(WebhookKey(row["tenant"], row["webhook_id"]), row["revision"], row["fence"])
        for row in rows
    ]


def _inputs(db: sqlite3.Connection, tenant: str, where: dict[str, Any]) -> Sequence[LoggedInput]:
    name = "inputs_in_log" if where["session_id"] is None else "inputs_of_session_in_log"
    return [
        LoggedInput(Place(row["log_position"], row["log_number"]), input_from(tenant, row, as_is))
        for row in db.execute(SQL[name], where | {"tenant": tenant})
    ]


def _last_input(db: sqlite3.Connection) -> Place:
    row = db.execute(SQL["last_input"]).fetchone()
    return START if row is None else Place(row["log_position"], row["log_number"])
