"""An event is encoded once, however many subscribers read it."""

from __future__ import annotations

import pytest

from runlane.v1 import run_service_pb2 as pb
from runlane_server.core.model import RunEvent, TextDelta
from runlane_server.rpc import event_cache
from runlane_server.rpc.event_cache import RunEventCache


def event(index: int, text: str, run_id: str = "r1") -> RunEvent:
    return RunEvent(run_id, index, 1_000_000, TextDelta(text))


def encode(cache: RunEventCache, one: RunEvent) -> bytes:
    return cache.encode("s", one, is_shared=True)


def text_in(encoded: bytes) -> str:
    return pb.SubscribeRunResponse.FromString(encoded).event.text_delta.text


def test_an_event_is_encoded_once() -> None:
    cache, one = RunEventCache(), event(1, "a")
    assert text_in(encode(cache, one)) == "a"
    assert encode(cache, one) is encode(cache, one)


def test_another_event_at_the_same_place_has_its_own_encoding() -> None:
    """Two tenants may use the same run id."""
    cache = RunEventCache()
    one, other = event(1, "a"), event(1, "b")
    assert [text_in(encode(cache, e)) for e in (one, other, one)] == ["a", "b", "a"]


def test_the_older_encodings_are_dropped_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_cache, "MAX_BYTES", 16 << 10)
    cache = RunEventCache()
    events = [event(n, "x" * 1000) for n in range(1, 16)]
    first, *_, last = [encode(cache, one) for one in events]
    assert encode(cache, events[-1]) is last
    assert encode(cache, events[0]) is not first
    assert encode(cache, events[0]) == first


def test_an_event_of_one_follower_is_not_kept() -> None:
    cache, one = RunEventCache(), event(1, "a")
    encoded = cache.encode("s", one, is_shared=False)
    assert encoded == encode(cache, one)
    assert encoded is not encode(cache, one)
