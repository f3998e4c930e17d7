"""What is shown with every call to say who makes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

from runlane.places import is_local

Metadata: TypeAlias = tuple[tuple[str, str], ...]

_PRINTABLE = re.compile(r"[!-~]+")
_KEY = re.compile(r"[a-z0-9_.-]+")
_VALUE = re.compile(r"[ -~]*")


class Shown:
    """The metadata of calls, with the token that holds at the time.

    `token` is a text, or is called for each call and returns one. Raises ValueError if both it and
    the metadata say who calls, and if it cannot be sent.
    """

    def __init__(
        self, metadata: Mapping[str, str], token: str | Callable[[], str] | None = None
    ) -> None:
        check_sendable(metadata)
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


def check_stays_here(target: str, otherwise: str) -> None:
    """Raises ValueError if a token would go to another machine unencrypted."""
    if not is_local(target):
        raise ValueError(f"the token would go to {target} unencrypted: {otherwise}")


def check_sendable(metadata: Mapping[str, str]) -> None:
    """Raises ValueError for what gRPC would refuse when the call is made, each time anew."""
    for key, value in metadata.items():
        if _KEY.fullmatch(key.lower()) is None:
            raise ValueError(f"metadata: {key!r} has more than ASCII letters, digits and '-_.'")
        if not key.lower().endswith("-bin") and _VALUE.fullmatch(value) is None:
            raise ValueError(f"metadata: the value of {key!r} has more than printable ASCII")


def _check(token: str) -> None:
    # gRPC would refuse it too, and show it.
    if _PRINTABLE.fullmatch(token) is None:
        raise ValueError("a token has printable ASCII characters only, and no spaces")
