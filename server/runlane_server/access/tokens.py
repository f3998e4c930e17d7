"""Tokens: `rl_ID_SECRET`. A server knows the id and a hash of the secret, never the secret."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from base64 import b32encode
from collections.abc import Iterable
from dataclasses import dataclass

from runlane_server.access.caller import Caller
from runlane_server.access.known import Known, Refused

PREFIX = "rl_"
"""What a token begins with; it makes one that was published by mistake easy to search for."""

_ID_BYTES = 10
_SECRET_BYTES = 32
_FORM = re.compile(r"rl_(?P<id>[a-z2-7]{16})_(?P<secret>[a-z2-7]{52})")

ID = re.compile(r"[a-z2-7]{16}")
SHA256 = re.compile(r"[0-9a-f]{64}")

_NO_HASH = "0" * 64
"""What the secret of an unknown id is compared with: an unknown id takes as long as a known one."""


@dataclass(frozen=True, slots=True)
class Token:
    """What a server knows of a token. `expires` is in seconds since 1970; None: never."""

    id: str
    sha256: str
    caller: Caller
    expires: float | None = None


def make() -> tuple[str, str, str]:
    """A new token: its text, its id, and the hash of its secret."""
    token_id, secret = _random(_ID_BYTES), _random(_SECRET_BYTES)
    return f"{PREFIX}{token_id}_{secret}", token_id, hash_of(secret)


def hash_of(secret: str) -> str:
    """What is kept of a secret. It has 256 random bits: a quick hash gives nothing away."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Tokens:
    """The tokens that a server takes."""

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._by_id = {token.id: token for token in tokens}

    def find(self, text: str, now: float) -> Known:
        """Who shows that token. Raises Refused."""
        form = _FORM.fullmatch(text)
        if form is None:
            raise Refused("the token is malformed")
        token = self._by_id.get(form["id"])
        right = hmac.compare_digest(
            hash_of(form["secret"]), _NO_HASH if token is None else token.sha256
        )
        if token is None:
            raise Refused("there is no such token", token_id=form["id"])
        if not right:
            raise Refused("the secret of the token is wrong", token_id=form["id"])
        if token.expires is not None and now >= token.expires:
            raise Refused("the token has expired", token=token.caller.name)
        return Known(token.caller, token.expires)


def _random(size: int) -> str:
    return b32encode(secrets.token_bytes(size)).rstrip(b"=").decode().lower()
