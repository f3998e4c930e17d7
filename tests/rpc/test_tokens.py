"""Cursors and page tokens: issued ones are decoded, all others are refused."""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runlane_server.core.errors import CursorInvalid, PageTokenInvalid
from runlane_server.rpc.cursor import Cursors
from runlane_server.rpc.page import PageTokens
from runlane_server.rpc.seal import Seal

CURSORS = Cursors(b"storeone")
OTHER = Cursors(b"storetwo")
SEAL = Seal(b"storeone", "test")
places = st.integers(min_value=0, max_value=2**63 - 1)
numbers = st.integers(min_value=-(2**63), max_value=2**63 - 1)


@given(places)
def test_a_cursor_is_decoded_to_its_position(position: int) -> None:
    cursor = CURSORS.encode("t", position)
    assert CURSORS.decode("t", cursor) == position
    assert len(cursor) == 28


@given(st.text())
def test_garbage_is_refused_as_a_cursor(text: str) -> None:
    with pytest.raises(CursorInvalid) as refused:
        CURSORS.decode("t", text)
    assert refused.value.violations[0].field == "cursor"


@given(places, st.data())
def test_a_modified_cursor_is_refused(position: int, data: st.DataObject) -> None:
    cursor = CURSORS.encode("t", position)
    at = data.draw(st.integers(min_value=0, max_value=len(cursor) - 1))
    other = data.draw(st.characters(codec="ascii").filter(lambda letter: letter != cursor[at]))
    with pytest.raises(CursorInvalid):
        CURSORS.decode("t", cursor[:at] + other + cursor[at + 1 :])


@pytest.mark.parametrize(
    "change", [str.swapcase, lambda c: c + "=", lambda c: c[:-1], lambda c: f" {c}"]
)
def test_a_cursor_has_one_spelling(change) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CursorInvalid):
        CURSORS.decode("t", change(CURSORS.encode("t", 77)))


def test_a_cursor_of_another_store_is_refused_with_that_reason() -> None:
    with pytest.raises(CursorInvalid, match="for this store"):
        CURSORS.decode("t", OTHER.encode("t", 5))


def test_a_cursor_of_another_tenant_is_refused_like_one_of_another_store() -> None:
    with pytest.raises(CursorInvalid, match="for this store"):
        CURSORS.decode("t", CURSORS.encode("u", 5))


def test_a_cursor_cannot_be_made_from_others() -> None:
    """Without the key, bytes of known cursors combine to no other."""
    raw = [urlsafe_b64decode(CURSORS.encode("t", position)) for position in (5, 6)]
    for at in range(1, len(raw[0])):
        mixed = raw[0][:at] + raw[1][at:]
        if mixed in raw:
            continue  # the bytes from here on are equal by chance
        with pytest.raises(CursorInvalid):
            CURSORS.decode("t", urlsafe_b64encode(mixed).decode())


def test_a_cursor_reveals_neither_its_position_nor_how_far_another_one_is() -> None:
    raw = [urlsafe_b64decode(CURSORS.encode("t", position)) for position in range(100, 132)]
    # No byte but that of the version is the same in all, or counts.
    for column in list(zip(*raw, strict=True))[1:]:
        assert len(set(column)) > 16
        assert list(column) != sorted(column)


def test_a_cursor_from_before_the_key_is_refused() -> None:
    body = b"\x01" + bytes(8) + (5).to_bytes(8, "big")
    old = urlsafe_b64encode(body + binascii.crc32(body).to_bytes(4, "big")).decode()
    with pytest.raises(CursorInvalid):
        CURSORS.decode("t", old)


@pytest.mark.parametrize("text", ["\ud800", "A" * 5, "\0", "A" * 100_000, "é", "=", "A" * 28])
def test_a_text_that_is_no_seal_opens_to_nothing(text: str) -> None:
    assert SEAL.open(text) is None


def test_a_page_token_is_refused_as_a_cursor() -> None:
    with pytest.raises(CursorInvalid):
        CURSORS.decode("t", PageTokens(b"storeone", "ListRuns").encode(1, 2))


def test_another_version_is_refused() -> None:
    sealed = urlsafe_b64decode(SEAL.close(b"payloads") + "===")
    other = urlsafe_b64encode(b"\x03" + sealed[1:]).rstrip(b"=").decode()
    assert SEAL.open(other) is None


@given(st.binary(max_size=100))
def test_a_sealed_payload_is_unsealed(payload: bytes) -> None:
    assert SEAL.open(SEAL.close(payload)) == payload


@given(st.lists(numbers, min_size=1, max_size=3))
def test_a_page_token_is_decoded_to_its_place(place: list[int]) -> None:
    tokens = PageTokens(b"storeone", "ListRuns", "default")
    assert tokens.decode(tokens.encode(*place), len(place)) == tuple(place)


def test_an_empty_page_token_is_the_first_page() -> None:
    assert PageTokens(b"storeone", "ListRuns").decode("", 1) is None


@pytest.mark.parametrize(
    "others",
    [
        PageTokens(b"storetwo", "ListRuns", "default", "a"),
        PageTokens(b"storeone", "ListSessions", "default", "a"),
        PageTokens(b"storeone", "ListRuns", "default", "b"),
        PageTokens(b"storeone", "ListRuns", "default", "a", ""),
        PageTokens(b"storeone", "ListRuns", "defaulta"),
    ],
    ids=["other store", "other call", "other filter", "one filter more", "other split"],
)
def test_a_page_token_of_another_call_is_refused(others: PageTokens) -> None:
    tokens = PageTokens(b"storeone", "ListRuns", "default", "a")
    with pytest.raises(PageTokenInvalid) as refused:
        tokens.decode(others.encode(1), 1)
    assert refused.value.violations[0].field == "page_token"


@given(st.text(min_size=1))
def test_garbage_is_refused_as_a_page_token(text: str) -> None:
    with pytest.raises(PageTokenInvalid):
        PageTokens(b"storeone", "ListRuns").decode(text, 1)


def test_a_page_token_of_another_length_is_refused() -> None:
    tokens = PageTokens(b"storeone", "ListMessages")
    with pytest.raises(PageTokenInvalid):
        tokens.decode(tokens.encode(1), 3)
