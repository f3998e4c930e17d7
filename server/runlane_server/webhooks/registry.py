"""Creates and changes webhooks. It wakes the deliveries of this node; other nodes look by
themselves, within a second."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from uuid import UUID

from uuid_utils import uuid7

from runlane_server.core.errors import (
    InvalidArgument,
    QuotaExceeded,
    Violation,
    WebhookChanged,
    WebhookNotFound,
)
from runlane_server.core.model import Micros, RunKey
from runlane_server.store.base import Page, Store
from runlane_server.store.webhooks import (
    Most,
    OfRun,
    Place,
    Progress,
    Webhook,
    WebhookFilter,
    WebhookKey,
)
from runlane_server.webhooks.destination import Destinations, Refused, Target
from runlane_server.webhooks.dispatcher import Dispatcher
from runlane_server.webhooks.secret_keys import NO_KEYS, SecretKeys
from runlane_server.webhooks.signature import SECRET_FORM, is_secret, new_secret

MAX_OF_TENANT = 100

MAX_FOR_RUNS, MAX_OF_RUN = 1_000, 10
"""Webhooks of single runs: of a tenant, and of one run."""

OLD_SECRET_KEPT = 86_400_000_000
"""Microseconds for which the secret before a rotation signs too."""

LAST_REQUEST = 2**31 - 1
"""A number in the log that is not before that of any input request."""

TRIES = 5
"""Attempts of a change that others overtake."""


class Webhooks:
    """The webhooks of all tenants."""

    def __init__(
        self,
        store: Store,
        dispatcher: Dispatcher,
        destinations: Destinations,
        now: Callable[[], Micros],
        keys: SecretKeys = NO_KEYS,
    ) -> None:
        self._store = store
        self._keys = keys
        self._dispatcher = dispatcher
        self._destinations = destinations
        self._now = now

    async def create(
        self,
        tenant: str,
        *,
        url: str,
        secret: str,
        wanted: WebhookFilter,
        full: bool,
        enabled: bool,
        of_run: OfRun | None = None,
    ) -> Webhook:
        """Creates a webhook that delivers what happens from now on.

        One of a run that has ended delivers the end, if the event log still has it. One of a run
        replaces the webhook of the same name of that run, and goes on where that is.
        """
        self._check_url(url)
        secret = self._checked_secret(secret)
        key = _key(tenant, of_run)
        webhook = await self._new(key, url, secret, wanted, of_run)
        webhook = replace(webhook, full=full, enabled=enabled, of_run=self._sealed(key, of_run))
        most = _most(webhook)
        for _ in range(TRIES):
            if await self._store.webhooks.create(webhook, most=most):
                self._dispatcher.wake()
                return webhook
            if await self._store.webhooks.get(key) is None:
                raise await self._too_many(webhook, most)
            with suppress(WebhookNotFound):  # it was deleted just now
                return await self._replace(webhook)
        raise WebhookChanged.of(key.webhook_id)

    def _sealed(self, key: WebhookKey, of_run: OfRun | None) -> OfRun | None:
        if of_run is None or not of_run.headers:
            return of_run
        return replace(of_run, headers=self._keys.seal(key, of_run.headers))

    async def _replace(self, webhook: Webhook) -> Webhook:
        """Makes a stored webhook of a run a new one, which continues where the stored one is."""

        def apply(stored: Webhook) -> tuple[Webhook, bool]:
            progress = _restarted(stored.progress)
            found = replace(webhook, progress=progress, created_at=stored.created_at)
            return replace(found, revision=stored.revision, fence=stored.fence), True

        return await self._change(webhook.key, apply, None)

    async def _too_many(self, webhook: Webhook, most: Most) -> QuotaExceeded:
        tenant, run_id = webhook.key.tenant, webhook.run_id
        if not run_id:
            return _exceeded(f"tenant {tenant!r}", f"tenant:{tenant}", most.of_tenant, "webhooks")
        page = await self._store.webhooks.list(tenant, after=None, limit=most.of_run, run_id=run_id)
        if len(page.items) >= most.of_run:
            return _exceeded(f"run {run_id!r}", f"run:{run_id}", most.of_run, "webhooks")
        subject = f"tenant:{tenant}"
        return _exceeded(f"tenant {tenant!r}", subject, most.of_tenant, "webhooks of runs")

    async def _new(
        self, key: WebhookKey, url: str, secret: str, wanted: WebhookFilter, of_run: OfRun | None
    ) -> Webhook:
        await self._store.catch_up()
        # The next request after this event is later than all that are there.
        cursor = max(Place(self._store.position), await self._store.webhooks.last_input())
        if of_run is not None:
            cursor = min(cursor, await self._before_end(key.tenant, of_run.run_id) or cursor)
        now = self._now()
        return Webhook(
            key,
            url=url,
            secrets=(self._keys.seal(key, secret),),
            wanted=wanted,
            full=False,
            enabled=False,
            created_at=now,
            updated_at=now,
            progress=Progress(cursor=cursor),
        )

    async def _before_end(self, tenant: str, run_id: str) -> Place | None:
        """The place before the end of a run, behind all its requests; None if the log has no end
        of it."""
        ended = await self._store.position_of(RunKey(tenant, run_id))
        return None if ended is None else Place(ended - 1, LAST_REQUEST)

    async def get(self, key: WebhookKey) -> Webhook:
        """A webhook. Raises WebhookNotFound."""
        webhook = await self._store.webhooks.get(key)
        if webhook is None:
            raise WebhookNotFound.of(key.webhook_id)
        return self._current(webhook)

    async def list(
        self, tenant: str, *, after: int | None, limit: int, run_id: str = ""
    ) -> Page[Webhook, int]:
        """A page of webhooks, the latest created first; only those of a run, if one is given."""
        page = await self._store.webhooks.list(tenant, after=after, limit=limit, run_id=run_id)
        return Page(tuple(map(self._current, page.items)), page.next)

    def _current(self, webhook: Webhook) -> Webhook:
        """With the progress that is not stored yet, if this node delivers."""
        delivery = self._dispatcher.deliveries.get(webhook.key)
        if delivery is None or delivery.webhook.fence != webhook.fence:
            return webhook
        return replace(webhook, progress=delivery.progress)

    async def update(
        self, key: WebhookKey, change: Callable[[Webhook], Webhook], *, revision: int | None
    ) -> Webhook:
        """Changes url, filter, full and enabled. Raises WebhookChanged if a revision is given and
        is not the current one."""

        def apply(webhook: Webhook) -> tuple[Webhook, bool]:
            changed = change(webhook)
            if changed.url != webhook.url:
                self._check_url(changed.url)
                _check_no_credentials(webhook)
            restarts = changed.enabled and bool(
                webhook.progress.disabled or changed.url != webhook.url
            )
            if restarts:
                changed = replace(changed, progress=_restarted(webhook.progress))
            return changed, restarts

        return await self._change(key, apply, revision)

    async def rotate(self, key: WebhookKey, secret: str, *, expire_now: bool) -> Webhook:
        """Replaces the secret."""
        new = self._checked_secret(secret)

        def apply(webhook: Webhook) -> tuple[Webhook, bool]:
            until = None if expire_now else self._now() + OLD_SECRET_KEPT
            return self._keys.rotated(webhook, new, until), False

        return await self._change(key, apply, None)

    def secret_of(self, webhook: Webhook) -> str:
        """The current secret of a webhook, for the caller who has just created or rotated it."""
        return self._keys.open(webhook.key, webhook.secrets[0])

    async def redeliver(self, key: WebhookKey, after: Place) -> Webhook:
        """Delivers again what comes after a place."""

        def apply(webhook: Webhook) -> tuple[Webhook, bool]:
            progress = replace(_restarted(webhook.progress), cursor=after, held=())
            return replace(webhook, progress=progress), True

        return await self._change(key, apply, None)

    async def delete(self, key: WebhookKey) -> None:
        """Deletes a webhook. Raises WebhookNotFound."""
        if not await self._store.webhooks.delete(key):
            raise WebhookNotFound.of(key.webhook_id)
        self._dispatcher.wake()

    async def _change(
        self,
        key: WebhookKey,
        apply: Callable[[Webhook], tuple[Webhook, bool]],
        revision: int | None,
    ) -> Webhook:
        for _ in range(TRIES):
            webhook = await self.get(key)
            if revision is not None and webhook.revision != revision:
                raise WebhookChanged.of(key.webhook_id)
            changed, resets = apply(webhook)
            changed = replace(changed, updated_at=max(self._now(), webhook.updated_at + 1))
            if await self._store.webhooks.replace(changed, resets=resets):
                self._dispatcher.wake()
                return replace(changed, revision=changed.revision + 1)
        raise WebhookChanged.of(key.webhook_id)

    def _check_url(self, url: str) -> None:
        try:
            self._destinations.check_literal(Target.parse(url))
        except (ValueError, Refused) as error:
            raise InvalidArgument.of("url", str(error)) from error

    def _checked_secret(self, secret: str) -> str:
        if secret and not is_secret(secret):
            raise InvalidArgument.of("secret", f"is not valid: use {SECRET_FORM}")
        return secret or new_secret()


def _key(tenant: str, of_run: OfRun | None) -> WebhookKey:
    """The key of a new webhook. The run and the name are the identity of one of a run, so that
    two callers at a time do not create it twice."""
    if of_run is None:
        return WebhookKey(tenant, str(uuid7()))
    name = "\0".join((tenant, of_run.run_id, of_run.name)).encode()
    digest = hashlib.blake2b(name, digest_size=16, person=b"runlane-run-hook").digest()
    return WebhookKey(tenant, str(UUID(bytes=digest)))


def _most(webhook: Webhook) -> Most:
    if webhook.of_run is None:
        return Most(MAX_OF_TENANT, MAX_OF_TENANT)
    return Most(MAX_FOR_RUNS, MAX_OF_RUN)


def _exceeded(owner: str, subject: str, most: int, what: str) -> QuotaExceeded:
    return QuotaExceeded(
        f"{owner} has {most} {what} already; delete one first",
        violations=[Violation(subject, f"at most {most} {what}")],
    )


def _check_no_credentials(webhook: Webhook) -> None:
    """Nobody reads the credentials of a webhook, and so nobody may have them sent elsewhere."""
    if webhook.of_run is not None and webhook.of_run.headers:
        problem = "cannot change, since the webhook has credentials for it"
        raise InvalidArgument.of("url", f"{problem}; create the webhook of the run again")


def _restarted(progress: Progress) -> Progress:
    """A progress that tries again at once."""
    held = tuple(replace(it, failures=0, due=0) for it in progress.held)
    return replace(
        progress, held=held, failures=0, failing_since=None, next_attempt_at=None, disabled=""
    )
