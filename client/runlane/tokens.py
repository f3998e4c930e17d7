"""What is shown with every call to say who makes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

Metadata: TypeAlias = tuple[tuple[str, str], ...]

_PRINTABLE = re.compile(r"[!-~]+")


class Shown:
    """The metadata of calls, with the token that holds at the time.

    `token` is a text, or is called for each call and returns one. Raises ValueError if both it and
    the metadata say who calls, and if it cannot be sent.
    """

    def __init__(
        self, metadata: Mapping[str, str], token: str | Callable[[], str] | None = None
    ) -> None:
        self._metadata: Metadata = tuple((key.lower(), value) for key, value in metadata.items())
        self._token = token
        if token is not None and any(key == "authorization" for key, _ in self._metadata):
            raise ValueError("give either a token, or 'authorization' among the metadata")
        if isinstance(token, str):
            _check(token)

    def now(self) -> Metadata:
        """What goes with a call that is made now. What the token's callable raises is raised."""
        if self._token is None:
            return self._metadata
        token = self._token if isinstance(self._token, str) else self._token()
        _check(token)
        return (*self._metadata, ("authorization", f"Bearer {token}"))


def _check(token: str) -> None:
    # gRPC would refuse it too, and show it.
    if _PRINTABLE.fullmatch(token) is None:
        raise ValueError("a token has printable ASCII characters only, and no spaces")
