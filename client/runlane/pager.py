"""Listings that come in pages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from runlane.types import Message

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class Page(Generic[ItemT]):
    """One page of a listing; `next_page_token` is empty on the last."""

    items: tuple[ItemT, ...]
    next_page_token: str


class Pager(Generic[ItemT]):
    """A listing: `async for item in pager` goes over all of it, asking for pages as it gets there.

    `await pager.page(token)` gets one page, `pager.pages()` iterates over them. Each step may raise
    what a call can raise.
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
        """One page, as the server sent it; an empty token asks for the first."""
        return await self._fetch(page_token)

    async def pages(self) -> AsyncIterator[Page[ItemT]]:
        """All pages, as the server sent them."""
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
    """Puts messages that were cut at the end of a page together again."""
    begun: Message | None = None
    async for message in messages:
        whole = message
        if begun is not None and begun.message_id == message.message_id:
            whole = replace(message, parts=begun.parts + message.parts)
        elif begun is not None:
            yield begun
        begun = whole if whole.continues else None
        if begun is None:
            yield whole
    if begun is not None:
        yield begun
