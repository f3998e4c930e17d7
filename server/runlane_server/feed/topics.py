"""Under which topics terminal events are published: an event wakes only whom it concerns."""

from __future__ import annotations

from collections.abc import Hashable

from runlane_server.store.base import EventFilter, LoggedComplete

_EVERYTHING: Hashable = None


def topics_of_event(event: LoggedComplete) -> tuple[Hashable, ...]:
    """Under which topics an event is published."""
    complete = event.complete
    return (
        (event.tenant, _EVERYTHING),
        (event.tenant, "session", complete.session_id),
        (event.tenant, "run", complete.run_id),
    )


def topics_of_filter(tenant: str, wanted: EventFilter) -> tuple[Hashable, ...]:
    """Which topics a filter needs."""
    if wanted.matches_all:
        return ((tenant, _EVERYTHING),)
    return (
        *((tenant, "session", session_id) for session_id in wanted.session_ids),
        *((tenant, "run", run_id) for run_id in wanted.run_ids),
    )
