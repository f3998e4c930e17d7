"""Pages: no item is lost between two pages, and no page reaches 4 MiB."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runlane.v1 import session_pb2, session_service_pb2
from runlane_server.core.model import Attachment, Message, Part, Role, Text
from runlane_server.rpc.page import FETCH_SIZE, PAGE_BYTES, collect_page
from runlane_server.rpc.transcript import Mark, lay_out
from runlane_server.store.base import MessagePlace, Page

GRPC_LIMIT = 4 << 20


class Numbers:
    """A list of item sizes in bytes; a place is the index of the last item read."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.reads = 0

    async def fetch(self, after: int | None, count: int) -> Page[int, int]:
        self.reads += 1
        first = 0 if after is None else after + 1
        items = tuple(self.sizes[first : first + count])
        last = first + len(items) - 1
        return Page(items, last if last + 1 < len(self.sizes) else None)


def as_session(size: int) -> session_pb2.Session:
    return session_pb2.Session(title="x" * size)


async def pages_of(numbers: Numbers, limit: int) -> list[list[int]]:
    pages: list[list[int]] = []
    after: int | None = None
    while True:
        page = await collect_page(numbers.fetch, as_session, after=after, limit=limit)
        pages.append([len(item.title) for item in page.items])
        if page.next is None:
            return pages
        after = page.next


@pytest.mark.parametrize("limit", [1, 7, 1000])
@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [10],
        [10] * 300,
        [PAGE_BYTES - 100, 200, 300],
        [3 << 19, 3 << 19, 10],
        [1 << 18] * 40,
        [10] * 100 + [PAGE_BYTES] + [10] * 100,
    ],
    ids=["none", "one", "many small", "almost full", "two halves", "large", "one huge"],
)
async def test_pages_hold_every_item_once_and_in_order(sizes: list[int], limit: int) -> None:
    pages = await pages_of(Numbers(sizes), limit)
    assert [size for page in pages for size in page] == sizes
    for page in pages:
        assert len(page) <= limit
        assert sum(page) <= PAGE_BYTES or len(page) == 1
    assert not sizes or all(pages)


async def test_a_page_of_small_items_is_full() -> None:
    numbers = Numbers([10] * 1500)
    page = await collect_page(numbers.fetch, as_session, after=None, limit=1000)
    assert len(page.items) == 1000
    assert numbers.reads == -(-1000 // FETCH_SIZE)


# --- The transcript -----------------------------------------------------------------------------


def message(ordinal: int, *parts: Part) -> Message:
    return Message(
        message_id=f"m{ordinal}",
        run_id="r",
        turn=1,
        ordinal=ordinal,
        role=Role.ASSISTANT,
        parts=parts,
        finish_reason=None,
        model="",
        created_at=1,
    )


def read(
    transcript: Sequence[Message], after: MessagePlace, limit: int
) -> Page[Message, MessagePlace]:
    rest = [held for held in transcript if (held.turn, held.ordinal) > after]
    items = tuple(rest[:limit])
    return Page(items, (items[-1].turn, items[-1].ordinal) if len(rest) > limit else None)


def responses_for(
    transcript: Sequence[Message], limit: int
) -> list[session_service_pb2.ListMessagesResponse]:
    responses: list[session_service_pb2.ListMessagesResponse] = []
    start: Mark | None = None
    while True:
        after = (0, -1) if start is None else start.read_after
        layout = lay_out(read(transcript, after, limit), start)
        token = "t" * 100 if layout.next else ""
        responses.append(
            session_service_pb2.ListMessagesResponse(
                messages=layout.messages, next_page_token=token
            )
        )
        if layout.next is None:
            return responses
        start = layout.next


def rejoined(
    responses: Sequence[session_service_pb2.ListMessagesResponse],
) -> list[tuple[str, list[str]]]:
    """Joins the pages of a transcript as a client does."""
    whole: list[tuple[str, list[str]]] = []
    goes_on = False
    for response in responses:
        for n, held in enumerate(response.messages):
            texts = [part.text or part.attachment.data.decode() for part in held.parts]
            if goes_on:
                assert n == 0
                assert whole[-1][0] == held.message_id
                whole[-1][1].extend(texts)
            else:
                whole.append((held.message_id, texts))
            goes_on = held.continues
            assert not goes_on or n == len(response.messages) - 1
    assert not goes_on
    return whole


part_sizes = st.sampled_from([0, 1, 1000, 1 << 18, 1 << 20, 3 << 19, PAGE_BYTES])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(part_sizes, max_size=6), max_size=6),
    st.integers(min_value=1, max_value=4),
)
def test_the_pages_of_a_transcript_add_up_to_all_messages(
    sizes: list[list[int]], limit: int
) -> None:
    transcript = [
        message(n, *(Text(chr(97 + k) * size) for k, size in enumerate(parts)))
        for n, parts in enumerate(sizes)
    ]
    responses = responses_for(transcript, limit)
    for response in responses:
        assert response.ByteSize() < GRPC_LIMIT
        assert len(response.messages) <= limit
    assert rejoined(responses) == [
        (held.message_id, [part.text for part in held.parts if isinstance(part, Text)])
        for held in transcript
    ]


def test_the_largest_message_is_split_across_pages() -> None:
    prompt = message(
        0, Text("p" * (1 << 20)), Attachment("a" * 255, "text/plain", b"d" * (2 << 20))
    )
    first, second = responses_for([prompt], 50)
    assert first.messages[0].continues
    assert not second.messages[0].continues
    assert max(first.ByteSize(), second.ByteSize()) < GRPC_LIMIT
