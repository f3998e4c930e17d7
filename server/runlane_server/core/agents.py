"""The names of the agents of a server, and the choice of the agent of a run (R31)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from runlane_server.core.errors import AgentNotFound, PermissionDenied

DEFAULT_AGENT = "default"

NAME_FORM = "1 to 63 lower-case letters, digits, '.', '_' or '-', starting with a letter or a digit"

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")


def is_agent_name(text: str) -> bool:
    """Whether the text is a valid name of an agent (`NAME_FORM`)."""
    return _NAME.fullmatch(text) is not None


class AgentNames(NamedTuple):
    """The agents that a server declares, and the one of runs and sessions that name none.

    `allowed` are those that a caller may use; None: all.
    """

    names: tuple[str, ...] = (DEFAULT_AGENT,)
    default: str = DEFAULT_AGENT
    allowed: frozenset[str] | None = None

    @classmethod
    def of(cls, names: Sequence[str]) -> AgentNames:
        """The declared names: the default is the one called `default`, else the first."""
        return cls(tuple(names), DEFAULT_AGENT if DEFAULT_AGENT in names else names[0])

    def limited_to(self, allowed: frozenset[str] | None) -> AgentNames:
        """A copy for a caller that may use these agents only."""
        return self if allowed is self.allowed else AgentNames(self.names, self.default, allowed)

    def full_name(self, stored: str) -> str:
        """The agent of a stored run: one from before agents had names has the default."""
        return stored or self.default

    def choose(self, requested: str, of_session: str = "") -> str:
        """The agent of a new run: the requested one, else the session's, else the server's.

        Raises AgentNotFound and PermissionDenied.
        """
        name = requested or of_session or self.default
        if self.allowed is not None and name not in self.allowed:
            raise PermissionDenied(f"agent: the caller may not use the agent {name!r}")
        if name not in self.names:
            raise AgentNotFound.of(name)
        return name


ONE_AGENT = AgentNames()
"""The agents of a server with a single one."""
