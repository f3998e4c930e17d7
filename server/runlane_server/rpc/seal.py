"""Short binary records as opaque text, with a version and a checksum to detect garbage."""

from __future__ import annotations

import binascii
from base64 import b64decode, urlsafe_b64encode

VERSION = b"\x01"

_CHECK_BYTES = 4


def seal(payload: bytes) -> str:
    """Encodes a payload as base64url without padding."""
    body = VERSION + payload
    sealed = body + binascii.crc32(body).to_bytes(_CHECK_BYTES, "big")
    return urlsafe_b64encode(sealed).rstrip(b"=").decode()


def unseal(text: str) -> bytes | None:
    """Returns the payload, or None if `seal` did not produce the text."""
    try:
        sealed = b64decode(text.encode() + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, UnicodeEncodeError):
        return None
    payload = sealed[1:-_CHECK_BYTES]
    # Sealing again checks version, checksum and spelling at once: a payload has one text only.
    return payload if seal(payload) == text else None
