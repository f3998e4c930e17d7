"""Pages of lists: page tokens, and the size limit of a page."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message as Encoded

from runlane_server.core.errors import PageTokenInvalid
from runlane_server.rpc.seal import Seal
from runlane_server.store.base import Page

PAGE_BYTES = 3 << 20
"""Maximum size of a page of several items. A single item may be larger, but stays below gRPC's
4 MiB: the largest items are a prompt and an attachment, and `config` bounds both."""

MESSAGE_BYTES = (4 << 20) - (1 << 12)
"""Maximum size of a message that has nothing but a list, below the limit of gRPC's clients."""

FETCH_SIZE = 128
"""Items per read from the store, since their sizes are known only after the read."""

ITEM_OVERHEAD = 16
"""Upper bound in bytes of the tag and length that precede an item in its page."""

Item = TypeVar("Item")
Place = TypeVar("Place")
Wire = TypeVar("Wire", bound=Encoded)


class PageTokens:
    """Encodes and decodes the page tokens of one store, rpc and set of filters."""

    def __init__(self, store_id: bytes, rpc: str, *filters: str) -> None:
        self._seal = Seal(store_id, "page", rpc, *filters)

    def encode(self, *place: int) -> str:
        """Returns the token of a place."""
        return self._seal.close(struct.pack(f">{len(place)}q", *place))

    def decode(self, token: str, numbers: int) -> tuple[int, ...] | None:
        """Returns the place of a token, as `numbers` integers; None for an empty token.

        Raises PageTokenInvalid.
        """
        if not token:
            return None
        payload = self._seal.open(token)
        if payload is None or len(payload) != 8 * numbers:
            raise PageTokenInvalid.of("page_token", "was not issued by this call for these filters")
        return struct.unpack(f">{numbers}q", payload)

    def encode_id(self, place: str) -> str:
        """Returns the token of a place that is the id of a session; empty for none."""
        return self._seal.close(place.encode()) if place else ""

    def decode_id(self, token: str) -> str:
        """Returns the id of a token; empty for an empty token. Raises PageTokenInvalid."""
        if not token:
            return ""
        payload = self._seal.open(token)
        if payload is not None:
            with suppress(UnicodeDecodeError):
                return payload.decode()
        raise PageTokenInvalid.of("page_token", "was not issued by this call for these filters")


@dataclass(frozen=True, slots=True)
class EncodedPage(Generic[Wire, Place]):
    """The encoded items of a page; `next` is the place of the next page, None after the last."""

    items: Sequence[Wire]
    next: Place | None


async def collect_page(
    fetch: Callable[[Place | None, int], Awaitable[Page[Item, Place]]],
    encode: Callable[[Item], Wire],
    *,
    after: Place | None,
    limit: int,
) -> EncodedPage[Wire, Place]:
    """Collects a page of at most `limit` items and `PAGE_BYTES`; of one item, if that is larger.

    It ends early where a read from the store stops without an item.

    `fetch(after, count)` reads from the store. It returns a place for its last item only, so items
    that do not fit are read again in smaller batches.
    """
    items: list[Wire] = []
    used = 0
    count = FETCH_SIZE
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
        if after is None or not page.items:
            return EncodedPage(items, after)
    return EncodedPage(items, after)
