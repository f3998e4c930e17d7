"""Runs that workers give back: what counts, and what is kept of it."""

from __future__ import annotations

from runlane_server.agents.worker.returns import MAX_RETURNS, MAX_RUNS, MAX_WORKERS, Returns
from runlane_server.core.model import RunKey

KEY = RunKey("default", "r")


def test_hand_backs_by_ever_new_workers_count_in_the_end() -> None:
    returns = Returns()
    added = [returns.add(KEY, f"w{n}") for n in range(MAX_WORKERS + MAX_RETURNS)]
    assert added == [False] * (MAX_WORKERS + MAX_RETURNS - 1) + [True]


def test_a_run_that_went_on_starts_again() -> None:
    returns = Returns()
    for _ in range(2):
        assert [returns.add(KEY, None) for _ in range(MAX_RETURNS - 1)] == [False, False]
        returns.forget(KEY)


def test_a_lost_attempt_starts_again() -> None:
    returns = Returns()
    assert [returns.add(KEY, None) for _ in range(6)] == [False, False, True] * 2


def test_runs_of_others_push_out_the_oldest() -> None:
    returns, other = Returns(), RunKey("default", "other")
    for key in (KEY, other, KEY, other):
        returns.add(key, None)
    for n in range(MAX_RUNS - 1):
        returns.add(RunKey("default", f"r{n}"), None)
    assert returns.add(other, None)
    assert not returns.add(KEY, None)
