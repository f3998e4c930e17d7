"""The threat model names a test for each rule, and each of these tests exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/threat-model.md").read_text()
TESTS = re.findall(r"`(tests/[a-z0-9_/]+\.py)::(test_[a-z0-9_]+)`", PAGE)


def test_each_test_that_the_threat_model_names_exists() -> None:
    missing = [
        f"{path}::{name}"
        for path, name in TESTS
        if not (ROOT / path).exists()
        or not re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE)
    ]
    assert missing == []
    assert len(TESTS) > 40


def test_each_rule_has_a_test() -> None:
    section = PAGE.partition("## Rules and their tests")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    rules = [(rule, tests) for rule, tests in rows if not rule.startswith("| **")]
    assert len(rules) > 25
    assert [rule for rule, tests in rules if "::" not in tests] == []
