"""The gRPC metadata of calls, including the bearer token."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

from runlane.targets import is_local

Metadata: TypeAlias = tuple[tuple[str, str], ...]

_TOKEN = re.compile(r"[!-~]+")
_KEY = re.compile(r"[a-z0-9_.-]+")
_VALUE = re.compile(r"[ -~]*")


class MetadataSource:
    """Provides the metadata for each call, with the current token.

    Args:
        metadata: Sent with every call.
        token: The bearer token, or a callable that returns the token for each call.

    Raises:
        ValueError: gRPC cannot send the metadata or the token, or both set `authorization`.
    """

    def __init__(
        self, metadata: Mapping[str, str], token: str | Callable[[], str] | None = None
    ) -> None:
        check_metadata(metadata)
        self._metadata: Metadata = tuple((key.lower(), value) for key, value in metadata.items())
        self._token = token
        if token is not None and any(key == "authorization" for key, _ in self._metadata):
            raise ValueError("token: metadata already has 'authorization'; set either one")
        if isinstance(token, str):
            _check_token(token)

    def current(self) -> Metadata:
        """Returns the metadata for a call. Propagates errors of the token callable."""
        if self._token is None:
            return self._metadata
        token = self._token if isinstance(self._token, str) else self._token()
        _check_token(token)
        return (*self._metadata, ("authorization", f"Bearer {token}"))


def check_token_target(target: str, remedy: str) -> None:
    """Raises ValueError if a plaintext connection to the target could expose the token."""
    if not is_local(target):
        raise ValueError(f"token: would be sent unencrypted to {target}; {remedy}")


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises ValueError for metadata that gRPC would reject on every call."""
    for key, value in metadata.items():
        if _KEY.fullmatch(key.lower()) is None:
            raise ValueError(f"metadata: key {key!r} may contain only ASCII letters, digits, '-_.'")
        if not key.lower().endswith("-bin") and _VALUE.fullmatch(value) is None:
            raise ValueError(f"metadata: the value of {key!r} may contain only printable ASCII")


def _check_token(token: str) -> None:
    # gRPC would reject the token too, and include it in the error.
    if _TOKEN.fullmatch(token) is None:
        raise ValueError("token: may contain only printable ASCII characters without spaces")
