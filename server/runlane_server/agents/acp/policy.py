"""The operator's answer to an agent that asks whether it may do something.

Importing this module needs nothing of the protocol's package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = (
    *("read", "edit", "delete", "move", "search"),
    *("execute", "think", "fetch", "switch_mode", "other"),
)
"""The kinds of tool calls in the protocol."""

OTHER = "other"
"""The kind of a tool call that names none."""


ANSWERS = ("allow", "deny", "ask")
"""The answers; `ask` leaves it to a person."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The answer by the kind of the tool call; `default` is for kinds that are not named."""

    default: str = "deny"
    kinds: Mapping[str, str] = field(default_factory=dict)

    def answer_for(self, kind: str) -> str:
        """One of `ANSWERS`."""
        return self.kinds.get(kind, self.default)


def parse_policy(text: str) -> Policy:
    """Parses words separated by commas: an answer for all kinds, or KIND=ANSWER for one; the last
    one counts. Raises ValueError with a readable reason."""
    default = "deny"
    kinds: dict[str, str] = {}
    for word in text.split(","):
        kind, equals, answer = word.strip().rpartition("=")
        if answer not in ANSWERS:
            raise ValueError(f"cannot read {word!r}; write allow, deny or ask, or KIND=ANSWER")
        if not equals:
            default = answer
        elif kind in KINDS:
            kinds[kind] = answer
        else:
            raise ValueError(f"{kind!r} is not a kind of tool call; use one of {', '.join(KINDS)}")
    return Policy(default, kinds)
