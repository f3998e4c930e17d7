"""Iterates over listings page by page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from runlane.types import Message

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class Page(Generic[ItemT]):
    """A page of a listing; `next_page_token` is empty on the last page.

    `total_size` is the number of items over all pages, if it was asked for. There may be more if
    `total_size_is_minimum`.
    """

    items: tuple[ItemT, ...]
    next_page_token: str
    total_size: int | None = None
    total_size_is_minimum: bool = False


class Pager(Generic[ItemT]):
    """A listing: `async for item in pager` iterates over all items and fetches pages as needed.

    `await pager.page(token)` returns one page, `pager.pages()` iterates over the pages. Each step
    may raise the errors of a call.
    """

    def __init__(
        self,
        fetch: Callable[[str], Awaitable[Page[ItemT]]],
        *,
        join: Callable[[AsyncIterator[ItemT]], AsyncIterator[ItemT]] | None = None,
    ) -> None:
        self._fetch = fetch
        self._join = join

    async def page(self, page_token: str = "") -> Page[ItemT]:
        """Returns one page, unchanged; an empty token requests the first page."""
        return await self._fetch(page_token)

    async def pages(self) -> AsyncIterator[Page[ItemT]]:
        """Iterates over all pages, unchanged."""
        page = await self._fetch("")
        yield page
        while page.next_page_token:
            page = await self._fetch(page.next_page_token)
            yield page

    def __aiter__(self) -> AsyncIterator[ItemT]:
        return self._items() if self._join is None else self._join(self._items())

    async def _items(self) -> AsyncIterator[ItemT]:
        async for page in self.pages():
            for item in page.items:
                yield item


async def join_messages(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    """Joins messages that were split at the end of a page."""
    pending: Message | None = None
    async for message in messages:
        joined = message
        if pending is not None and pending.message_id == message.message_id:
            joined = replace(message, parts=pending.parts + message.parts)
        elif pending is not None:
            yield pending
        pending = joined if joined.continues else None
        if pending is None:
            yield joined
    if pending is not None:
        yield pending
