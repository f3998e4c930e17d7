"""The tokens that the server accepted a moment ago."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress

from runlane.errors import PermissionDenied

KNOWN_SECONDS = 5.0
"""Seconds for which an accepted token is not asked about again before a body is read."""

CONFIRMED_SECONDS = 0.5
"""The same before anything is done with a body that has arrived. A revoked token is refused by the
server within a second, and here as soon."""

MAX_KNOWN = 10_000
"""Maximum number of tokens that are remembered; the oldest is forgotten first."""


class KnownTokens:
    """Asks the server about tokens before anything is spent on their callers.

    Args:
        ask: Makes a cheap call with a token. Raises RunlaneError if the server refuses it.
    """

    def __init__(self, ask: Callable[[str], Awaitable[None]]) -> None:
        self._ask = ask
        self._accepted: dict[bytes, float] = {}

    async def check(self, token: str) -> None:
        """Returns if the server accepts the token. Raises RunlaneError, Refused."""
        await self._check(token, KNOWN_SECONDS)

    async def confirm(self, token: str) -> None:
        """Returns if the server still accepts the token. Raises RunlaneError, Refused."""
        await self._check(token, CONFIRMED_SECONDS)

    async def _check(self, token: str, seconds: float) -> None:
        clock = asyncio.get_running_loop().time
        key = hashlib.sha256(token.encode()).digest()
        if key in self._accepted and clock() - self._accepted[key] < seconds:
            return
        self._accepted.pop(key, None)
        asked = clock()
        with suppress(PermissionDenied):  # a token of the server; the call shows what it allows
            await self._ask(token)
        if len(self._accepted) >= MAX_KNOWN:
            del self._accepted[next(iter(self._accepted))]
        self._accepted[key] = asked
