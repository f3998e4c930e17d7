"""Reads the event log in order: terminal events, and the input requests between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import merge
from typing import TypeAlias

from runlane_server.core.input import InputRequest
from runlane_server.core.model import RunComplete
from runlane_server.feed.feed import Feed
from runlane_server.store.base import EventFilter, LogPage, Store
from runlane_server.store.webhooks import INPUT_REQUESTED, RUN_ENDED, Place, WebhookFilter

INPUTS = 100
"""Input requests that are read at a time."""

LOOK_SECONDS = 10.0
"""Seconds after which an idle reader asks the store in any case, and its place moves on."""

SESSION_EVENTS = 32
SESSION_BYTES = 256 << 10
"""The most events of one session that are read at a time."""

Body: TypeAlias = RunComplete | InputRequest


@dataclass(frozen=True, slots=True)
class Entry:
    """An event of the log. `before` is the place up to which the log was read before it."""

    place: Place
    before: Place
    body: Body

    @property
    def session_id(self) -> str:
        return self.body.session_id

    @property
    def run_id(self) -> str:
        return self.body.run_id

    @property
    def size(self) -> int:
        """The approximate size in characters."""
        if isinstance(self.body, RunComplete):
            return 500 + len(self.body.text) + len(self.body.result)
        question = self.body.question
        return 500 + len(question.text) + len(question.arguments_json) + len(question.schema_json)

    @property
    def kind(self) -> str:
        return RUN_ENDED if isinstance(self.body, RunComplete) else INPUT_REQUESTED


class LogReader:
    """A position in the log of a tenant. `last_input` is a recent place of the last input request
    of all tenants: while it is behind, an idle reader does not ask the store."""

    def __init__(
        self,
        store: Store,
        feed: Feed,
        tenant: str,
        wanted: WebhookFilter,
        *,
        after: Place,
        last_input: Callable[[], Place],
        run_id: str = "",
    ) -> None:
        """Raises CursorCompacted."""
        self.place = after
        self._store = store
        self._tenant = tenant
        self._wants_inputs = not wanted.kinds or INPUT_REQUESTED in wanted.kinds
        self._last_input = last_input
        ids = frozenset[str]() if wanted.session_prefixes else wanted.session_ids
        events = EventFilter(run_ids=frozenset({run_id})) if run_id else EventFilter(ids)
        self._subscription = feed.subscribe(tenant, events, after.position)
        self._page: LogPage | None = None
        self._loop = asyncio.get_running_loop()
        self._look_at = 0.0

    def close(self) -> None:
        """Ends the subscription."""
        self._subscription.close()

    async def next(self, timeout: float) -> Sequence[Entry]:
        """The next entries; none after `timeout` seconds. `place` is then behind them.

        Raises CursorCompacted, and Draining once the feed is closed.
        """
        if self._page is None:
            self._page = await self._subscription.next(timeout)
        page = self._page
        if not page.events and self._is_idle():
            # The place stays, so that a request that was committed just now is not passed.
            self._page = None
            return ()
        self._look_at = self._loop.time() + LOOK_SECONDS
        inputs = await self._inputs(page)
        end = Place(page.scanned)
        if len(inputs) == INPUTS:
            # There may be more, before events of the page.
            end = inputs[-1][0]
        else:
            self._page = None
            if inputs:
                end = max(end, inputs[-1][0])
        events = [(Place(event.position), event.complete) for event in page.events]
        entries: list[Entry] = []
        for place, body in merge(events, inputs, key=lambda found: found[0]):
            if self.place < place <= end:
                entries.append(Entry(place, self.place, body))
                self.place = place
        self.place = max(self.place, end)
        return entries

    def _is_idle(self) -> bool:
        """Whether there is probably no input request to read."""
        return self._last_input() <= self.place and self._loop.time() < self._look_at

    async def _inputs(self, page: LogPage) -> list[tuple[Place, Body]]:
        if not self._wants_inputs:
            return []
        found = await self._store.webhooks.inputs(
            self._tenant, after=self.place, upto=page.scanned, limit=INPUTS
        )
        return [(one.place, one.request) for one in found]


async def session_entries(
    store: Store, tenant: str, session_id: str, *, after: Place, upto: Place
) -> Sequence[Entry]:
    """The next entries of one session after a place and up to another, in order."""
    page = await store.completes(
        tenant,
        EventFilter(frozenset({session_id})),
        after=after.position,
        limit=SESSION_EVENTS,
        max_bytes=SESSION_BYTES,
    )
    inputs = await store.webhooks.inputs(
        tenant, after=after, upto=page.scanned, limit=INPUTS, session_id=session_id
    )
    end = min(upto, inputs[-1].place) if len(inputs) == INPUTS else upto
    if len(page.events) == SESSION_EVENTS or page.scanned < upto.position:
        end = min(end, Place(page.scanned + 1))
    events: list[tuple[Place, Body]] = [
        (Place(event.position), event.complete) for event in page.events
    ]
    requests: list[tuple[Place, Body]] = [(one.place, one.request) for one in inputs]
    entries: list[Entry] = []
    for place, body in merge(events, requests, key=lambda found: found[0]):
        if after < place <= end:
            entries.append(Entry(place, after, body))
            after = place
    return entries
