"""The error of a broken rule."""

from __future__ import annotations


class Broken(AssertionError):
    """A rule was broken; the message says which."""


def require(holds: object, rule: str) -> None:
    """Raises Broken where a rule does not hold. Unlike `assert` it works under `python -O` too."""
    if not holds:
        raise Broken(rule)
