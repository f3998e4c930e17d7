"""Cursors and page tokens on the wire: encrypted and authenticated, so that nobody else makes one.

A seal hides its content (positions in the log count the runs of all tenants) and is bound to what
it is for, such as a tenant or the filters of a list. It is deterministic: a payload has one text.

The construction is SIV: the tag authenticates context and payload, and is the nonce of the
encryption. Equal payloads get equal texts, which is intended, and nothing else repeats a nonce.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import b64decode, urlsafe_b64encode

VERSION = b"\x02"
"""Version 1 was a checksum without a key."""

MAX_TEXT = 256
"""Characters; no sealed text is longer."""

_TAG_BYTES = 12
_KEY_BYTES = 32
_BLOCK_BYTES = 64


class Seal:
    """Seals payloads for one purpose. `key` is a secret of the store.

    `context` is what a seal is bound to: the same texts are required to open it.
    """

    def __init__(self, key: bytes, *context: str) -> None:
        bound = b"".join(_framed(part.encode()) for part in context)
        # Keyed once and copied for each use, which is faster.
        tag_key, cipher_key = (_derive(key, use, bound) for use in (b"tag", b"cipher"))
        self._tag_hash = hashlib.blake2b(key=tag_key, digest_size=_TAG_BYTES)
        self._cipher_hash = hashlib.blake2b(key=cipher_key)

    def close(self, payload: bytes) -> str:
        """Seals a payload as base64url without padding."""
        tag = self._tag(payload)
        sealed = VERSION + tag + self._crypt(tag, payload)
        return urlsafe_b64encode(sealed).rstrip(b"=").decode()

    def open(self, text: str) -> bytes | None:
        """Returns the payload; None if this seal did not produce the text. Never raises."""
        if len(text) > MAX_TEXT:
            return None
        try:
            sealed = b64decode(
                text.encode() + b"=" * (-len(text) % 4), altchars=b"-_", validate=True
            )
        except (ValueError, UnicodeEncodeError):
            return None
        head = len(VERSION)
        tag, hidden = sealed[head : head + _TAG_BYTES], sealed[head + _TAG_BYTES :]
        payload = self._crypt(tag, hidden)
        if not hmac.compare_digest(tag, self._tag(payload)):
            return None
        # Sealing again checks the version and the spelling at once.
        return payload if self.close(payload) == text else None

    def _tag(self, payload: bytes) -> bytes:
        tag = self._tag_hash.copy()
        tag.update(payload)
        return tag.digest()

    def _crypt(self, tag: bytes, data: bytes) -> bytes:
        size = len(data)
        stream = b"".join(self._block(tag, at) for at in range(0, size, _BLOCK_BYTES))
        mixed = int.from_bytes(data, "big") ^ int.from_bytes(stream[:size], "big")
        return mixed.to_bytes(size, "big")

    def _block(self, tag: bytes, at: int) -> bytes:
        block = self._cipher_hash.copy()
        block.update(tag + at.to_bytes(4, "big"))
        return block.digest()


def _derive(key: bytes, purpose: bytes, bound: bytes) -> bytes:
    return hashlib.blake2b(_framed(purpose) + bound, key=key, digest_size=_KEY_BYTES).digest()


def _framed(part: bytes) -> bytes:
    """A part with its length, so that no two lists of parts look alike."""
    return len(part).to_bytes(8, "big") + part
