"""Signatures by which the nodes of one store recognize each other's calls.

A node never sends a key. It sends a bearer token that names the run it follows and proves that it
knows the key. The token is valid at one node, for one run, for a short time, so a stranger who
receives it, for example at the port of a dead node, can use it nowhere else.
"""

from __future__ import annotations

import hmac
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from runlane_server.access.caller import AuthenticationFailed

PREFIX = "rlnode_"
"""Begins every bearer token of a node."""

VALID_SECONDS = 30
"""How far the clocks of two nodes, and the time of a call, may be apart."""

SETTLE_SECONDS = 15.0
"""Time after which every node has read a new key. Until then the key before it signs."""

_FORM = re.compile(
    r"rlnode_(?P<signed>(?P<time>\d{1,12})_(?P<tenant>(?:[0-9a-f]{2})*)_(?P<run>(?:[0-9a-f]{2})*))"
    r"_(?P<mac>[0-9a-f]{64})"
)


class NodeCall(NamedTuple):
    """The permission of a signature: to follow one run of a tenant."""

    tenant: str
    run_id: str


class NodeKeys:
    """The keys of a store: one, or two during a rotation. Both are valid.

    Args:
        keys: The keys, newest first; none on a server whose store is not shared.
        now: Returns seconds since 1970.
    """

    def __init__(self, keys: Sequence[str] = (), now: Callable[[], float] = time.time) -> None:
        self.address = ""
        """The address at which other nodes reach this one, once it is bound."""
        self._keys = tuple(keys)
        self._now = now
        self._changed = -math.inf

    def replace(self, keys: Sequence[str]) -> bool:
        """Takes the keys that the store has now, newest first. Returns whether they are others."""
        if tuple(keys) == self._keys:
            return False
        self._keys, self._changed = tuple(keys), self._now()
        return True

    def sign(self, address: str, tenant: str, run_id: str) -> str:
        """Returns the bearer token for a call to the node at an address, which follows a run."""
        is_settled = self._now() - self._changed >= SETTLE_SECONDS
        key = self._keys[0 if is_settled else -1]
        signed = f"{int(self._now())}_{tenant.encode().hex()}_{run_id.encode().hex()}"
        return f"{PREFIX}{signed}_{_mac(key, address, signed)}"

    def verify(self, text: str, *, is_open: bool = False) -> NodeCall:
        """Returns what a bearer token permits at this node. Raises AuthenticationFailed.

        `is_open` is for a call that was authenticated at its start: the age does not matter.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise AuthenticationFailed("malformed node signature")
        macs = [_mac(key, self.address, match["signed"]) for key in self._keys]
        if not any(hmac.compare_digest(match["mac"], mac) for mac in macs):
            raise AuthenticationFailed("wrong node signature")
        if not is_open and abs(self._now() - int(match["time"])) > VALID_SECONDS:
            raise AuthenticationFailed("outdated node signature; compare the clocks of the nodes")
        try:
            return NodeCall(*(bytes.fromhex(match[part]).decode() for part in ("tenant", "run")))
        except ValueError:
            raise AuthenticationFailed("malformed node signature") from None


def _mac(key: str, address: str, signed: str) -> str:
    text = f"runlane node call 1\n{address}\n{signed}"
    return hmac.new(key.encode(), text.encode(), "sha256").hexdigest()
