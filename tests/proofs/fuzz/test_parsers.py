"""Every parser accepts any input, and raises only the errors that it promises."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proofs.fuzz.mutate import mutated
from proofs.fuzz.regressions import PARSED
from proofs.fuzz.targets import BY_NAME, TARGETS, Target


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_nearly_valid_input_raises_only_promised_errors(target: Target) -> None:
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
def test_a_parser_accepts_one_of_its_seeds(target: Target) -> None:
    """At least one seed is valid, unless valid input needs a signature."""
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
def test_input_that_once_crashed_a_parser_is_handled(name: str, data: bytes) -> None:
    BY_NAME[name](data)
