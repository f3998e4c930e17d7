"""The content of the access file: callers, quotas and standing approvals, as TOML."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from runlane_server.access.caller import (
    NAME_FORM,
    TENANT_FORM,
    Caller,
    Role,
    is_name,
    is_tenant,
)
from runlane_server.access.certificate import SUBJECT_FORM, is_subject, typed_subject
from runlane_server.access.grants import MAX_DAYS, Grant, canonical
from runlane_server.access.jwts import ALGORITHMS, JwtSettings
from runlane_server.access.quotas import Quotas, read_quotas
from runlane_server.access.tokens import ID, SHA256, Token
from runlane_server.core.agents import NAME_FORM as AGENT_FORM
from runlane_server.core.agents import is_agent_name

ValueT = TypeVar("ValueT")

_HEADER = re.compile(r"^[ \t]*\[{1,2}[ \t]*([\w.-]+)[ \t]*\]{1,2}", re.MULTILINE)

TOOL_FORM = "a name of printable characters"

MAX_LEEWAY = 300
"""Seconds."""

ROLE_FORM = " or ".join((", ".join(list(Role)[:-1]), list(Role)[-1]))


class BadEntry(Exception):
    """The file is invalid; the message names place and problem in one line."""


@dataclass(frozen=True, slots=True)
class Entries:
    """The content of an access file. `certificates` maps a typed name to its caller."""

    tokens: Sequence[Token] = ()
    certificates: Mapping[str, Caller] = field(default_factory=dict)
    jwt: JwtSettings | None = None
    quotas: Quotas = field(default_factory=Quotas)
    grants: Sequence[Grant] = ()


def parse(text: str, folder: Path = Path()) -> Entries:
    """Parses the text; paths in it are relative to `folder`. Raises BadEntry."""
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadEntry(str(error)) from None
    lines = LineIndex(text)
    top = _Table(found, lambda _: 1)
    tokens = [_token(table) for table in _tables(top, "token", lines)]
    _check_unique("token", lines, [token.caller.name for token in tokens], "name")
    _check_unique("token", lines, [token.id for token in tokens], "id")
    certificates = [_certificate(table) for table in _tables(top, "certificate", lines)]
    _check_unique("certificate", lines, [name for name, _ in certificates], "subject")
    grants = [_grant(table) for table in _tables(top, "grant", lines)]
    _check_unique("grant", lines, [grant.name for grant in grants], "name")
    jwt = top.take("jwt", dict, None)
    quotas = _quotas(top)
    top.reject_unknown()
    settings = None
    if jwt is not None:
        settings = _jwt(_Table(jwt, lambda key: lines.line("jwt", 0, key)), folder)
    return Entries(tokens, dict(certificates), settings, quotas, grants)


def _quotas(top: _Table) -> Quotas:
    try:
        return read_quotas(top.take("tenants", dict, {}) or {})
    except ValueError as error:
        raise BadEntry(str(error)) from None


class LineIndex:
    """Finds the lines of tables and keys, which the parser does not report."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        self._headers = [
            (match[1], text.count("\n", 0, match.start())) for match in _HEADER.finditer(text)
        ]

    def block(self, kind: str, index: int) -> tuple[int, int] | None:
        """The range of lines of the nth table of a kind, 0-based, end exclusive."""
        starts = [line for name, line in self._headers if name == kind]
        if index >= len(starts):
            return None
        ends = [line for _, line in self._headers if line > starts[index]]
        return starts[index], min(ends, default=len(self._lines))

    def line(self, kind: str, index: int, key: str) -> int:
        """The line of a key, or of its table if the key is not found; 1-based."""
        block = self.block(kind, index)
        if block is None:
            return 1
        for number in range(*block):
            if re.match(rf"[ \t]*{re.escape(key)}[ \t]*=", self._lines[number]):
                return number + 1
        return block[0] + 1


class _Table:
    """A table whose keys are taken one by one, so that unknown keys remain."""

    def __init__(self, content: Mapping[str, Any], line: Callable[[str], int]) -> None:
        self._left = dict(content)
        self._line = line

    def error(self, key: str, why: str) -> BadEntry:
        """Returns the error for a key."""
        return BadEntry(f"line {self._line(key)}: {key!r} {why}")

    def take(self, key: str, kind: type[ValueT], default: ValueT | None) -> ValueT | None:
        """Removes a key and returns its value. Raises BadEntry for another type."""
        if key not in self._left:
            return default
        value = self._left.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(key, f"must be a {_KINDS[kind]}")
        return value

    def text(
        self, key: str, fits: Callable[[str], object] = bool, form: str = "a non-empty string"
    ) -> str:
        """Takes a required string. Raises BadEntry."""
        value = self.take(key, str, None)
        if value is None:
            raise self.error(key, "is missing")
        if not fits(value):
            raise self.error(key, f"must be {form}")
        return value

    def role(self, key: str = "role") -> Role:
        """Takes a required role. Raises BadEntry."""
        return Role(self.text(key, _is_role, ROLE_FORM))

    def reject_unknown(self) -> None:
        """Raises BadEntry if a key was not taken."""
        for key in self._left:
            raise self.error(key, "is not a known key")


_KINDS: Mapping[type, str] = {
    str: "string",
    int: "whole number",
    list: "list",
    dict: "table",
    datetime: "date with a time",
}


def _tables(top: _Table, kind: str, lines: LineIndex) -> list[_Table]:
    found = top.take(kind, list, []) or []
    if not all(isinstance(each, dict) for each in found):
        raise BadEntry(f"line {lines.line(kind, 0, '')}: [[{kind}]] must be a table")

    def table(index: int, content: Mapping[str, Any]) -> _Table:
        return _Table(content, lambda key: lines.line(kind, index, key))

    return [table(index, content) for index, content in enumerate(found)]


def _token(table: _Table) -> Token:
    name = table.text("name", is_name, NAME_FORM)
    caller = Caller(_tenant(table), table.role(), name, agents=_agents(table))
    token_id = table.text("id", ID.fullmatch, "an id of 16 characters from a-z and 2-7")
    sha256 = table.text("sha256", SHA256.fullmatch, "64 lower-case hexadecimal digits")
    expires = _time(table, "expires")
    table.reject_unknown()
    return Token(token_id, sha256, caller, expires)


def _time(table: _Table, key: str) -> float | None:
    """A time, in seconds since 1970."""
    found = table.take(key, datetime, None)
    if found is not None and found.tzinfo is None:
        raise table.error(key, "has no time zone")
    return None if found is None else found.timestamp()


def _grant(table: _Table) -> Grant:
    name = table.text("name", is_name, NAME_FORM)
    set_at, expires = _time(table, "set_at"), _time(table, "expires")
    if set_at is None or expires is None:
        raise table.error("set_at" if set_at is None else "expires", "is missing")
    if not set_at < expires <= set_at + MAX_DAYS * 86400:
        raise table.error("expires", f"must be after set_at, by at most {MAX_DAYS} days")
    grant = Grant(
        name=name,
        tenant=_tenant(table),
        agent=table.text("agent", is_agent_name, AGENT_FORM),
        tool=table.text("tool", is_tool, TOOL_FORM),
        set_by=table.text("set_by", is_name, NAME_FORM),
        set_at=set_at,
        expires=expires,
        arguments=_arguments(table),
    )
    table.reject_unknown()
    return grant


def _arguments(table: _Table) -> Mapping[str, str]:
    found = table.take("arguments", dict, {}) or {}
    try:
        return {name: canonical(value) for name, value in found.items()}
    except (TypeError, ValueError):
        raise table.error("arguments", "has a value that JSON has no form for") from None


def is_tool(text: str) -> bool:
    """Whether a text can be the name of a tool."""
    return bool(text) and text.isprintable()


def _certificate(table: _Table) -> tuple[str, Caller]:
    subject = typed_subject(table.text("subject", is_subject, SUBJECT_FORM))
    caller = Caller(_tenant(table), table.role(), subject, agents=_agents(table))
    table.reject_unknown()
    return subject, caller


def _agents(table: _Table) -> frozenset[str] | None:
    """The agents that a caller may use; None: all."""
    names = table.take("agents", list, None)
    if names is None:
        return None
    for name in names:
        if not isinstance(name, str) or not is_agent_name(name):
            raise table.error("agents", f"must list names of agents: {AGENT_FORM}")
    return frozenset(names)


def _tenant(table: _Table, key: str = "tenant") -> str:
    return table.text(key, is_tenant, TENANT_FORM)


def _jwt(table: _Table, folder: Path) -> JwtSettings:
    jwks, pem = table.take("jwks", str, ""), table.take("key", str, "")
    if bool(jwks) == bool(pem):
        raise table.error("jwks", "or 'key' must name a file, but not both")
    tenant, tenant_claim = _one_of(table, "tenant", is_tenant, TENANT_FORM)
    role, role_claim = _one_of(table, "role", _is_role, ROLE_FORM)
    leeway = table.take("leeway", int, 30)
    if leeway is None or not 0 <= leeway <= MAX_LEEWAY:
        raise table.error("leeway", f"must be 0 to {MAX_LEEWAY} seconds")
    settings = JwtSettings(
        keys=folder / (jwks or pem or ""),
        is_set=bool(jwks),
        algorithms=_algorithms(table),
        issuer=table.text("issuer"),
        audience=table.text("audience"),
        tenant=tenant,
        tenant_claim=tenant_claim,
        role=Role(role) if role else None,
        role_claim=role_claim,
        tenants=_map(table, "tenants", is_tenant, TENANT_FORM),
        roles={
            value: Role(name) for value, name in _map(table, "roles", _is_role, ROLE_FORM).items()
        },
        leeway=float(leeway),
        agents=_agents(table),
    )
    table.reject_unknown()
    return settings


def _one_of(table: _Table, key: str, fits: Callable[[str], object], form: str) -> tuple[str, str]:
    """Returns a fixed value and a claim, exactly one of them non-empty."""
    fixed, claim = table.take(key, str, ""), table.take(f"{key}_claim", str, "")
    if bool(fixed) == bool(claim):
        raise table.error(key, f"or '{key}_claim' is required, but not both")
    if fixed and not fits(fixed):
        raise table.error(key, f"must be {form}")
    return fixed or "", claim or ""


def _algorithms(table: _Table) -> Sequence[str]:
    algorithms = table.take("algorithms", list, []) or []
    if not algorithms:
        raise table.error("algorithms", "must list at least one algorithm")
    for each in algorithms:
        if not isinstance(each, str) or each not in ALGORITHMS:
            raise table.error("algorithms", f"may contain only {', '.join(sorted(ALGORITHMS))}")
    return algorithms


def _map(table: _Table, key: str, fits: Callable[[str], object], form: str) -> dict[str, str]:
    found = table.take(key, dict, {}) or {}
    for value, meaning in found.items():
        if not isinstance(meaning, str) or not fits(meaning):
            raise table.error(key, f"maps {value!r} to something else than {form}")
    return found


def _is_role(text: str) -> bool:
    return text in set(Role)


def _check_unique(kind: str, lines: LineIndex, values: Sequence[str], key: str) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise BadEntry(f"line {lines.line(kind, index, key)}: {key!r} {value!r} is used twice")
