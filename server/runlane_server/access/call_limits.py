"""Limits of the calls in flight and of the answers that callers have not taken.

They bound the memory that callers hold who call without reading: per tenant, per connection, and
for methods without authentication per host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from runlane_server.core.errors import Overloaded

MAX_CALLS = 4096
"""Calls of a tenant in flight, without the long-lived ones, for which there is a quota. A call is
in flight until its answer has been sent."""

MAX_PUBLIC_CALLS = 1024
"""Calls of a host in flight to methods without authentication."""

MAX_UNSENT = 64 << 20
"""Bytes of answers to a tenant that were not sent yet, because its callers do not read them."""

MAX_UNSENT_ON_CONNECTION = 16 << 20
"""The same on one connection. The largest answer has 4 MiB."""

SMALL_ANSWER = 16 << 10
"""Bytes; answers up to this size are bounded by the number of calls."""

RETRY_AFTER = 1.0
"""Seconds until a refused caller may retry."""


KeyT = TypeVar("KeyT")


class Holder(NamedTuple):
    """The maker of a call: a tenant, or a host that calls a method without authentication."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


_MOST: Mapping[str, int] = MappingProxyType({"tenant": MAX_CALLS, "host": MAX_PUBLIC_CALLS})


class CallLimits:
    """Counts the calls in flight on this node, and the bytes of their unsent answers."""

    def __init__(self) -> None:
        self._calls: Counter[Holder] = Counter()
        self._unsent: Counter[Holder | str] = Counter()

    def begin(self, holder: Holder, connection: str, *, counted: bool = True) -> CallInFlight:
        """Counts a call until it is closed. Raises Overloaded.

        Of one that is not `counted`, only the answer is. `connection` is empty if it is unknown.
        """
        most, calls = _MOST[holder.kind], self._calls.get(holder, 0)
        if counted and calls >= most:
            raise Overloaded(f"{holder} has {most} calls in flight", retry_after=RETRY_AFTER)
        if self._unsent:
            self.check_unsent(holder, connection, 0)
        if counted:
            self._calls[holder] = calls + 1
        return CallInFlight(self, holder, connection, int(counted))

    def end(self, holder: Holder, connection: str, *, calls: int, unsent: int) -> None:
        """Stops counting a call, with the bytes of its answer."""
        if calls:
            _subtract(self._calls, holder, calls)
        if unsent:
            _subtract(self._unsent, holder, unsent)
            _subtract(self._unsent, connection, unsent)

    def add_unsent(self, holder: Holder, connection: str, size: int) -> None:
        """Counts an answer that is about to be sent."""
        self._unsent[holder] += size
        self._unsent[connection] += size

    def check_unsent(self, holder: Holder, connection: str, more: int) -> None:
        """Raises Overloaded if too much would be unsent with `more` bytes."""
        of: Holder | str
        for of, who, most in (
            (holder, holder, MAX_UNSENT),
            (connection, "this connection", MAX_UNSENT_ON_CONNECTION),
        ):
            held = self._unsent.get(of, 0)
            if of and held and held + more >= most:
                raise Overloaded(
                    f"{who} has {held} bytes of answers that were not read; the limit is {most}",
                    retry_after=RETRY_AFTER,
                )

    def unsent_of(self, tenant: str) -> int:
        """Bytes of answers to a tenant that were not sent yet."""
        return self._unsent[Holder("tenant", tenant)]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is counted."""
        return not (self._calls or self._unsent)


class CallInFlight:
    """A counted call. `close` may be called any number of times."""

    def __init__(self, limits: CallLimits, holder: Holder, connection: str, calls: int) -> None:
        self._limits = limits
        self._holder = holder
        self._connection = connection
        self._calls = calls
        self._unsent = 0
        self._open = True

    def answer(self, size: int, *, may_refuse: bool) -> None:
        """Counts the answer until it is sent. Raises Overloaded if it `may_refuse` to send it."""
        if size <= SMALL_ANSWER:
            return
        if may_refuse:
            self._limits.check_unsent(self._holder, self._connection, size)
        self._unsent = size
        self._limits.add_unsent(self._holder, self._connection, size)

    def close(self) -> None:
        """Stops counting the call."""
        if self._open:
            self._open = False
            self._limits.end(self._holder, self._connection, calls=self._calls, unsent=self._unsent)


def _subtract(counts: Counter[KeyT], key: KeyT, by: int) -> None:
    counts[key] -= by
    if not counts[key]:
        del counts[key]
