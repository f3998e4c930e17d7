"""The results of an agent's steps: each is done once per run, over all attempts (R39).

The journal is kept in the events of the run: a result is stored like output of the attempt, so an
attempt that was fenced off cannot add to it, and it is removed with the session.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from runlane.worker.steps import take_step
from runlane_server.core.model import RunKey, StepResult
from runlane_server.core.transition import LaneRun
from runlane_server.store.base import Store
from runlane_server.store.retry import retry_read

FIRST_EVENTS = 2
"""Events of a run whose first attempt has just started: `accepted` and `started`."""

PAGE_EVENTS = 1000
PAGE_BYTES = 1 << 18

StoreStep = Callable[[str, object], Awaitable[StepResult]]
"""Makes the result of a step durable, and returns it as it was stored."""


class StepJournal:
    """The steps of one run, as one attempt sees them."""

    def __init__(self, store: Store, key: RunKey, run: LaneRun, store_step: StoreStep) -> None:
        self._store = store
        self._key = key
        self._last = run.events
        self._store_step = store_step
        self._results: dict[str, str] = {}
        self._is_loaded = run.events <= FIRST_EVENTS
        self._working: set[str] = set()

    async def step(self, key: str, work: Callable[[], Any]) -> Any:
        """Does the work of a step unless its result is stored. Returns the result."""
        return await take_step(self, key, work, self._working)

    async def find_step(self, key: str) -> str | None:
        """The stored result of a step, as JSON."""
        if not self._is_loaded:
            await self._load()
        return self._results.get(key)

    def remember(self, step: StepResult) -> None:
        """Takes the result of a step that was added to the output."""
        self._results[step.key] = step.json

    async def keep_step(self, key: str, result: object) -> str:
        """Makes the result of a step durable. Returns it as JSON; the first one of a key counts."""
        known = await self.find_step(key)
        if known is None:
            known = self._results[key] = (await self._store_step(key, result)).json
        return known

    async def _load(self) -> None:
        """Reads the steps of earlier attempts."""
        after = 0
        while after < self._last:
            page = await retry_read(self._store, partial(self._page, after))
            for event in page:
                if isinstance(event.body, StepResult):
                    self._results.setdefault(event.body.key, event.body.json)
                after = event.index
            if not page:
                break
        self._is_loaded = True

    async def _page(self, after: int) -> Any:
        return await self._store.run_events(
            self._key, after=after, limit=PAGE_EVENTS, max_bytes=PAGE_BYTES
        )
