"""Pages of lists: the tokens that lead from one to the next, and how much fits into one."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message as Encoded

from runlane_server.core.errors import PageTokenInvalid, Violation
from runlane_server.rpc.seal import seal, unseal
from runlane_server.store.base import Page

PAGE_BYTES = 3 << 20
"""How much a page holds, unless its one item is larger. No item reaches gRPC's 4 MiB: the largest
are a prompt and an attachment, and `config` bounds both."""

FETCHED_AT_ONCE = 128
"""How many items are read from the store at a time: their sizes are known only afterwards."""

_DIGEST_BYTES = 8
ITEM_OVERHEAD = 16
"""More than the tag and the length take that stand before an item in its page."""

Item = TypeVar("Item")
Wire = TypeVar("Wire", bound=Encoded)


class PageTokens:
    """Makes and reads the page tokens of one call: one store, one rpc, one set of filters."""

    def __init__(self, store_id: bytes, rpc: str, *filters: str) -> None:
        digest = hashlib.blake2b(store_id, digest_size=_DIGEST_BYTES)
        for field in (rpc, *filters):
            data = field.encode()
            digest.update(len(data).to_bytes(8, "big") + data)
        self._binding = digest.digest()

    def encode(self, *place: int) -> str:
        """The token that stands for a place."""
        return seal(self._binding + struct.pack(f">{len(place)}q", *place))

    def decode(self, token: str, numbers: int) -> tuple[int, ...] | None:
        """The place of so many numbers; None for the first page. Raises PageTokenInvalid."""
        if not token:
            return None
        payload = unseal(token)
        expected = _DIGEST_BYTES + 8 * numbers
        if payload is None or len(payload) != expected or not payload.startswith(self._binding):
            description = "is not one that this call gave out for these filters"
            raise PageTokenInvalid(
                f"page_token: {description}", violations=[Violation("page_token", description)]
            )
        return struct.unpack_from(f">{numbers}q", payload, _DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class EncodedPage(Generic[Wire]):
    """The items of a page, and the place to go on from, if there is more."""

    items: Sequence[Wire]
    next: int | None


async def collect_page(
    fetch: Callable[[int | None, int], Awaitable[Page[Item, int]]],
    encode: Callable[[Item], Wire],
    *,
    after: int | None,
    limit: int,
) -> EncodedPage[Wire]:
    """A page of up to `limit` items and `PAGE_BYTES`, one item at least.

    `fetch(after, count)` reads from the store; a place is known for the last item only, so what
    does not fit is read again by smaller pieces.
    """
    items: list[Wire] = []
    used = 0
    count = FETCHED_AT_ONCE
    while len(items) < limit:
        page = await fetch(after, min(count, limit - len(items)))
        encoded = [encode(item) for item in page.items]
        size = sum(item.ByteSize() + ITEM_OVERHEAD for item in encoded)
        if used + size > PAGE_BYTES and len(items) + len(encoded) > 1:
            if len(encoded) == 1:
                return EncodedPage(items, after)
            count = len(encoded) // 2
            continue
        items += encoded
        used += size
        after = page.next
        if after is None:
            return EncodedPage(items, None)
    return EncodedPage(items, after)
