"""Workers that fail again and again: what counts, how long they wait, and what is kept of it."""

from __future__ import annotations

from runlane_server.agents.worker.quarantine import (
    CALLER_FAULTS,
    FIRST_BACKOFF,
    MAX_BACKOFF,
    MAX_KNOWN,
    WORKER_FAULTS,
    Party,
    Quarantine,
)

BAD = ("acme", "token", "bad")
PARTY = Party(*BAD)


def fail(quarantine: Quarantine, times: int, worker: str = "bad") -> list[tuple[Party, float]]:
    return [each for _ in range(times) for each in quarantine.add("acme", "token", worker)]


def test_a_worker_waits_after_faults_in_a_row() -> None:
    quarantine = Quarantine()
    assert fail(quarantine, WORKER_FAULTS - 1) == []
    assert not quarantine.is_barred(*BAD)
    assert fail(quarantine, 1) == [(PARTY, FIRST_BACKOFF)]
    assert quarantine.is_barred(*BAD)
    assert quarantine.barred == quarantine.started == 1
    assert not quarantine.is_barred("acme", "token", "good")
    assert not quarantine.is_barred("other", "token", "bad")


def test_a_turn_that_ends_well_clears_the_count() -> None:
    quarantine = Quarantine()
    for _ in range(10):
        assert fail(quarantine, WORKER_FAULTS - 1) == []
        quarantine.clear(*BAD)


def test_each_backoff_doubles_up_to_a_limit() -> None:
    quarantine = Quarantine()
    fail(quarantine, WORKER_FAULTS - 1)
    seconds = []
    for _ in range(12):
        seconds += [each for party, each in fail(quarantine, 1) if party == PARTY]
        quarantine.release(PARTY)
        assert not quarantine.is_barred(*BAD)
    assert seconds[:4] == [FIRST_BACKOFF, FIRST_BACKOFF * 2, FIRST_BACKOFF * 4, FIRST_BACKOFF * 8]
    assert seconds[-1] == max(seconds) == MAX_BACKOFF


def test_turns_that_fail_during_a_backoff_do_not_prolong_it() -> None:
    quarantine = Quarantine()
    fail(quarantine, WORKER_FAULTS)
    assert fail(quarantine, 8) == []
    quarantine.clear(*BAD)  # a turn that was given before
    assert quarantine.is_barred(*BAD)
    quarantine.release(PARTY)
    assert fail(quarantine, 1) == [(PARTY, FIRST_BACKOFF * 2)]


def test_new_ids_of_one_caller_count_together() -> None:
    quarantine = Quarantine()
    begun = [each for n in range(CALLER_FAULTS) for each in fail(quarantine, 1, f"w{n}")]
    assert begun == [(Party("acme", "token", None), FIRST_BACKOFF)]
    assert quarantine.is_barred("acme", "token", "never seen")
    assert not quarantine.is_barred("acme", "another", "never seen")


def test_a_good_sibling_keeps_the_caller_free() -> None:
    quarantine = Quarantine()
    for _ in range(CALLER_FAULTS * 2):
        fail(quarantine, 1)
        quarantine.clear("acme", "token", "good")
    assert quarantine.is_barred(*BAD)
    assert not quarantine.is_barred("acme", "token", "good")


def test_faults_of_others_push_out_the_oldest() -> None:
    quarantine = Quarantine()
    fail(quarantine, WORKER_FAULTS - 1)
    for n in range(MAX_KNOWN):
        quarantine.add("acme", f"caller {n}", "w")
    assert fail(quarantine, 1) == []
