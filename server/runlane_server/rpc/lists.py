"""Lists on the wire: their filters, their page tokens, and the edits of what they show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from runlane.v1 import run_service_pb2, session_service_pb2
from runlane_server.core.model import NO_LABELS, Micros, RunState
from runlane_server.engine.editing import SessionChange
from runlane_server.rpc import convert
from runlane_server.rpc.checks import MAX_TITLE_BYTES, Checks
from runlane_server.rpc.page import PageTokens
from runlane_server.store.lookup import ListPlace, RunFilter, RunOrder, SessionFilter, Span

MAX_FILTER_LABELS = 8

_LAST_SECOND = 253_402_300_799
"""9999-12-31T23:59:59Z, the last second of a Timestamp."""

_ORDERS: Mapping[int, RunOrder] = MappingProxyType(
    {
        run_service_pb2.RUN_ORDER_UNSPECIFIED: RunOrder.LATEST_ACCEPTED,
        run_service_pb2.RUN_ORDER_LATEST_ACCEPTED: RunOrder.LATEST_ACCEPTED,
        run_service_pb2.RUN_ORDER_EARLIEST_ACCEPTED: RunOrder.EARLIEST_ACCEPTED,
        run_service_pb2.RUN_ORDER_LATEST_ENDED: RunOrder.LATEST_ENDED,
        run_service_pb2.RUN_ORDER_EARLIEST_ENDED: RunOrder.EARLIEST_ENDED,
    }
)

_IS_DESCENDING: Mapping[int, bool] = MappingProxyType(
    {
        session_service_pb2.SESSION_ORDER_UNSPECIFIED: True,
        session_service_pb2.SESSION_ORDER_LATEST_CREATED: True,
        session_service_pb2.SESSION_ORDER_EARLIEST_CREATED: False,
    }
)

EDITABLE = ("title", "metadata", "agent")
"""The fields of a session that callers may change."""

Wanted = TypeVar("Wanted")


@dataclass(frozen=True, slots=True)
class ListRequest(Generic[Wanted]):
    """The page of a list that a caller asks for; `after` is None for the first."""

    wanted: Wanted
    page_size: int
    after: ListPlace | None
    tokens: PageTokens

    def next_token(self, place: ListPlace | None) -> str:
        """The token of the next page; empty after the last."""
        return "" if place is None else self.tokens.encode(*place)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Makes the page tokens of the lists of a tenant."""

    store_id: bytes
    tenant: str

    def of(self, rpc: str, *filters: object) -> PageTokens:
        """The tokens of a list with these filters."""
        return PageTokens(self.store_id, rpc, self.tenant, *map(repr, filters))


def list_runs(request: run_service_pb2.ListRunsRequest, made: Tokens) -> ListRequest[RunFilter]:
    """Reads the request for a page of runs."""
    checks = Checks()
    checks.identifier("session_id", request.session_id)
    checks.count("states", request.states)
    states = frozenset(
        checks.enum(f"states[{n}]", state, convert.RUN_STATES_FROM.get, RunState.ACCEPTED)
        for n, state in enumerate(request.states)
    )
    checks.agent("agent", request.agent)
    ended = _span(checks, request, "ended")
    order = checks.enum("order", request.order, _ORDERS.get, RunOrder.LATEST_ACCEPTED)
    if ended.is_bounded and request.order == run_service_pb2.RUN_ORDER_UNSPECIFIED:
        order = RunOrder.LATEST_ENDED
    wanted = RunFilter(
        session_id=request.session_id or None,
        states=states,
        agent=request.agent,
        labels=_labels(checks, request.metadata),
        accepted=_span(checks, request, "accepted"),
        ended=ended,
        order=order,
    )
    tokens = made.of(
        "ListRuns",
        wanted.session_id or "",
        wanted.agent,
        str(order),
        wanted.accepted,
        ended,
        *sorted(map(str, states)),
        *sorted(wanted.labels.items()),
    )
    return _page(checks, request, wanted, tokens)


def list_sessions(
    request: session_service_pb2.ListSessionsRequest, made: Tokens
) -> ListRequest[SessionFilter]:
    """Reads the request for a page of sessions."""
    checks = Checks()
    checks.agent("agent", request.agent)
    wanted = SessionFilter(
        agent=request.agent,
        labels=_labels(checks, request.metadata),
        busy=request.busy if request.HasField("busy") else None,
        created=_span(checks, request, "created"),
        is_descending=checks.enum("order", request.order, _IS_DESCENDING.get, fallback=True),
    )
    tokens = made.of(
        "ListSessions",
        wanted.agent,
        wanted.busy,
        wanted.created,
        wanted.is_descending,
        *sorted(wanted.labels.items()),
    )
    return _page(checks, request, wanted, tokens)


def update_session(request: session_service_pb2.UpdateSessionRequest) -> SessionChange:
    """Reads the request to change a session."""
    checks = Checks()
    checks.session_id(request.session_id)
    checks.identifier("etag", request.etag)
    paths = request.update_mask.paths
    if not paths:
        checks.reject("update_mask", f"is missing; name at least one of {', '.join(EDITABLE)}")
    checks.count("update_mask", paths, len(EDITABLE))
    for path in paths:
        if path not in EDITABLE:
            checks.reject("update_mask", f"may name only {', '.join(EDITABLE)}")
    checks.size("title", request.title, MAX_TITLE_BYTES)
    checks.labels("metadata", request.metadata)
    checks.agent("agent", request.agent)
    for name, given in (
        ("title", request.title),
        ("metadata", request.metadata),
        ("agent", request.agent),
    ):
        if given and name not in paths:
            checks.reject(name, "is given, but update_mask does not name it")
    checks.finish()
    return SessionChange(
        title=request.title if "title" in paths else None,
        metadata=(dict(request.metadata) or NO_LABELS) if "metadata" in paths else None,
        agent=request.agent if "agent" in paths else None,
    )


class _Paged(Protocol):
    @property
    def page_size(self) -> int: ...
    @property
    def page_token(self) -> str: ...


def _page(
    checks: Checks, request: _Paged, wanted: Wanted, tokens: PageTokens
) -> ListRequest[Wanted]:
    page_size = checks.page_size(request.page_size)
    found = checks.finish_with(lambda: tokens.decode(request.page_token, 2))
    after = None if found is None else (found[0], found[1])
    return ListRequest(wanted, page_size, after, tokens)


def _labels(checks: Checks, labels: Mapping[str, str]) -> Mapping[str, str]:
    checks.count("metadata", labels, MAX_FILTER_LABELS)
    checks.labels("metadata", labels)
    return dict(labels) or NO_LABELS


def _span(
    checks: Checks,
    request: run_service_pb2.ListRunsRequest | session_service_pb2.ListSessionsRequest,
    what: str,
) -> Span:
    ends = [_time(checks, request, f"{what}_{end}") for end in ("from", "before")]
    return Span(*ends)


def _time(
    checks: Checks,
    request: run_service_pb2.ListRunsRequest | session_service_pb2.ListSessionsRequest,
    name: str,
) -> Micros | None:
    if not request.HasField(name):  # type: ignore[arg-type]
        return None
    time: Timestamp = getattr(request, name)
    if not (0 <= time.seconds <= _LAST_SECOND and 0 <= time.nanos < 1_000_000_000):
        checks.reject(name, "is not a time from 1970 to 9999")
        return None
    # Rounded up: both ends are compared with times of whole microseconds.
    return time.seconds * 1_000_000 - (-time.nanos // 1000)
