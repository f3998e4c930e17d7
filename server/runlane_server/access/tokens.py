"""Tokens: `rl_ID_SECRET`. A server knows the id and a hash of the secret, never the secret."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from base64 import b32encode
from collections.abc import Iterable
from dataclasses import dataclass

from runlane_server.access.caller import AuthenticationFailed, Caller, Identity

PREFIX = "rl_"
"""Prefix of every token. It makes a token that was published by mistake easy to find."""

_ID_BYTES = 10
_SECRET_BYTES = 32
_FORM = re.compile(r"rl_(?P<id>[a-z2-7]{16})_(?P<secret>[a-z2-7]{52})")

ID = re.compile(r"[a-z2-7]{16}")
SHA256 = re.compile(r"[0-9a-f]{64}")

_NO_HASH = "0" * 64
"""Compared with the secret of an unknown id, so that known and unknown ids take equally long."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token as a server stores it. `expires` is in seconds since 1970; None: never."""

    id: str
    sha256: str
    caller: Caller
    expires: float | None = None


def make() -> tuple[str, str, str]:
    """Generates a token; returns its text, its id, and the hash of its secret."""
    token_id, secret = _random(_ID_BYTES), _random(_SECRET_BYTES)
    return f"{PREFIX}{token_id}_{secret}", token_id, hash_of(secret)


def hash_of(secret: str) -> str:
    """The stored hash of a secret. A fast hash is safe, since a secret has 256 random bits."""
    return hashlib.sha256(secret.encode()).hexdigest()


class TokenVerifier:
    """Verifies tokens against those that the server knows."""

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._by_id = {token.id: token for token in tokens}

    def verify(self, text: str, now: float) -> Identity:
        """Returns the identity behind a token. Raises AuthenticationFailed."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise AuthenticationFailed("malformed token")
        token = self._by_id.get(match["id"])
        is_right = hmac.compare_digest(
            hash_of(match["secret"]), _NO_HASH if token is None else token.sha256
        )
        if token is None:
            raise AuthenticationFailed("unknown token id", token_id=match["id"])
        if not is_right:
            raise AuthenticationFailed("wrong token secret", token_id=match["id"])
        if token.expires is not None and now >= token.expires:
            raise AuthenticationFailed("token expired", token=token.caller.name)
        return Identity(token.caller, token.expires)


def _random(size: int) -> str:
    return b32encode(secrets.token_bytes(size)).rstrip(b"=").decode().lower()
