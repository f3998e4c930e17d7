"""The oldest position of a session from which a stream can still be resumed (R51)."""

from __future__ import annotations

from runlane_server.core.errors import CursorCompacted
from runlane_server.core.model import Accepted, RunKey, SessionKey, Started
from runlane_server.feed.session_topics import PAGE_ENTRIES
from runlane_server.feed.sessions import SessionPlace
from runlane_server.feed.tail import PAGE_BYTES
from runlane_server.store.base import Store
from runlane_server.store.lane_log import LanePlace, is_output

_LAST: LanePlace = (1 << 63) - 1
"""After all events: a page there has the start of the log, and no event that may be removed."""


async def oldest_place(store: Store, key: SessionKey) -> SessionPlace:
    """The position at the start of the log. The output of the run that was active there comes
    after it, from the last event of that run which has a place of its own.

    While a run is being removed there is no such output; the start moves behind its end then.
    """
    page = await store.lane_events(key, after=_LAST, limit=1, max_bytes=1)
    start = SessionPlace(page.created_at or 0, page.start)
    try:
        run_id, index = await _active_at(store, key, page.start)
    except CursorCompacted:
        return start
    return start._replace(run_id=run_id, event_index=index)


async def _active_at(store: Store, key: SessionKey, start: LanePlace) -> tuple[str, int]:
    """The run that was active at a place, and the last of its events that has a place up to it.

    The log has lost its start, so the next events tell: its end, or the start of another run.
    """
    # Before the read: what happens in between is in the log.
    active = (await store.load_lane(key)).active
    accepted = set[str]()
    after = start
    while True:
        page = await store.lane_events(key, after=after, limit=PAGE_ENTRIES, max_bytes=PAGE_BYTES)
        for entry in page.entries:
            event = entry.event
            if isinstance(event.body, Accepted):
                accepted.add(event.run_id)
            elif event.run_id not in accepted:
                mark = await _mark(store, RunKey(key.tenant, event.run_id), event.index)
                if mark:
                    return event.run_id, mark
            if isinstance(event.body, Started):
                return "", 0
        if not page.entries:
            break
        after = page.entries[-1].place
    if active is None:
        return "", 0
    mark = await _mark(store, RunKey(key.tenant, active.run_id), active.events + 1)
    return (active.run_id, mark) if mark else ("", 0)


async def _mark(store: Store, key: RunKey, before: int) -> int:
    """The last event of a run before an index that has a place; 0 if it had not started."""
    mark, after, has_started = 0, 0, False
    while after < before - 1:
        events = await store.run_events(key, after=after, limit=PAGE_ENTRIES, max_bytes=PAGE_BYTES)
        if not events:
            break  # its session was deleted in the meantime
        after = events[-1].index
        for event in events:
            if event.index < before and not is_output(event.body):
                mark = event.index
                has_started |= isinstance(event.body, Started)
    return mark if has_started else 0
