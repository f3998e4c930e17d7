"""The numbers of the rules in the names of tests: two digits, and a test for every rule."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]

RULES = range(1, 46)

_TEST = re.compile(r"^ *(?:async )?def (test_\w+)", re.MULTILINE)
_RULE = re.compile(r"(?<=_)r(\d+)(?=_)", re.IGNORECASE)


def numbers() -> dict[str, list[str]]:
    """The digits of the rules in each test's name, for the tests that name a rule."""
    names = {
        name for path in TESTS.rglob("test_*.py") for name in _TEST.findall(path.read_text("utf-8"))
    }
    return {name: found for name in names if (found := _RULE.findall(name))}


def test_a_rule_number_has_two_digits() -> None:
    assert [name for name, found in numbers().items() if any(len(n) != 2 for n in found)] == []


def test_every_rule_has_a_test_with_its_number() -> None:
    named = {int(number) for found in numbers().values() for number in found}
    assert [f"R{rule}" for rule in RULES if rule not in named] == []
