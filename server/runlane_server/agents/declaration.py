"""The agents that `--agent` and `--agent-slots` declare: their names, specs and limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from runlane_server.core.agents import DEFAULT_AGENT, NAME_FORM, is_agent_name
from runlane_server.core.errors import SettingsError

DEFAULT_SPEC = "echo"
"""The agent of a server that declares none."""

MAX_SLOTS = 1_000_000


class AgentDeclaration(NamedTuple):
    """A declared agent. `slots` is its limit of active runs on a node, None for none of its own."""

    name: str
    spec: str
    slots: int | None = None


def split_agent(text: str) -> tuple[str, str]:
    """The name and the spec of `NAME=SPEC`; a bare spec is the agent `default`. Raises ValueError.

    What comes before the first `=` is a name only if it has no `:`, which every spec with options
    has before them.
    """
    before, separator, after = text.strip().partition("=")
    if not separator or ":" in before:
        return DEFAULT_AGENT, text.strip()
    name = before.strip()
    if not is_agent_name(name):
        raise ValueError(f"{name!r} is not a name of an agent: use {NAME_FORM}")
    if not after.strip():
        raise ValueError(f"agent {name!r} has no spec; write {name}=SPEC")
    return name, after.strip()


def split_slots(text: str) -> tuple[str, int]:
    """The name and the number of `NAME=N`. Raises ValueError."""
    name, _, number = (part.strip() for part in text.partition("="))
    if not is_agent_name(name):
        raise ValueError(f"{text!r} is not of the form NAME=N")
    if not (number.isascii() and number.isdecimal() and len(number) <= len(str(MAX_SLOTS))):
        raise ValueError(f"the slots of {name!r} must be a whole number from 0 to {MAX_SLOTS}")
    if int(number) > MAX_SLOTS:
        raise ValueError(f"the slots of {name!r} must be a whole number from 0 to {MAX_SLOTS}")
    return name, int(number)


def declared_agents(agents: Sequence[str], slots: Sequence[str]) -> tuple[AgentDeclaration, ...]:
    """The agents that the settings declare, in their order. Raises SettingsError."""
    try:
        named = [split_agent(text) for text in agents or (DEFAULT_SPEC,)]
        limits = [split_slots(text) for text in slots]
    except ValueError as error:
        raise SettingsError(f"agent: {error}") from error
    _check_unique("--agent", [name for name, _ in named])
    _check_unique("--agent-slots", [name for name, _ in limits])
    names = {name for name, _ in named}
    for name, _ in limits:
        if name not in names:
            raise SettingsError(f"--agent-slots: there is no agent {name!r}; --agent declares them")
    of_name = dict(limits)
    return tuple(AgentDeclaration(name, spec, of_name.get(name)) for name, spec in named)


def _check_unique(flag: str, names: Sequence[str]) -> None:
    for n, name in enumerate(names):
        if name in names[:n]:
            raise SettingsError(f"{flag}: the agent {name!r} is declared twice; use another name")
