"""Decides which webhooks this node delivers for, and runs their deliveries.

Each node leases webhooks from the store, by the store's clock, and renews the leases. It hands over
what it has beyond its share, so that all nodes deliver. A node that
dies or loses the store stops to renew, and others take over. It notices by its own clock before
they do. The fence of the webhook refuses its later writes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from types import MappingProxyType

import structlog

from runlane_server.core.errors import Draining, RunlaneError
from runlane_server.core.model import Micros
from runlane_server.store.base import Store
from runlane_server.store.webhooks import START, Lease, Place, Webhook, WebhookKey
from runlane_server.webhooks.attempts import Parts
from runlane_server.webhooks.delivery import Delivery, is_over
from runlane_server.webhooks.secret_keys import SecretLocked

log = structlog.get_logger()

LEASE_SECONDS = 15.0
POLL_SECONDS = 1.0
"""Seconds between two renewals: a change on another node is noticed within this time."""

SAFE_FRACTION = 0.8
"""Fraction of the lease after which a node that could not renew it stops to deliver."""

MAX_WEBHOOKS = 10_000
"""Webhooks that one node delivers for."""

MOST_HANDED_OVER = 200
"""Webhooks that a node hands over to others at a time."""

STOP_SECONDS = 5.0
"""Seconds for deliveries to stop and to save their progress."""

RESTART_SECONDS = 1.0
CHANGED_SECONDS = 0.1
"""Pauses before a delivery is started again."""


class Dispatcher:
    """Runs the deliveries of the webhooks that this node has leased."""

    def __init__(self, node_id: str, store: Store) -> None:
        self._node_id = node_id
        self._store = store
        self._parts: Parts | None = None
        self._leases: dict[WebhookKey, Lease] = {}
        self._excess: frozenset[WebhookKey] = frozenset()
        self._leased_until = float("-inf")
        self._running: dict[WebhookKey, tuple[Lease, asyncio.Task[None]]] = {}
        self._deliveries: dict[WebhookKey, Delivery] = {}
        self._last_input = START
        self._wakeup = asyncio.Event()
        self._is_warned = False

    @property
    def deliveries(self) -> Mapping[WebhookKey, Delivery]:
        """The deliveries that run here."""
        return MappingProxyType(self._deliveries)

    def last_input(self) -> Place:
        """The place of the last input request, at most `POLL_SECONDS` old."""
        return self._last_input

    def wake(self) -> None:
        """Looks at the webhooks now: one has changed."""
        self._wakeup.set()

    async def keep_delivering(self, parts: Parts) -> None:
        """Delivers until it is cancelled."""
        self._parts = parts
        try:
            while True:
                self._wakeup.clear()
                try:
                    await self._renew()
                except RunlaneError as error:
                    log.debug("leases of webhooks not renewed", error=error.message)
                self._adjust()
                await self._hand_over()
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._wakeup.wait()
        finally:
            await self._stop()

    async def _renew(self) -> None:
        began = time.monotonic()
        webhooks = self._store.webhooks
        leases = await webhooks.lease(self._node_id, LEASE_SECONDS, MAX_WEBHOOKS)
        self._last_input = await webhooks.last_input()
        excess = (lease.key for lease in leases if lease.is_excess)
        self._excess = frozenset(islice(excess, MOST_HANDED_OVER))
        self._leases = {lease.key: lease for lease in leases if lease.key not in self._excess}
        self._leased_until = began + LEASE_SECONDS * SAFE_FRACTION

    def _is_leased(self) -> bool:
        return time.monotonic() < self._leased_until

    def _adjust(self) -> None:
        """Starts and stops deliveries, as the leases say."""
        wanted = self._leases if self._is_leased() else {}
        for key, (lease, task) in tuple(self._running.items()):
            if wanted.get(key) != lease:
                task.cancel()
        for key, lease in wanted.items():
            if key not in self._running:
                task = asyncio.create_task(self._deliver(lease))
                self._running[key] = (lease, task)
                task.add_done_callback(lambda _, key=key: self._on_done(key))  # type: ignore[misc]

    async def _hand_over(self) -> None:
        """Releases the webhooks beyond this node's share, once their progress is saved."""
        tasks = [self._running[key][1] for key in self._excess if key in self._running]
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
        stopped = [key for key in self._excess if key not in self._running]
        self._excess = frozenset()
        if stopped:
            with suppress(RunlaneError):
                await self._store.webhooks.release(self._node_id, stopped)

    def _on_done(self, key: WebhookKey) -> None:
        del self._running[key]
        self._deliveries.pop(key, None)
        lease = self._leases.get(key)
        if lease is not None:
            self._wakeup.set()

    async def _deliver(self, lease: Lease) -> None:
        assert self._parts is not None  # noqa: S101 - set before the first lease
        while True:
            try:
                webhook = await self._store.webhooks.get(lease.key)
                if webhook is None or (webhook.revision, webhook.fence) != lease[1:3]:
                    # It has changed, or cannot be read.
                    await asyncio.sleep(CHANGED_SECONDS)
                    return
                webhook = await self._unlocked(webhook)
                if webhook.enabled and not webhook.progress.disabled:
                    delivery = Delivery(webhook, self._parts, self._is_leased)
                    self._deliveries[lease.key] = delivery
                    await delivery.run()
                else:
                    await self._wait_disabled(webhook)
            except Draining:
                await asyncio.Event().wait()
            except RunlaneError as error:
                log.debug("delivery interrupted", error=error.message, **lease.key._asdict())
            except Exception:
                log.exception("delivery failed", **lease.key._asdict())
            await asyncio.sleep(RESTART_SECONDS)

    async def _wait_disabled(self, webhook: Webhook) -> None:
        """Waits until a caller changes it; one of a run is deleted some time after its end."""
        assert self._parts is not None  # noqa: S101 - set before the first lease
        while True:
            await asyncio.sleep(self._parts.lifetime.look)
            if webhook.run_id and await is_over(webhook, self._parts, is_confirmed=False):
                await self._store.webhooks.delete(webhook.key)
                return

    async def _unlocked(self, webhook: Webhook) -> Webhook:
        """Returns once the secrets can be used and are encrypted in the store as the keys say."""
        assert self._parts is not None  # noqa: S101 - set before the first lease
        keys = self._parts.keys
        try:
            sealed = keys.sealed(webhook)
        except SecretLocked as error:
            self._parts.counts.locked += 1
            await self._save_locked(webhook, str(error), self._parts.now())
            await asyncio.Event().wait()  # until a caller rotates the secret
            raise
        if sealed is not webhook:
            # The new revision ends this delivery, and the next one has it.
            await self._store.webhooks.replace(sealed, resets=False)
            log.info("webhook secret encrypted", **webhook.key._asdict())
            self.wake()
            await asyncio.Event().wait()
        if not keys and not self._is_warned:
            self._is_warned = True
            log.warning("webhook secrets are not encrypted in the store; use --webhook-keys")
        if webhook.progress.failures:
            return webhook
        return replace(webhook, progress=replace(webhook.progress, failing_since=None))

    async def _save_locked(self, webhook: Webhook, reason: str, now: Micros) -> None:
        log.warning("webhook stopped", reason=reason, **webhook.key._asdict())
        progress = replace(
            webhook.progress,
            failing_since=webhook.progress.failing_since or now,
            last_error=reason,
            last_error_at=now,
        )
        await self._store.webhooks.save(webhook.key, webhook.fence, progress)

    async def _stop(self) -> None:
        tasks = [task for _, task in self._running.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
        with suppress(RunlaneError):
            await self._store.webhooks.release(self._node_id)
