"""The signature of a delivery, as Standard Webhooks define it (standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Iterable

PREFIX = "whsec_"
"""The prefix of a secret; its key follows as base64."""

KEY_BYTES = 32
MIN_KEY_BYTES = 24
MAX_KEY_BYTES = 64

SECRET_FORM = f"{PREFIX} and the base64 of {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes"


def new_secret() -> str:
    """A new random secret."""
    return PREFIX + base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def is_secret(text: str) -> bool:
    """Whether the text is a valid secret (`SECRET_FORM`)."""
    if not text.startswith(PREFIX) or not text.isascii():
        return False
    try:
        size = len(base64.b64decode(text.removeprefix(PREFIX), validate=True))
    except binascii.Error:
        return False
    return MIN_KEY_BYTES <= size <= MAX_KEY_BYTES


def signed_headers(
    keys: Iterable[str], message_id: str, seconds: int, body: bytes
) -> dict[str, str]:
    """The headers of a delivery, with one signature for each secret."""
    signed = f"{message_id}.{seconds}.".encode() + body
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(seconds),
        "webhook-signature": " ".join(f"v1,{_sign(key, signed)}" for key in keys),
    }


def _sign(secret: str, signed: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(PREFIX))
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
