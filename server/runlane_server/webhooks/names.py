"""Resolves the hosts of endpoints.

The names are those of tenants, and so are some of the name servers. A lookup cannot be cancelled:
it keeps its thread until the name server answers or the system gives up. So a tenant has few, and
many tenants together leave some for others.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from runlane_server.webhooks.shares import Shares

RESOLVERS = 64
"""Threads that resolve names."""

LOOKUPS_OF_TENANT = 2
"""Threads that one tenant may hold."""

WAIT_SECONDS = 3.0
"""Seconds that a lookup waits for a thread."""


class NamesBusy(Exception):
    """No thread is free to resolve a name. The endpoint is not to blame."""


class Names:
    """Looks up addresses, for all tenants of a node."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="webhook-names")
        self.shares = Shares(RESOLVERS, LOOKUPS_OF_TENANT)

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
                await self.shares.acquire(tenant)
        except TimeoutError:
            raise NamesBusy("name resolution is busy") from None

        def release(_: object) -> None:
            self.shares.release(tenant)

        loop = asyncio.get_running_loop()
        try:
            lookup = loop.run_in_executor(self._threads, _look_up, host)
        except BaseException:
            release(None)
            raise
        # A caller that waits no longer does not end the lookup, nor free its thread.
        lookup.add_done_callback(release)
        return await asyncio.shield(lookup)


def _look_up(host: str, flags: int = 0) -> Sequence[str]:
    try:
        found: Sequence[Any] = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError):  # no such name, or one that no name server can be asked for
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
