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


@dataclass(frozen=True, slots=True)
class Policy:
    """Allows or denies by the kind of the tool call; `allows` is for kinds that are not named."""

    allows: bool = False
    kinds: Mapping[str, bool] = field(default_factory=dict)

    def allows_kind(self, kind: str) -> bool:
        """Whether a tool call of this kind may go on."""
        return self.kinds.get(kind, self.allows)


def parse_policy(text: str) -> Policy:
    """Parses words separated by commas: `allow` or `deny` for all kinds, KIND=allow or KIND=deny
    for one; the last one counts. Raises ValueError with a readable reason."""
    allows = False
    kinds: dict[str, bool] = {}
    for word in text.split(","):
        kind, equals, answer = word.strip().rpartition("=")
        if answer not in {"allow", "deny"}:
            raise ValueError(f"cannot read {word!r}; write allow, deny, KIND=allow or KIND=deny")
        if not equals:
            allows = answer == "allow"
        elif kind in KINDS:
            kinds[kind] = answer == "allow"
        else:
            raise ValueError(f"{kind!r} is not a kind of tool call; use one of {', '.join(KINDS)}")
    return Policy(allows, kinds)
