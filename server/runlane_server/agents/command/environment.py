"""The environment of a program: what is listed, and nothing else of the server's.

The server's own holds what is no business of a program that acts on somebody's prompt: the password
of the store, tokens, the keys of providers. So a program gets

    PATH, LANG, LC_*, TZ    as the server has them: where programs are, in which language and at
                            which hour they speak
    HOME, TMPDIR            its private directory: what it leaves there goes with the run, and what
                            is in the server's home is not found by accident
    RUNLANE_...             which run it works on (see `agents.command`)
    TRACEPARENT             where in a trace that is, if it is in one

and what the operator lists, which goes before all but the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

RUN_VARIABLES = ("RUNLANE_SESSION_ID", "RUNLANE_RUN_ID", "RUNLANE_ATTEMPT")
"""What every program is told of its run."""

TRACE_VARIABLE = "TRACEPARENT"
"""Where in a trace a program is."""

_SETTING = "RUNLANE_"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PASSED = re.compile(r"PATH|LANG|LC_[A-Z]+|TZ")


def parse_variables(text: str) -> dict[str, str | None]:
    """The variables that a text lists: names with commas between them, or one NAME=VALUE.

    The value of a name alone, which the server's environment has, is None. Raises ValueError, with
    a reason for people, for what cannot be or must not be given.
    """
    if "=" in text:
        name, _, value = text.partition("=")
        return {_checked(name, given=True): _without_nul(name, value)}
    return {_checked(name.strip(), given=False): None for name in text.split(",")}


def build_environment(
    server: Mapping[str, str], texts: Iterable[str], told: Mapping[str, str], home: Path
) -> dict[str, str]:
    """All variables of a program. A listed name that the server does not have is left out.

    `server` is the server environment, `texts` what `parse_variables` takes, `told`
    what the program is told of its run, `home` its private directory.
    """
    passed = {name: value for name, value in server.items() if _PASSED.fullmatch(name)}
    found = {**passed, "HOME": str(home), "TMPDIR": str(home)}
    for text in texts:
        for name, value in parse_variables(text).items():
            if value is not None:
                found[name] = value
            elif name in server:
                found[name] = server[name]
    return {**found, **told}


def _checked(name: str, *, given: bool) -> str:
    """The name, if a program may have it."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a variable")
    if name in RUN_VARIABLES:
        raise ValueError(f"{name} is what a program is told of its run")
    if name.startswith(_SETTING) and not given:
        raise ValueError(f"{name} is for the server; to set it for programs write {name}=VALUE")
    return name


def _without_nul(name: str, value: str) -> str:
    if "\0" in value:
        raise ValueError(f"the value of {name} has a NUL in it")
    return value
