"""Attempts to deliver to one endpoint, and its health.

An endpoint that fails as a whole gets one attempt at a time, with pauses that grow.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from runlane_server.core.model import Micros
from runlane_server.feed.feed import Feed
from runlane_server.store.base import Store
from runlane_server.store.webhooks import Place, Webhook, WebhookKey
from runlane_server.webhooks.lifetime import LASTING, Lifetime
from runlane_server.webhooks.log_reader import Body, Entry
from runlane_server.webhooks.names import NamesBusy
from runlane_server.webhooks.secret_keys import NO_KEYS, SecretKeys
from runlane_server.webhooks.sender import DeliveryFailed, Sender
from runlane_server.webhooks.shares import Shares
from runlane_server.webhooks.signature import signed_headers

log = structlog.get_logger()

CONCURRENCY, OF_TENANT, OF_ALL = 16, 64, 1_024
"""Deliveries in flight for one webhook, for the webhooks of a tenant, and for all of a node."""

PATIENCE = 5
"""Failures in a row after which a webhook gets one attempt at a time, with pauses."""

MINUTE, HOUR, DAY = 60.0, 3_600.0, 86_400.0

RETRY_DELAYS = (
    *(5.0, 30.0, 2 * MINUTE, 10 * MINUTE, 30 * MINUTE),
    *(HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR, DAY, DAY),
)
"""Seconds between the attempts of an event: 12 attempts over three days. After the last one the
event is given up if others have arrived since, or else tried each day."""

BUSY_SECONDS = 5.0
"""Seconds after which an attempt is repeated that this node had no means to make."""

GONE = 410
POLL_SECONDS = 1.0
SECOND = 1_000_000
"""Microseconds."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When attempts are repeated; in seconds.

    `delays` are those between the attempts of an event, `longest_pause` is the longest pause of an
    endpoint that fails as a whole. Without a success for `disable_after`, a webhook is disabled.
    """

    delays: Sequence[float] = RETRY_DELAYS
    longest_pause: float = 15 * MINUTE
    disable_after: float = 5 * DAY

    def delay(self, failures: int) -> float:
        """The delay after a number of failures, spread by a tenth."""
        delay = self.delays[min(failures, len(self.delays)) - 1]
        return delay * random.uniform(0.9, 1.1)  # noqa: S311 - nothing secret


class Encode(Protocol):
    """Encodes deliveries."""

    def message_id(self, key: WebhookKey, place: Place) -> str:
        """The id of an event for a webhook; it is the same for each attempt."""

    def event(self, body: Body, webhook: Webhook) -> bytes:
        """The body of a delivery."""

    def challenge(self, value: str, at: Micros) -> bytes:
        """The body of a challenge."""


@dataclass(slots=True)
class Counts:
    """The counts of all webhooks of a node, for metrics."""

    delivered: int = 0
    failed: int = 0
    given_up: int = 0
    disabled: int = 0
    lost: int = 0
    locked: int = 0


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that deliveries of all webhooks share."""

    store: Store
    feed: Feed
    sender: Sender
    encode: Encode
    now: Callable[[], Micros]
    last_input: Callable[[], Place]
    slots: Shares
    counts: Counts
    keys: SecretKeys = NO_KEYS
    challenges: bool = True
    schedule: Schedule = Schedule()
    lifetime: Lifetime = LASTING


class Attempts:
    """Attempts to deliver for one webhook. `progress` has its health.

    Raises SecretLocked.

    `on_change` is called when that has changed, `on_return` when the endpoint is back after it
    failed as a whole, and `on_end` when there is nothing to deliver any more.
    """

    def __init__(
        self,
        webhook: Webhook,
        parts: Parts,
        *,
        is_leased: Callable[[], bool],
        on_change: Callable[[], None],
        on_return: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self.progress = webhook.progress
        self._webhook = webhook
        self._parts = parts
        self._secrets = parts.keys.open_all(webhook)
        self._headers = parts.keys.headers(webhook)
        self._schedule = parts.schedule
        self._is_leased = is_leased
        self._on_change = on_change
        self._on_return = on_return
        self._on_end = on_end
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._probe = asyncio.Lock()
        self._paused_until: Micros = webhook.progress.next_attempt_at or 0
        self._pauses = 0

    async def deliver(self, entry: Entry) -> bool:
        """One attempt; returns whether it arrived."""
        while True:
            try:
                return await self._attempt(entry)
            except NamesBusy as error:
                await self._wait_out(error)

    async def _wait_out(self, error: NamesBusy) -> None:
        """Waits, without a slot. It is no failure of the endpoint, but its owner sees it."""
        self.progress = replace(
            self.progress, last_error=str(error), last_error_at=self._parts.now()
        )
        self._on_change()
        await asyncio.sleep(BUSY_SECONDS)

    async def _attempt(self, entry: Entry) -> bool:
        async with self._slots, self._share():
            # Only now: many may have waited for the slot while others failed.
            if self.progress.failures < PATIENCE:
                return await self._send(entry)
        async with self._probe:
            if self.progress.failures >= PATIENCE:
                await self._until(self._paused_until)
            async with self._slots, self._share():
                return await self._send(entry)

    def _share(self) -> AbstractAsyncContextManager[None]:
        return self._parts.slots.taken(self._webhook.key.tenant)

    async def _send(self, entry: Entry) -> bool:
        key = self._webhook.key
        body = self._parts.encode.event(entry.body, self._webhook)
        status, error = await self._post(self._parts.encode.message_id(key, entry.place), body)
        if status == GONE:
            self._disable("the endpoint answered HTTP 410 (gone)")
        if error:
            self._note_failure(error)
            return False
        self._note_success()
        return True

    async def _post(self, message_id: str, body: bytes, *, answer_has: str = "") -> tuple[int, str]:
        """The status of an attempt, and what went wrong; empty if nothing did."""
        if not self._is_leased():
            self._on_end()
            await asyncio.Event().wait()  # until `run` cancels it
        now = self._parts.now()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "Runlane",
            **self._headers,
            **signed_headers(self._signing(now), message_id, now // SECOND, body),
        }
        try:
            answer = await self._parts.sender.post(
                self._webhook.url, headers, body, tenant=self._webhook.key.tenant
            )
        except DeliveryFailed as error:
            return 0, str(error)
        if not 200 <= answer.status < 300:
            redirect = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
            return answer.status, f"HTTP {answer.status}{redirect}"
        if answer_has.encode() not in answer.content:
            return answer.status, "the answer to the challenge does not contain its value"
        return answer.status, ""

    def _signing(self, now: Micros) -> Sequence[str]:
        until = self._webhook.old_secret_until
        return self._secrets if until is None or now < until else self._secrets[:1]

    def _note_success(self) -> None:
        was_failing = self.progress.failures >= PATIENCE
        self.progress = replace(
            self.progress,
            failures=0,
            failing_since=None,
            next_attempt_at=None,
            last_success_at=self._parts.now(),
            delivered=self.progress.delivered + 1,
        )
        self._parts.counts.delivered += 1
        self._on_change()
        self._pauses = 0
        if was_failing:
            self._on_return()

    def _note_failure(self, error: str) -> None:
        now = self._parts.now()
        failures = self.progress.failures + 1
        since = (self.progress.failing_since if self.progress.failures else None) or now
        if failures >= PATIENCE and now >= self._paused_until:
            # Those that were in flight at the same time fail together, and count once.
            self._pauses += 1
            pause = min(self._schedule.delay(self._pauses), self._schedule.longest_pause)
            self._paused_until = now + int(pause * SECOND)
        self.progress = replace(
            self.progress,
            failures=failures,
            failing_since=since,
            next_attempt_at=self._paused_until if failures >= PATIENCE else None,
            last_error=error,
            last_error_at=now,
        )
        self._parts.counts.failed += 1
        self._on_change()
        if now - since > self._schedule.disable_after * SECOND:
            days = self._schedule.disable_after / DAY
            self._disable(f"no delivery has arrived for {days:g} days: {error}")

    def _disable(self, reason: str) -> None:
        if not self.progress.disabled:
            self.progress = replace(self.progress, disabled=reason)
            self._parts.counts.disabled += 1
            log.warning("webhook disabled", reason=reason, **self._webhook.key._asdict())
        self._on_change()
        self._on_end()

    async def confirm(self) -> None:
        """Sends a challenge until the endpoint answers it."""
        failures = 0
        while True:
            value = secrets.token_hex(16)
            message_id = f"msg_{secrets.token_hex(16)}"
            body = self._parts.encode.challenge(value, self._parts.now())
            try:
                async with self._slots, self._share():
                    _, error = await self._post(message_id, body, answer_has=value)
            except NamesBusy as busy:
                await self._wait_out(busy)
                continue
            if not error:
                self.progress = replace(
                    self.progress,
                    confirmed=self._webhook.url,
                    failures=0,
                    failing_since=None,
                    next_attempt_at=None,
                )
                self._on_change()
                return
            failures += 1
            self._note_failure(error)
            due = self._parts.now() + int(
                min(self._schedule.delay(failures), self._schedule.longest_pause) * SECOND
            )
            self.progress = replace(self.progress, next_attempt_at=due)
            await self._until(due)

    def note_given_up(self, session_id: str) -> None:
        """Counts an event that is not tried again."""
        self.progress = replace(self.progress, given_up=self.progress.given_up + 1)
        self._parts.counts.given_up += 1
        log.warning("webhook event given up", session_id=session_id, **self._webhook.key._asdict())
        self._on_change()

    def note_lost(self) -> None:
        """Records that the log was compacted beyond what was delivered."""
        self.progress = replace(self.progress, lost_before=self._parts.now())
        self._parts.counts.lost += 1
        log.warning("webhook events lost to compaction", **self._webhook.key._asdict())
        self._on_change()

    async def _until(self, at: Micros) -> None:
        while (left := at - self._parts.now()) > 0:
            await asyncio.sleep(min(left / SECOND, POLL_SECONDS))
