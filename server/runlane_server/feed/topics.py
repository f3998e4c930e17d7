"""Topics: an event wakes only the subscriptions that wait for one of its topics."""

from __future__ import annotations

from collections.abc import Hashable

from runlane_server.store.base import EventFilter, LoggedComplete

_EVERYTHING: Hashable = None


def topics_of_event(event: LoggedComplete) -> tuple[Hashable, ...]:
    """The topics of a terminal event."""
    complete = event.complete
    return (
        (event.tenant, _EVERYTHING),
        (event.tenant, "session", complete.session_id),
        (event.tenant, "run", complete.run_id),
    )


def topics_of_filter(tenant: str, wanted: EventFilter) -> tuple[Hashable, ...]:
    """The topics that a subscription waits for."""
    if wanted.matches_all:
        return ((tenant, _EVERYTHING),)
    return (
        *((tenant, "session", session_id) for session_id in wanted.session_ids),
        *((tenant, "run", run_id) for run_id in wanted.run_ids),
    )
