"""Requests for filtered lists, and for changes of what they show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from runlane import convert
from runlane.arguments import build
from runlane.pager import Page
from runlane.types import RunOrder, RunState, SessionOrder
from runlane.v1 import run_service_pb2 as runs_pb
from runlane.v1 import session_service_pb2 as sessions_pb

ItemT = TypeVar("ItemT")


def runs_request(
    session_id: str | None,
    states: Iterable[RunState],
    order: RunOrder | None,
    times: Mapping[str, datetime | None],
    **fields: Any,
) -> runs_pb.ListRunsRequest:
    """The request for a list of runs. Raises ValueError and TypeError."""
    name = "UNSPECIFIED" if order is None else convert.to_member("order", RunOrder, order).name
    return build(
        runs_pb.ListRunsRequest,
        session_id=session_id or "",
        states=map(convert.to_run_state, convert.to_tuple("states", states)),
        order=runs_pb.RunOrder.Value(f"RUN_ORDER_{name}"),
        **fields,
        **_timestamps(times),
    )


def sessions_request(
    order: SessionOrder | None, times: Mapping[str, datetime | None], **fields: Any
) -> sessions_pb.ListSessionsRequest:
    """The request for a list of sessions. Raises ValueError and TypeError."""
    name = "UNSPECIFIED" if order is None else convert.to_member("order", SessionOrder, order).name
    return build(
        sessions_pb.ListSessionsRequest,
        order=sessions_pb.SessionOrder.Value(f"SESSION_ORDER_{name}"),
        **fields,
        **_timestamps(times),
    )


def update_session_request(
    session_id: str, etag: str, **changes: Any
) -> sessions_pb.UpdateSessionRequest:
    """The request to change the fields that are not None. Raises ValueError if all are."""
    given = {name: value for name, value in changes.items() if value is not None}
    if not given:
        raise ValueError(f"nothing to change: give at least one of {', '.join(changes)}")
    request = build(sessions_pb.UpdateSessionRequest, session_id=session_id, etag=etag, **given)
    request.update_mask.paths.extend(given)
    return request


def page(
    items: tuple[ItemT, ...],
    response: runs_pb.ListRunsResponse | sessions_pb.ListSessionsResponse,
    *,
    with_total_size: bool,
) -> Page[ItemT]:
    """A page of a list."""
    total = response.total_size if with_total_size else None
    return Page(items, response.next_page_token, total, response.total_size_is_minimum)


def _timestamps(times: Mapping[str, datetime | None]) -> dict[str, Timestamp]:
    return {name: _timestamp(name, at) for name, at in times.items() if at is not None}


def _timestamp(name: str, at: datetime) -> Timestamp:
    if not isinstance(at, datetime):
        raise TypeError(f"{name}: expected a datetime, not {type(at).__name__}")
    if at.tzinfo is None:
        raise ValueError(f"{name}: has no time zone; use datetime(..., tzinfo=UTC)")
    stamp = Timestamp()
    stamp.FromDatetime(at.astimezone(UTC).replace(tzinfo=None))
    return stamp
