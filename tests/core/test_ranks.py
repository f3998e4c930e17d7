"""Ranks of waiting runs, while nodes of a release without moves share the store (R7, R47)."""

from __future__ import annotations

from runlane_server.core import lane as rules
from runlane_server.core.lane.edit import RANK_STEP
from runlane_server.core.model import Prompt, RunRequest, RunState, SessionKey
from runlane_server.core.transition import Lane, LaneRun
from runlane_server.core.update import Move, Place, RunUpdate

LAST = Move(Place.LAST)


def of_new_node(lane: Lane, run_id: str) -> Lane:
    """Accepts a run."""
    reserved = rules.reserve(lane, run_id, run_id).lane
    wanted = RunRequest(run_id, Prompt(run_id))
    made = rules.accept(reserved, wanted, at=1, token=run_id, max_waiting=9, allow_missing=True)
    return loaded(made.lane)


def of_old_node(lane: Lane, run_id: str) -> Lane:
    """Accepts a run as a node of an older release does: its rank is its accept_seq."""
    seq = lane.accept_seq + 1
    like = lane.waiting[-1]
    run: LaneRun = like._replace(
        run_id=run_id, accept_seq=seq, rank=seq, state=RunState.QUEUED, last_update=""
    )
    return loaded(lane._replace(accept_seq=seq, waiting=(*lane.waiting, run)))


def moved(lane: Lane, run_id: str, move: Move) -> Lane:
    """Moves a run."""
    return loaded(rules.update(lane, RunUpdate(run_id, "digest", move=move), at=2).lane)


def loaded(lane: Lane) -> Lane:
    """The lane as the next node reads it from the store."""
    return lane._replace(waiting=tuple(sorted(lane.waiting, key=lambda run: run.rank)))


def order(lane: Lane) -> str:
    return "".join(run.run_id for run in lane.waiting)


def queue(run_ids: str) -> Lane:
    lane = Lane(SessionKey("t", "s"))
    for run_id in run_ids:
        lane = of_new_node(lane, run_id)
    return lane


def test_r07_a_run_accepted_by_an_old_node_is_the_last() -> None:
    lane = of_old_node(queue("abc"), "d")
    assert order(lane) == "abcd"
    assert order(of_old_node(of_new_node(lane, "e"), "f")) == "abcdef"


def test_r47_moves_keep_the_place_at_the_end_for_old_nodes() -> None:
    lane = moved(of_old_node(queue("ab"), "c"), "a", LAST)
    assert order(lane) == "bca"
    lane = moved(of_old_node(lane, "d"), "b", Move(Place.BEFORE, "d"))
    assert order(lane) == "cabd"
    assert order(of_old_node(moved(lane, "c", LAST), "e")) == "abdce"


def test_r47_ranks_that_are_too_high_are_replaced() -> None:
    lane = queue("ab")
    high = tuple([run._replace(rank=n * RANK_STEP) for n, run in enumerate(lane.waiting)])
    lane = of_new_node(lane._replace(waiting=high), "c")
    assert order(of_old_node(lane, "d")) == "abcd"
