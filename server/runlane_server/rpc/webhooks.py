"""WebhookService: decode, call, encode."""

# ruff: noqa: N802 - a method is named for its rpc
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeAlias

import grpc

from runlane.v1 import webhook_service_pb2 as pb
from runlane.v1 import webhook_service_pb2_grpc
from runlane_server.access.caller import CALLER, tenant
from runlane_server.access.permissions import may_manage_webhooks
from runlane_server.core.agents import is_agent_name
from runlane_server.core.errors import (
    CursorCompacted,
    CursorInvalid,
    PermissionDenied,
    WebhookNotFound,
)
from runlane_server.core.model import RunState
from runlane_server.rpc import convert
from runlane_server.rpc.checks import MAX_LABELS, Checks
from runlane_server.rpc.cursor import Cursors
from runlane_server.rpc.page import PageTokens, collect_page
from runlane_server.rpc.webhook_runs import read_run, write_run
from runlane_server.store.base import Page, Store
from runlane_server.store.webhooks import (
    INPUT_REQUESTED,
    RUN_ENDED,
    Place,
    Webhook,
    WebhookFilter,
    WebhookKey,
)
from runlane_server.webhooks.registry import Webhooks

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

MAX_IDS = 100
MAX_PREFIXES = 20

FIELDS = ("url", "filter", "full", "enabled")
"""The fields that UpdateWebhook changes."""

KINDS: Mapping[str, pb.WebhookEventKind.ValueType] = MappingProxyType(
    {
        RUN_ENDED: pb.WEBHOOK_EVENT_KIND_RUN_ENDED,
        INPUT_REQUESTED: pb.WEBHOOK_EVENT_KIND_INPUT_REQUESTED,
    }
)
_KINDS_FROM: Mapping[int, str] = {number: kind for kind, number in KINDS.items()}


class WebhookService(webhook_service_pb2_grpc.WebhookServiceServicer):
    """Serves the webhooks of a tenant."""

    def __init__(self, store: Store, webhooks: Webhooks) -> None:
        self._store = store
        self._webhooks = webhooks
        self._cursors = Cursors(store.store_id)

    async def CreateWebhook(
        self, request: pb.CreateWebhookRequest, context: Context
    ) -> pb.CreateWebhookResponse:
        """Creates a webhook."""
        checks = Checks()
        if not request.url:
            checks.reject("url", "is missing")
        wanted = _filter_from(checks, request.filter)
        of_run = read_run(checks, request.run) if request.HasField("run") else None
        _check_scope("CreateWebhook", request.run.run_id)
        checks.finish()
        webhook = await self._webhooks.create(
            tenant(),
            url=request.url,
            secret=request.secret,
            wanted=wanted,
            full=request.full,
            enabled=not request.disabled,
            of_run=of_run,
        )
        secret = self._webhooks.secret_of(webhook)
        return pb.CreateWebhookResponse(webhook=self._encode(webhook), secret=secret)

    async def GetWebhook(
        self, request: pb.GetWebhookRequest, context: Context
    ) -> pb.GetWebhookResponse:
        """Returns a webhook."""
        webhook = await self._visible("GetWebhook", request.webhook_id)
        return pb.GetWebhookResponse(webhook=self._encode(webhook))

    async def ListWebhooks(
        self, request: pb.ListWebhooksRequest, context: Context
    ) -> pb.ListWebhooksResponse:
        """Lists webhooks."""
        _check_scope("ListWebhooks", request.run_id)
        tokens = PageTokens(self._store.store_id, "ListWebhooks", tenant(), request.run_id)
        checks = Checks()
        checks.identifier("run_id", request.run_id)
        page_size = checks.page_size(request.page_size)
        place = checks.finish_with(lambda: tokens.decode(request.page_token, 1))

        async def fetch(after: int | None, count: int) -> Page[Webhook, int]:
            return await self._webhooks.list(
                tenant(), after=after, limit=count, run_id=request.run_id
            )

        page = await collect_page(
            fetch, self._encode, after=None if place is None else place[0], limit=page_size
        )
        return pb.ListWebhooksResponse(
            webhooks=page.items,
            next_page_token="" if page.next is None else tokens.encode(page.next),
        )

    async def UpdateWebhook(
        self, request: pb.UpdateWebhookRequest, context: Context
    ) -> pb.UpdateWebhookResponse:
        """Changes a webhook."""
        key = _key(request.webhook_id)
        webhook = await self._webhooks.update(key, _change(request), revision=_revision(request))
        return pb.UpdateWebhookResponse(webhook=self._encode(webhook))

    async def DeleteWebhook(
        self, request: pb.DeleteWebhookRequest, context: Context
    ) -> pb.DeleteWebhookResponse:
        """Deletes a webhook."""
        webhook = await self._visible("DeleteWebhook", request.webhook_id)
        await self._webhooks.delete(webhook.key)
        return pb.DeleteWebhookResponse()

    async def RedeliverWebhook(
        self, request: pb.RedeliverWebhookRequest, context: Context
    ) -> pb.RedeliverWebhookResponse:
        """Delivers again."""
        key = _key(request.webhook_id)
        await self._store.catch_up()
        webhook = await self._webhooks.redeliver(key, self._start(request))
        return pb.RedeliverWebhookResponse(webhook=self._encode(webhook))

    async def RotateWebhookSecret(
        self, request: pb.RotateWebhookSecretRequest, context: Context
    ) -> pb.RotateWebhookSecretResponse:
        """Replaces the secret."""
        webhook = await self._webhooks.rotate(
            _key(request.webhook_id), request.secret, expire_now=request.expire_now
        )
        secret = self._webhooks.secret_of(webhook)
        return pb.RotateWebhookSecretResponse(webhook=self._encode(webhook), secret=secret)

    async def _visible(self, method: str, webhook_id: str) -> Webhook:
        """A webhook that the caller may see and delete."""
        key = _key(webhook_id)
        try:
            webhook = await self._webhooks.get(key)
        except WebhookNotFound:
            _check_scope(method, "")  # it may not learn which webhooks there are
            raise
        _check_scope(method, webhook.run_id)
        return webhook

    def _start(self, request: pb.RedeliverWebhookRequest) -> Place:
        oldest = self._store.compacted_of(tenant())
        if request.from_beginning:
            return Place(oldest)
        checks = Checks()
        if not request.cursor:
            checks.reject("cursor", "is required unless from_beginning is set")
        checks.finish()
        position = self._cursors.decode(tenant(), request.cursor)
        if position > self._store.position:
            raise CursorInvalid.of("cursor", "lies ahead of the event log")
        if position < oldest:
            raise CursorCompacted(
                "events after the cursor were removed; redeliver from the beginning",
                metadata={"oldest_cursor": self._cursors.encode(tenant(), oldest)},
            )
        return Place(position)

    def _encode(self, webhook: Webhook) -> pb.Webhook:
        return pb.Webhook(
            webhook_id=webhook.key.webhook_id,
            url=webhook.url,
            filter=_filter(webhook.wanted),
            full=webhook.full,
            enabled=webhook.enabled and not webhook.progress.disabled,
            etag=str(webhook.revision),
            created_at=convert.timestamp(webhook.created_at),
            updated_at=convert.timestamp(webhook.updated_at),
            old_secret_expires_at=convert.optional_timestamp(webhook.old_secret_until),
            health=self._health(webhook),
            run=write_run(webhook.of_run),
        )

    def _health(self, webhook: Webhook) -> pb.WebhookHealth:
        progress = webhook.progress
        return pb.WebhookHealth(
            disabled_reason=progress.disabled,
            cursor=self._cursors.encode(webhook.key.tenant, progress.cursor.position),
            held_sessions=len(progress.held),
            failures=progress.failures,
            failing_since=convert.optional_timestamp(progress.failing_since),
            next_attempt_at=convert.optional_timestamp(progress.next_attempt_at),
            last_error=progress.last_error,
            last_error_at=convert.optional_timestamp(progress.last_error_at),
            last_success_at=convert.optional_timestamp(progress.last_success_at),
            delivered=progress.delivered,
            given_up=progress.given_up,
            compacted_at=convert.optional_timestamp(progress.lost_before),
            confirmed=progress.confirmed == webhook.url,
        )


def _check_scope(method: str, run_id: str) -> None:
    """Raises PermissionDenied if the caller manages only the webhooks of single runs, and this is
    another one."""
    if not run_id and not may_manage_webhooks(CALLER.get().roles):
        shown = " and ".join(CALLER.get().roles)
        raise PermissionDenied(f"the role {shown} may call {method} only for webhooks of runs")


def _key(webhook_id: str) -> WebhookKey:
    checks = Checks()
    if not webhook_id:
        checks.reject("webhook_id", "is missing")
    checks.identifier("webhook_id", webhook_id)
    checks.finish()
    return WebhookKey(tenant(), webhook_id)


def _revision(request: pb.UpdateWebhookRequest) -> int | None:
    if not request.etag:
        return None
    # Another text is the etag of no webhook.
    return int(request.etag) if request.etag.isdecimal() and len(request.etag) < 19 else -1


def _change(request: pb.UpdateWebhookRequest) -> Callable[[Webhook], Webhook]:
    checks = Checks()
    names: Sequence[str] = request.update_mask.paths
    if not names:
        checks.reject("update_mask", f"is missing; it names {', '.join(FIELDS)}")
    checks.count("update_mask", names, 2 * len(FIELDS))
    for name in names:
        if name not in FIELDS:
            checks.reject("update_mask", f"names no field that can change; use {', '.join(FIELDS)}")
    changes: dict[str, Any] = {
        "url": request.url,
        "wanted": _filter_from(checks, request.filter),
        "full": request.full,
        "enabled": request.enabled,
    }
    checks.finish()
    chosen = {"wanted" if name == "filter" else name for name in names}
    return lambda webhook: replace(webhook, **{name: changes[name] for name in chosen})


def _filter_from(checks: Checks, sent: pb.WebhookFilter) -> WebhookFilter:
    checks.count("filter.session_ids", sent.session_ids, MAX_IDS)
    checks.identifiers("filter.session_ids", sent.session_ids)
    checks.count("filter.session_id_prefixes", sent.session_id_prefixes, MAX_PREFIXES)
    checks.identifiers("filter.session_id_prefixes", sent.session_id_prefixes)
    checks.count("filter.labels", sent.labels, MAX_LABELS)
    checks.labels("filter.labels", sent.labels)
    checks.count("filter.agents", sent.agents, MAX_IDS)
    for n, name in enumerate(sent.agents):
        if not is_agent_name(name):
            checks.reject(f"filter.agents[{n}]", "is not a name of an agent")
    checks.count("filter.states", sent.states, len(RunState))
    states = [
        checks.enum(f"filter.states[{n}]", state, convert.RUN_STATES_FROM.get, RunState.COMPLETED)
        for n, state in enumerate(sent.states)
    ]
    for n, state in enumerate(states):
        if not state.is_terminal:
            checks.reject(f"filter.states[{n}]", "is not a terminal state")
    checks.count("filter.kinds", sent.kinds, len(KINDS))
    kinds = [
        checks.enum(f"filter.kinds[{n}]", kind, _KINDS_FROM.get, RUN_ENDED)
        for n, kind in enumerate(sent.kinds)
    ]
    return WebhookFilter(
        frozenset(sent.session_ids),
        tuple(sent.session_id_prefixes),
        dict(sent.labels),
        frozenset(sent.agents),
        frozenset(states),
        frozenset(kinds),
    )


def _filter(wanted: WebhookFilter) -> pb.WebhookFilter:
    return pb.WebhookFilter(
        session_ids=sorted(wanted.session_ids),
        session_id_prefixes=wanted.session_prefixes,
        labels=wanted.labels,
        agents=sorted(wanted.agents),
        states=sorted(convert.RUN_STATES[state] for state in wanted.states),
        kinds=sorted(KINDS[kind] for kind in wanted.kinds),
    )
