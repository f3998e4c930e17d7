"""Short-lived tokens for browsers, made by a caller that has a token of the server.

A grant lets its holder use one session for one purpose, on behalf of the caller that made it. It
lives in the memory of one gateway: after a restart the holder asks its backend for another.
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from google.protobuf.message import Message
from google.rpc import code_pb2  # type: ignore[import-untyped]

from runlane_web.errors import Refused
from runlane_web.routes import Route

PREFIX = "rlg_"
"""The prefix of the token of a grant; no token of a server begins with it."""

MAX_SECONDS = 3600
"""Maximum lifetime of a grant."""

TICKET_SECONDS = 30
"""Lifetime of a ticket, which stands in an address and is therefore used once."""

MAX_GRANTS = 10_000
MAX_PER_CALLER = 1_000

_OF_RUN = frozenset({"GetRun", "WaitRun", "SubscribeRun"})
"""Rpcs that name a run only; the session of the run must be the grant's."""

_READ = _OF_RUN | {
    "GetSession",
    "ListInputRequests",
    "ListMessages",
    "ListRuns",
    "SubscribeRunComplete",
    "SubscribeSession",
}

PURPOSES: Mapping[str, frozenset[str]] = MappingProxyType(
    {"follow": _READ, "chat": _READ | {"RunAccepted", "Cancel"}}
)
"""The rpcs that a grant of each purpose allows, for its session only."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The rights of the holder of a token.

    Attributes:
        authority: The token of the caller that made the grant.
        purpose: A key of `PURPOSES`.
        session_id: The session.
        expires: When it ends, by the monotonic clock in seconds.
    """

    authority: str
    purpose: str
    session_id: str
    expires: float

    def check(self, route: Route, request: Message) -> bool:
        """Checks that a call is for this purpose and session. Raises Refused.

        Returns:
            False if the request names a run only, whose session remains to be looked up.
        """
        if route.rpc.name not in PURPOSES[self.purpose]:
            raise _denied(f"the token is for the purpose {self.purpose!r} only")
        if route.rpc.name not in _OF_RUN and _sessions_of(request) != [self.session_id]:
            raise other_session()
        if getattr(request, "allow_missing", False):
            raise _denied("allow_missing: the token is for an existing session")
        return route.rpc.name not in _OF_RUN


@dataclass(frozen=True, slots=True)
class Ticket:
    """Stands for a token, on one path, once.

    Attributes:
        token: The token.
        authority: The token of the server behind it.
        path: The path.
        expires: When it ends, by the monotonic clock in seconds.
    """

    token: str
    authority: str
    path: str
    expires: float


def _sessions_of(request: Message) -> list[str]:
    names = request.DESCRIPTOR.fields_by_name
    if "session_ids" in names:
        return [] if getattr(request, "run_ids", ()) else list(request.session_ids)  # type: ignore[attr-defined]
    return [request.session_id]  # type: ignore[attr-defined]


def other_session() -> Refused:
    """The error of a call for another session than the token's."""
    return _denied("session_id: the token is for another session")


def expired() -> Refused:
    """The error of a grant that is not in force, or no longer."""
    return Refused(
        code_pb2.UNAUTHENTICATED,
        "UNAUTHENTICATED",
        "Authorization: the token has expired; ask for another",
        field="Authorization",
    )


def _denied(message: str) -> Refused:
    return Refused(code_pb2.PERMISSION_DENIED, "PERMISSION_DENIED", message)


class Grants:
    """The grants that are in force.

    Args:
        clock: Returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._grants: dict[str, Grant] = {}
        self._ends: list[tuple[float, str]] = []
        self._grants_of: Counter[str] = Counter()
        # All live equally long, so they stand in the order of their ends.
        self._tickets: dict[str, Ticket] = {}
        self._tickets_of: Counter[str] = Counter()

    def make(self, authority: str, purpose: str, session_id: str, seconds: float) -> str:
        """Makes a grant and returns its token. Raises Refused if there are too many."""
        self._drop_expired()
        if len(self._grants) >= MAX_GRANTS or self._grants_of[authority] >= MAX_PER_CALLER:
            raise Refused(code_pb2.RESOURCE_EXHAUSTED, "OVERLOADED", "too many tokens are in force")
        token = PREFIX + secrets.token_urlsafe(32)
        expires = self._clock() + seconds
        self._grants[token] = Grant(authority, purpose, session_id, expires)
        self._grants_of[authority] += 1
        heapq.heappush(self._ends, (expires, token))
        return token

    def authority(self, token: str) -> str:
        """The token of the server that a caller's token stands for. Raises Refused."""
        return self.find(token).authority if token.startswith(PREFIX) else token

    def find(self, token: str) -> Grant:
        """Returns the grant of a token. Raises Refused if there is none in force."""
        grant = self._grants.get(token)
        if grant is None or grant.expires <= self._clock():
            raise expired()
        return grant

    def seconds_left(self, token: str) -> float | None:
        """For how long a token may be used; None: the server decides. Raises Refused."""
        return self.find(token).expires - self._clock() if token.startswith(PREFIX) else None

    def make_ticket(self, token: str, path: str) -> str:
        """Makes a ticket: it opens one path, once, as the holder of the token would.

        Raises Refused if there are too many, or the token is a grant's that has expired.
        """
        authority = self.authority(token)
        self._drop_expired()
        if len(self._tickets) >= MAX_GRANTS or self._tickets_of[authority] >= MAX_PER_CALLER:
            raise Refused(code_pb2.RESOURCE_EXHAUSTED, "OVERLOADED", "too many tickets are open")
        ticket = secrets.token_urlsafe(32)
        expires = self._clock() + TICKET_SECONDS
        self._tickets[ticket] = Ticket(token, authority, path, expires)
        self._tickets_of[authority] += 1
        return ticket

    def redeem(self, ticket: str, path: str) -> str:
        """Returns the token behind a ticket, and ends the ticket. Raises Refused."""
        found = self._end_ticket(ticket)
        if found is None or found.path != path or found.expires <= self._clock():
            raise Refused(
                code_pb2.UNAUTHENTICATED,
                "UNAUTHENTICATED",
                "ticket: is for another path, was used, or has expired",
                field="ticket",
            )
        return found.token

    def _end_ticket(self, ticket: str) -> Ticket | None:
        found = self._tickets.pop(ticket, None)
        if found is not None:
            _take_one(self._tickets_of, found.authority)
        return found

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            _, token = heapq.heappop(self._ends)
            _take_one(self._grants_of, self._grants.pop(token).authority)
        while self._tickets:
            oldest = next(iter(self._tickets))
            if self._tickets[oldest].expires > now:
                return
            self._end_ticket(oldest)


def _take_one(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]
