"""Every parser takes anything, and raises what it promises or nothing."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proofs.fuzz.mutate import mutated
from proofs.fuzz.regressions import PARSED
from proofs.fuzz.targets import BY_NAME, TARGETS, Target


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_is_nearly_right(target: Target) -> None:
    nearly = st.builds(
        lambda seed, data: mutated(Random(seed), data, target.seeds),  # noqa: S311
        st.integers(0, 1 << 32),
        st.sampled_from(target.seeds),
    )

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(nearly, st.binary(max_size=200), st.sampled_from(target.seeds)))
    def check(data: bytes) -> None:
        target(data)

    check()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_its_seeds_lead_somewhere(target: Target) -> None:
    """One of them at least is what the parser takes, if there is any that nobody has to sign."""
    outcomes = []
    for seed in target.seeds:
        try:
            target.parse(seed)
        except target.promised as error:
            outcomes.append(error)
        else:
            return
    assert target.name in {"token", "jwt", "jwt-header"}, outcomes


@pytest.mark.parametrize(("name", "data"), PARSED)
def test_what_once_broke_one(name: str, data: bytes) -> None:
    BY_NAME[name](data)
