"""Resolves the hosts of endpoints.

The names are those of tenants, and so are some of the name servers. A lookup cannot be cancelled:
it keeps its thread until the name server answers or the system gives up. So a tenant has few, and
many tenants together leave some for others:

- A lookup that hangs gives its place back, up to a limit of such lookups; it keeps its thread.
- A tenant whose lookup hung has a few places together with all such tenants for a minute, and twice
  as long each time that it does so again. One that never did has all others.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from runlane_server.webhooks.shares import Shares

RESOLVERS = 64
"""Lookups at a time of tenants whose names do not hang."""

SLOW_RESOLVERS = 16
"""Lookups at a time of the others."""

MAX_HANGING = 432
"""Lookups that hang, besides these."""

SLOW_SECONDS = 1.0
"""A lookup hangs that takes longer."""

BACKOFF_SECONDS = 60.0
"""Time for which a tenant counts as slow, after its first lookup that hung."""

MAX_BACKOFF_SECONDS = 3600.0
"""The longest such time."""

LOOKUPS_OF_TENANT = 2
"""Threads that one tenant may hold."""

WAIT_SECONDS = 3.0
"""Seconds that a lookup waits for a thread."""


class NamesBusy(Exception):
    """No thread is free to resolve a name. The endpoint is not to blame."""


class Backoffs:
    """The tenants whose lookups hung lately. Times are those of the running loop."""

    def __init__(self) -> None:
        self._backoffs: dict[str, tuple[float, float]] = {}

    def holds(self, tenant: str) -> bool:
        """Whether the tenant counts as slow now."""
        until, _ = self._backoffs.get(tenant, (0.0, 0.0))
        return asyncio.get_running_loop().time() < until

    def add(self, tenant: str) -> None:
        """A lookup of the tenant hung."""
        now = asyncio.get_running_loop().time()
        self._drop_old(now)
        until, seconds = self._backoffs.get(tenant, (0.0, 0.0))
        if now < until:
            return  # lookups that began together count once
        seconds = min(seconds * 2 or BACKOFF_SECONDS, MAX_BACKOFF_SECONDS)
        self._backoffs[tenant] = now + seconds, seconds

    def _drop_old(self, now: float) -> None:
        """Forgets the tenants that did not do it again for as long as they counted as slow."""
        kept = self._backoffs.items()
        self._backoffs = {name: one for name, one in kept if now < one[0] + one[1]}


class Lookup:
    """A place that a lookup holds, until it is done or hangs."""

    def __init__(self, names: Names, shares: Shares, tenant: str) -> None:
        self._names = names
        self._shares = shares
        self._tenant = tenant
        self._is_hanging = False
        self._timer = asyncio.get_running_loop().call_later(SLOW_SECONDS, self._hang)

    def _hang(self) -> None:
        self._names.backoffs.add(self._tenant)
        if self._shares is self._names.shares and self._names.hanging < MAX_HANGING:
            self._is_hanging = True
            self._names.hanging += 1
            self._shares.release(self._tenant)

    def end(self, _: object = None) -> None:
        """Its thread is free again."""
        self._timer.cancel()
        if self._is_hanging:
            self._names.hanging -= 1
        else:
            self._shares.release(self._tenant)


class Names:
    """Looks up addresses, for all tenants of a node."""

    def __init__(self) -> None:
        threads = RESOLVERS + SLOW_RESOLVERS + MAX_HANGING
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="webhook-names")
        self.shares = Shares(RESOLVERS, LOOKUPS_OF_TENANT)
        self.slow_shares = Shares(SLOW_RESOLVERS, 1)
        self.backoffs = Backoffs()
        self.hanging = 0

    def close(self) -> None:
        """Starts no further lookup."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def addresses(self, host: str, tenant: str) -> Sequence[str]:
        """The addresses of a host; none if it has none. Raises NamesBusy.

        An address needs no thread, in any spelling that the system accepts.
        """
        return _look_up(host, socket.AI_NUMERICHOST) or await self._resolve(host, tenant)

    async def _resolve(self, host: str, tenant: str) -> Sequence[str]:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                shares = await self._acquire(tenant)
        except TimeoutError:
            raise NamesBusy("name resolution is busy") from None
        place = Lookup(self, shares, tenant)
        loop = asyncio.get_running_loop()
        try:
            lookup = loop.run_in_executor(self._threads, _look_up, host)
        except BaseException:
            place.end()
            raise
        # A caller that waits no longer does not end the lookup, nor free its thread.
        lookup.add_done_callback(place.end)
        return await asyncio.shield(lookup)

    async def _acquire(self, tenant: str) -> Shares:
        """Takes a place for a tenant; returns where."""
        if not self.backoffs.holds(tenant):
            await self.shares.acquire(tenant)
            if not self.backoffs.holds(tenant):
                return self.shares
            # Another lookup of the tenant hung meanwhile.
            self.shares.release(tenant)
        await self.slow_shares.acquire(tenant)
        return self.slow_shares


def _look_up(host: str, flags: int = 0) -> Sequence[str]:
    try:
        found: Sequence[Any] = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError):  # no such name, or one that no name server can be asked for
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
