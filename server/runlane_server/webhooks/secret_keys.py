"""Encrypts the secrets of webhooks for the store, with keys that the store does not hold.

An encrypted secret is bound to its webhook: a person who can write to the store cannot move it to
another one. It names its key by a digest, so that a missing key can be named.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from runlane_server.core.errors import SettingsError
from runlane_server.extras import require
from runlane_server.private_file import read_private_lines
from runlane_server.store.webhooks import Webhook, WebhookKey
from runlane_server.webhooks.signature import PREFIX

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

OPTION = "--webhook-keys"

KEY_BYTES = 32
MAX_KEYS = 8

_SEALED = "sealed:1:"
"""The beginning of an encrypted secret; the id of its key, `:` and base64 follow."""

_NONCE_BYTES = 12


class SecretLocked(Exception):
    """A secret cannot be decrypted. The text names the remedy."""


class SecretKeys:
    """The keys by id; the first one encrypts. Without keys secrets are stored as they are."""

    def __init__(self, keys: Sequence[bytes] = ()) -> None:
        self._ciphers = _ciphers(keys)
        self._current = next(iter(self._ciphers), None)

    @classmethod
    def read(cls, path: str | None) -> SecretKeys:
        """The keys of a file, one a line, the current one first. Raises StartError."""
        if path is None:
            return cls()
        require("cryptography", OPTION)
        lines = enumerate(read_private_lines(Path(path), OPTION), 1)
        keys = [_key(path, n, line) for n, line in lines if line.strip() and line[0] != "#"]
        if not keys:
            raise SettingsError(
                f"{OPTION}: {path} has no key; run: openssl rand -base64 {KEY_BYTES} > {path}"
            )
        if len(keys) > MAX_KEYS:
            raise SettingsError(f"{OPTION}: {path} has more than {MAX_KEYS} keys")
        return cls(keys)

    def __bool__(self) -> bool:
        return self._current is not None

    def seal(self, key: WebhookKey, secret: str) -> str:
        """A secret as the store keeps it."""
        if self._current is None:
            return secret
        nonce = os.urandom(_NONCE_BYTES)
        hidden = self._ciphers[self._current].encrypt(nonce, secret.encode(), _bound_to(key))
        return f"{_SEALED}{self._current}:{b64encode(nonce + hidden).decode()}"

    def open(self, key: WebhookKey, stored: str) -> str:
        """The secret that `seal` returned a text for. Raises SecretLocked."""
        if not is_sealed(stored):
            return stored
        key_id, _, text = stored.removeprefix(_SEALED).partition(":")
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise SecretLocked(
                f"the secret is encrypted with the key {key_id!r}, which {OPTION} does not have; "
                "add that key, or rotate the secret"
            )
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - not without keys

        try:
            sealed = b64decode(text, validate=True)
            nonce, hidden = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
            return cipher.decrypt(nonce, hidden, _bound_to(key)).decode()
        except (InvalidTag, ValueError):
            raise SecretLocked(
                "the stored secret is damaged or belongs to another webhook; rotate the secret"
            ) from None

    def open_all(self, webhook: Webhook) -> Sequence[str]:
        """The current secret, and the one before it if there is one that can be decrypted."""
        current, *older = webhook.secrets
        return (self.open(webhook.key, current), *self._openable(webhook.key, older))

    def sealed(self, webhook: Webhook) -> Webhook:
        """The webhook with its secrets encrypted by the current key; the same object if they are.

        Raises SecretLocked.
        """
        of_run = webhook.of_run
        hidden = of_run.headers if of_run is not None else ""
        headers = self.open(webhook.key, hidden)
        is_current = all(map(self._is_current, webhook.secrets)) and (
            not headers or self._is_sealed_now(hidden)
        )
        if self._current is None or is_current:
            self.open_all(webhook)
            return webhook
        if of_run is not None and headers:
            of_run = replace(of_run, headers=self.seal(webhook.key, headers))
        secrets = tuple(self.seal(webhook.key, secret) for secret in self.open_all(webhook))
        return replace(webhook, secrets=secrets, of_run=of_run)

    def headers(self, webhook: Webhook) -> Mapping[str, str]:
        """The further headers of each delivery. Raises SecretLocked."""
        if webhook.of_run is None or not webhook.of_run.headers:
            return {}
        found: Mapping[str, str] = json.loads(self.open(webhook.key, webhook.of_run.headers))
        return found

    def rotated(self, webhook: Webhook, secret: str, until: int | None) -> Webhook:
        """The webhook with a new secret. The one before signs too up to a time, in microseconds,
        unless that is None or the secret cannot be decrypted."""
        kept = self._openable(webhook.key, webhook.secrets[:1]) if until is not None else ()
        secrets = tuple(self.seal(webhook.key, one) for one in (secret, *kept))
        return replace(webhook, secrets=secrets, old_secret_until=until if kept else None)

    def _is_current(self, stored: str) -> bool:
        return not stored.startswith(PREFIX) and (
            not is_sealed(stored) or self._is_sealed_now(stored)
        )

    def _is_sealed_now(self, stored: str) -> bool:
        """Whether it is encrypted, with the current key."""
        return stored.startswith(f"{_SEALED}{self._current}:")

    def _openable(self, key: WebhookKey, stored: Sequence[str]) -> Sequence[str]:
        found = []
        for one in stored:
            try:
                found.append(self.open(key, one))
            except SecretLocked:
                continue
        return found


def is_sealed(stored: str) -> bool:
    """Whether a stored secret is encrypted."""
    return stored.startswith(_SEALED)


def _ciphers(keys: Sequence[bytes]) -> Mapping[str, AESGCM]:
    if not keys:
        return MappingProxyType({})
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - of an extra

    return MappingProxyType({_key_id(key): AESGCM(key) for key in keys})


def _key_id(key: bytes) -> str:
    return hashlib.blake2b(key, digest_size=4, person=b"runlane-hook").hexdigest()


def _bound_to(key: WebhookKey) -> bytes:
    # A tenant's name has no zero byte.
    return f"{key.tenant}\0{key.webhook_id}".encode()


def _key(path: str, number: int, line: str) -> bytes:
    # The line is not repeated: it may be a secret.
    try:
        key = b64decode(line.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise SettingsError(
            f"{OPTION}: {path}, line {number}: is not the base64 of {KEY_BYTES} bytes"
        )
    return key


NO_KEYS = SecretKeys()
