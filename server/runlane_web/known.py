"""The tokens that the server accepted a moment ago."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress

from runlane.errors import PermissionDenied

KNOWN_SECONDS = 5.0
"""Seconds for which an accepted token is not asked about again."""

MAX_KNOWN = 10_000
"""Maximum number of tokens that are remembered; the oldest is forgotten first."""


class KnownTokens:
    """Asks the server about tokens before anything is spent on their callers.

    Args:
        ask: Makes a cheap call with a token. Raises RunlaneError if the server refuses it.
    """

    def __init__(self, ask: Callable[[str], Awaitable[None]]) -> None:
        self._ask = ask
        self._until: dict[bytes, float] = {}

    async def check(self, token: str) -> None:
        """Returns if the server accepts the token. Raises RunlaneError, Refused."""
        clock = asyncio.get_running_loop().time
        key = hashlib.sha256(token.encode()).digest()
        if self._until.get(key, 0.0) > clock():
            return
        self._until.pop(key, None)
        with suppress(PermissionDenied):  # a token of the server; the call shows what it allows
            await self._ask(token)
        if len(self._until) >= MAX_KNOWN:
            del self._until[next(iter(self._until))]
        self._until[key] = clock() + KNOWN_SECONDS
