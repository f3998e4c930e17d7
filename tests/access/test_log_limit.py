"""The log lines of refused calls are limited, per caller and in total."""

from __future__ import annotations

from structlog.testing import capture_logs

from runlane_server.access.log_limit import CALLERS, LINES, LINES_PER_CALLER, LogLimit


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_caller_has_60_lines_a_minute_and_others_keep_theirs() -> None:
    clock = Clock()
    limit = LogLimit(clock)
    assert sum(limit.admits("a") for _ in range(10_000)) == LINES_PER_CALLER == 60
    assert limit.admits("b")
    clock.now = 60.0
    with capture_logs() as logs:
        assert limit.admits("a")
    assert logs == [
        {"event": "refused calls not logged", "log_level": "warning", "count": 9_940, "callers": 2}
    ]


def test_all_callers_have_1000_lines_a_minute_and_few_are_counted() -> None:
    limit = LogLimit(Clock())
    assert sum(limit.admits(f"caller {n}") for n in range(100_000)) == LINES == 1_000
    assert len(limit._lines) <= CALLERS + 1


def test_a_clock_that_goes_back_begins_a_new_window() -> None:
    clock = Clock()
    limit = LogLimit(clock)
    assert sum(limit.admits("a") for _ in range(100)) == 60
    clock.now = -10.0
    assert limit.admits("a")
