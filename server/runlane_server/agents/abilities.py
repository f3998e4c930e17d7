"""The abilities of the runs of an agent, as far as the server knows it."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class Ability(StrEnum):
    """Something that the runs of an agent can do."""

    FOLD = "fold"
    """Prompts may join a turn."""
    ASK = "ask"
    """It may ask people."""
    STEPS = "steps"
    """It may store results of steps."""
    ATTACHMENTS = "attachments"
    """It gets attachments that are not text, such as images."""
    RESUME = "resume"
    """A run that waits for people survives the loss of its node without consuming an attempt."""
    OUTLIVE = "outlive"
    """An active run continues while its node restarts."""


OF_CODE = frozenset({Ability.FOLD, Ability.ASK, Ability.STEPS, Ability.ATTACHMENTS})
"""Abilities that a turn gives to code of the user."""

OF_MODEL = frozenset({Ability.FOLD, Ability.ATTACHMENTS})
"""Abilities of a language model without tools; whether it understands an image is not known."""


def abilities_of(agent: object) -> tuple[Ability, ...]:
    """The abilities of an agent, in their order. Its `abilities` name them; code without them may
    do all that a turn offers."""
    named: Iterable[Ability] = getattr(agent, "abilities", OF_CODE)
    found = set(named)
    if getattr(agent, "resumable", False):
        found.add(Ability.RESUME)
    if getattr(agent, "outlives_node", False):
        found.add(Ability.OUTLIVE)
    if Ability.ASK not in found:
        found.discard(Ability.RESUME)
    return tuple(each for each in Ability if each in found)
