"""Standing approvals: tool calls that the operator approves in advance, until a time.

Nobody has one unless the access file has an entry for its tenant, its agent and its tool. The agent
that asks cannot add one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

MAX_DAYS = 366
"""A grant lasts at most this many days from the time at which it was set."""


class Grant(NamedTuple):
    """A standing approval of the calls of one tool by one agent of one tenant.

    `arguments` maps the names of arguments to their JSON texts: a call must have exactly these
    values, and may have other arguments, but none whose name differs from these in case only: many
    readers of JSON take one for the other. `set_by` is the person who decided, `set_at` and
    `expires` are in seconds since 1970.
    """

    name: str
    tenant: str
    agent: str
    tool: str
    set_by: str
    set_at: float
    expires: float
    arguments: Mapping[str, str] = {}

    @property
    def reason(self) -> str:
        """The reason of its answers, for the record."""
        return (
            f"standing approval {self.name!r}, set by {self.set_by} at {_iso(self.set_at)},"
            f" until {_iso(self.expires)}"
        )

    def covers(self, tenant: str, agent: str, tool: str, arguments_json: str) -> bool:
        """Whether it approves a call, at the right time."""
        if (self.tenant, self.agent, self.tool) != (tenant, agent, tool):
            return False
        given = _texts(arguments_json)
        others = {name.casefold() for name in given.keys() - self.arguments.keys()}
        return self.arguments.items() <= given.items() and others.isdisjoint(
            name.casefold() for name in self.arguments
        )


def canonical(value: object) -> str:
    """The JSON text by which arguments are compared: 1 is not true, nor 1.0. Raises ValueError and
    TypeError for what JSON has no form for."""
    return json.dumps(value, sort_keys=True, allow_nan=False)


def unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` of json. Raises ValueError for a name that is given twice: readers
    differ in which value they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _texts(arguments_json: str) -> Mapping[str, str]:
    """The arguments of a call, each as its JSON text; none if they are no object, or an object has
    a name twice."""
    try:
        found = json.loads(arguments_json, object_pairs_hook=unique_names)
        return {name: canonical(value) for name, value in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


class GrantBook:
    """The grants in force, replaceable at runtime."""

    def __init__(self, grants: Sequence[Grant] = ()) -> None:
        self._grants = grants

    def __bool__(self) -> bool:
        return bool(self._grants)

    def replace(self, grants: Sequence[Grant]) -> None:
        """Replaces all grants. Calls that one of them has approved stay approved."""
        self._grants = grants

    def find(
        self, tenant: str, agent: str, tool: str, arguments_json: str, *, now: float
    ) -> Grant | None:
        """The grant that approves a call now, in seconds since 1970."""
        for grant in self._grants:
            if grant.set_at <= now < grant.expires and grant.covers(
                tenant, agent, tool, arguments_json
            ):
                return grant
        return None
