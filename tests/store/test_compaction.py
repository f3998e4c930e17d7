"""How much of the event log each tenant may keep."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runlane_server.store.compaction import CompactedPositions, largest_log

SIZES = st.lists(st.integers(1, 1_000), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("sizes", "keep", "largest"),
    [
        ([], 0, None),
        ([10, 20], None, None),
        ([10, 20], 30, None),
        ([10, 20], 29, 19),
        ([100, 100, 100], 30, 10),
        ([1, 100, 100], 31, 15),
        ([5, 10, 90], 60, 45),
        ([7], 0, 0),
    ],
)
def test_large_logs_share_what_small_ones_leave(
    sizes: list[int], keep: int | None, largest: int | None
) -> None:
    assert largest_log(sizes, keep) == largest


@given(SIZES, st.integers(0, 5_000))
def test_no_log_is_cut_below_an_equal_share(sizes: list[int], keep: int) -> None:
    largest = largest_log(sizes, keep)
    if largest is None:
        assert sum(sizes) <= keep
        return
    kept = sum(min(size, largest) for size in sizes)
    assert keep - len(sizes) < kept <= keep < sum(sizes)
    assert largest >= keep // len(sizes)


def test_positions_are_those_of_a_tenant_and_of_all() -> None:
    compacted = CompactedPositions({"": 5, "a": 9})
    assert (compacted.of("a"), compacted.of("b"), compacted.latest) == (9, 5, 9)
    compacted.note("b", 7)
    compacted.note("a", 8)
    assert (compacted.of("a"), compacted.of("b"), compacted.latest) == (9, 7, 9)
    assert (CompactedPositions().of("a"), CompactedPositions().latest) == (0, 0)
