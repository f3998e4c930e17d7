"""The environment of a program: a short list of variables, and those that the operator adds.

The server's own environment has secrets that a program which acts on a caller's prompt must not
see: the password of the store, tokens, the keys of providers. So a program gets only

    PATH, LANG, LC_*, TZ    as the server has them
    HOME, TMPDIR            its private directory, so that it leaves nothing behind and does not
                            find files in the server's home by accident; HOME is the session's
                            directory if there is one
    PYTHONUNBUFFERED        1: output to a pipe is block-buffered, which would delay the stream
    RUNLANE_...             the ids of the run (see `RUN_VARIABLES`)
    TRACEPARENT             the span of the attempt, if the run is in a trace

and the operator's variables, which override all but the last two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from runlane_server.core.errors import SettingsError
from runlane_server.private_file import read_private_lines

RUN_VARIABLES = ("RUNLANE_TENANT", "RUNLANE_SESSION_ID", "RUNLANE_RUN_ID", "RUNLANE_ATTEMPT")
"""The variables that identify the run: tenant, session id, run id, attempt."""

ORIGIN_VARIABLES = ("RUNLANE_ORIGIN_SESSION_ID", "RUNLANE_ORIGIN_TURN")
"""The variables of a fork: the session that it began as a copy of, and the last turn of it."""

STATE_VARIABLE = "RUNLANE_STATE_DIR"
"""The variable that has the directory of the session, if there is one."""

TRACE_VARIABLE = "TRACEPARENT"
"""The variable that has the span of the attempt (W3C Trace Context)."""

_FILE_OPTION = "--command-env-file"

_SECRET = re.compile(r"(?i).*((^|_|API)KEY|TOKEN|SECRET|PASS(WORD|WD|PHRASE)?)")
"""Names of variables whose values are secrets by convention."""

_SETTING = "RUNLANE_"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INHERITED = re.compile(r"PATH|LANG|LC_[A-Z]+|TZ")


def parse_variables(text: str) -> dict[str, str | None]:
    """Parses one text of the operator: names separated by commas, or a single NAME=VALUE.

    A name without a value maps to None: the value is the server's. Raises ValueError with a
    readable reason if a name is invalid or reserved, or the value contains NUL.
    """
    if "=" in text:
        name, _, value = text.partition("=")
        return {_check_name(name, has_value=True): _check_value(name, value)}
    return {_check_name(name.strip(), has_value=False): None for name in text.split(",")}


def has_secret(text: str) -> bool:
    """Whether a text of the operator is NAME=VALUE with a value that is a secret by its name."""
    name, separator, value = text.partition("=")
    return bool(separator and value and _SECRET.fullmatch(name))


def read_variables(path: Path) -> tuple[str, ...]:
    """Reads a file of lines NAME=VALUE; empty lines and those that start with `#` are left out.

    Raises StartError for a file that cannot be read or that other users can, and for a wrong line.
    """
    return tuple(_read_lines(path, read_private_lines(path, _FILE_OPTION)))


def _read_lines(path: Path, lines: Iterable[str]) -> Iterable[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        # The line is not repeated: it may be a secret.
        name, separator, _ = line.partition("=")
        if not (separator and _NAME.fullmatch(name)):
            raise SettingsError(f"{_FILE_OPTION}: {path}, line {number}: is not NAME=VALUE")
        try:
            parse_variables(line)
        except ValueError as error:
            raise SettingsError(f"{_FILE_OPTION}: {path}, line {number}: {error}") from None
        yield line


def build_environment(
    server: Mapping[str, str],
    texts: Iterable[str],
    run: Mapping[str, str],
    home: Path,
    temp: Path | None = None,
) -> dict[str, str]:
    """Returns all variables of a program.

    `server` is the server's environment, `texts` the operator's (see `parse_variables`), `run` the
    variables of the run, `home` and `temp` its directories, by default one. A name that the
    server's environment lacks is left out.
    """
    inherited = {name: value for name, value in server.items() if _INHERITED.fullmatch(name)}
    variables = {
        **inherited,
        "HOME": str(home),
        "TMPDIR": str(temp or home),
        "PYTHONUNBUFFERED": "1",
    }
    for text in texts:
        for name, value in parse_variables(text).items():
            if value is not None:
                variables[name] = value
            elif name in server:
                variables[name] = server[name]
    return {**variables, **run}


def _check_name(name: str, *, has_value: bool) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid variable name")
    if name in {*RUN_VARIABLES, *ORIGIN_VARIABLES, STATE_VARIABLE}:
        raise ValueError(f"{name} is reserved: it identifies the run")
    if name.startswith(_SETTING) and not has_value:
        raise ValueError(
            f"{name} is a setting of the server; to set it for programs, write {name}=VALUE"
        )
    return name


def _check_value(name: str, value: str) -> str:
    if "\0" in value:
        raise ValueError(f"the value of {name} contains a NUL character")
    return value
