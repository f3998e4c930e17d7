"""The access file: who may come in, as TOML."""

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
from runlane_server.access.jwts import ALGORITHMS, JwtSettings
from runlane_server.access.quotas import Quotas, read_quotas
from runlane_server.access.tokens import ID, SHA256, Token

ValueT = TypeVar("ValueT")

_HEADER = re.compile(r"^[ \t]*\[{1,2}[ \t]*([\w.-]+)[ \t]*\]{1,2}", re.MULTILINE)

MAX_LEEWAY = 300


class BadEntry(Exception):
    """The file cannot be used; the message says where and why, in one line."""


@dataclass(frozen=True, slots=True)
class Entries:
    """What an access file says. `certificates` has callers by a name in their certificate, `quotas`
    what the tenants may take."""

    tokens: Sequence[Token] = ()
    certificates: Mapping[str, Caller] = field(default_factory=dict)
    jwt: JwtSettings | None = None
    quotas: Quotas = field(default_factory=Quotas)


def parse(text: str, folder: Path = Path()) -> Entries:
    """What a text says; paths in it are relative to `folder`. Raises BadEntry."""
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadEntry(str(error)) from None
    places = Places(text)
    top = _Table(found, lambda _: 1)
    tokens = [_token(table) for table in _tables(top, "token", places)]
    _check_unique("token", places, [token.caller.name for token in tokens], "name")
    _check_unique("token", places, [token.id for token in tokens], "id")
    shown = [_certificate(table) for table in _tables(top, "certificate", places)]
    _check_unique("certificate", places, [name for name, _ in shown], "subject")
    jwt = top.take("jwt", dict, None)
    quotas = _quotas(top)
    top.done()
    settings = None
    if jwt is not None:
        settings = _jwt(_Table(jwt, lambda key: places.line("jwt", 0, key)), folder)
    return Entries(tokens, dict(shown), settings, quotas)


def _quotas(top: _Table) -> Quotas:
    try:
        return read_quotas(top.take("tenants", dict, {}) or {})
    except ValueError as error:
        raise BadEntry(str(error)) from None


class Places:
    """Finds the lines of tables and keys, which the parser does not tell."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        self._headers = [
            (match[1], text.count("\n", 0, match.start())) for match in _HEADER.finditer(text)
        ]

    def block(self, kind: str, index: int) -> tuple[int, int] | None:
        """The lines of the table of that kind and number, from 0 on, without the end."""
        starts = [line for name, line in self._headers if name == kind]
        if index >= len(starts):
            return None
        ends = [line for _, line in self._headers if line > starts[index]]
        return starts[index], min(ends, default=len(self._lines))

    def line(self, kind: str, index: int, key: str) -> int:
        """The line of a key, else that of its table; from 1 on."""
        block = self.block(kind, index)
        if block is None:
            return 1
        for number in range(*block):
            if re.match(rf"[ \t]*{re.escape(key)}[ \t]*=", self._lines[number]):
                return number + 1
        return block[0] + 1


class _Table:
    """A table of the file, of which one key after the other is taken."""

    def __init__(self, content: Mapping[str, Any], line: Callable[[str], int]) -> None:
        self._left = dict(content)
        self._line = line

    def wrong(self, key: str, why: str) -> BadEntry:
        """The error for a key."""
        return BadEntry(f"line {self._line(key)}: {key!r} {why}")

    def take(self, key: str, kind: type[ValueT], default: ValueT | None) -> ValueT | None:
        """What a key has. Raises BadEntry if it is of another kind."""
        if key not in self._left:
            return default
        value = self._left.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(key, f"is no {_KINDS[kind]}")
        return value

    def text(self, key: str, fits: Callable[[str], object] = bool, form: str = "a text") -> str:
        """A text that has to be there. Raises BadEntry."""
        value = self.take(key, str, None)
        if value is None:
            raise self.wrong(key, "is missing")
        if not fits(value):
            raise self.wrong(key, f"is not {form}")
        return value

    def role(self, key: str = "role") -> Role:
        """A role. Raises BadEntry."""
        return Role(self.text(key, _is_role, "read, run or admin"))

    def done(self) -> None:
        """Raises BadEntry if something is there that was not taken."""
        for key in self._left:
            raise self.wrong(key, "is not known here")


_KINDS: Mapping[type, str] = {
    str: "text",
    int: "whole number",
    list: "list",
    dict: "table",
    datetime: "date with a time",
}


def _tables(top: _Table, kind: str, places: Places) -> list[_Table]:
    found = top.take(kind, list, []) or []
    if not all(isinstance(each, dict) for each in found):
        raise BadEntry(f"line {places.line(kind, 0, '')}: [[{kind}]] is for tables")

    def table(index: int, content: Mapping[str, Any]) -> _Table:
        return _Table(content, lambda key: places.line(kind, index, key))

    return [table(index, content) for index, content in enumerate(found)]


def _token(table: _Table) -> Token:
    name = table.text("name", is_name, NAME_FORM)
    caller = Caller(_tenant(table), table.role(), name)
    token_id = table.text("id", ID.fullmatch, "the id of a token")
    sha256 = table.text("sha256", SHA256.fullmatch, "64 hexadecimal digits in lower case")
    expires = table.take("expires", datetime, None)
    if expires is not None and expires.tzinfo is None:
        raise table.wrong("expires", "has no time zone")
    table.done()
    return Token(token_id, sha256, caller, None if expires is None else expires.timestamp())


def _certificate(table: _Table) -> tuple[str, Caller]:
    subject = table.text("subject")
    caller = Caller(_tenant(table), table.role(), subject)
    table.done()
    return subject, caller


def _tenant(table: _Table, key: str = "tenant") -> str:
    return table.text(key, is_tenant, TENANT_FORM)


def _jwt(table: _Table, folder: Path) -> JwtSettings:
    jwks, pem = table.take("jwks", str, ""), table.take("key", str, "")
    if bool(jwks) == bool(pem):
        raise table.wrong("jwks", "or 'key' has to name a file, and not both")
    tenant, tenant_claim = _one_of(table, "tenant", is_tenant, TENANT_FORM)
    role, role_claim = _one_of(table, "role", _is_role, "read, run or admin")
    leeway = table.take("leeway", int, 30)
    if leeway is None or not 0 <= leeway <= MAX_LEEWAY:
        raise table.wrong("leeway", f"is not within 0 and {MAX_LEEWAY} seconds")
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
            value: Role(name)
            for value, name in _map(table, "roles", _is_role, "read, run or admin").items()
        },
        leeway=float(leeway),
    )
    table.done()
    return settings


def _one_of(table: _Table, key: str, fits: Callable[[str], object], form: str) -> tuple[str, str]:
    """Either what is fixed, or the name of a claim."""
    fixed, claim = table.take(key, str, ""), table.take(f"{key}_claim", str, "")
    if bool(fixed) == bool(claim):
        raise table.wrong(key, f"or '{key}_claim' has to be given, and not both")
    if fixed and not fits(fixed):
        raise table.wrong(key, f"is not {form}")
    return fixed or "", claim or ""


def _algorithms(table: _Table) -> Sequence[str]:
    algorithms = table.take("algorithms", list, []) or []
    if not algorithms:
        raise table.wrong("algorithms", "has to list at least one")
    for each in algorithms:
        if not isinstance(each, str) or each not in ALGORITHMS:
            raise table.wrong("algorithms", f"may have {', '.join(sorted(ALGORITHMS))} only")
    return algorithms


def _map(table: _Table, key: str, fits: Callable[[str], object], form: str) -> dict[str, str]:
    found = table.take(key, dict, {}) or {}
    for value, meaning in found.items():
        if not isinstance(meaning, str) or not fits(meaning):
            raise table.wrong(key, f"says of {value!r} what is not {form}")
    return found


def _is_role(text: str) -> bool:
    return text in set(Role)


def _check_unique(kind: str, places: Places, values: Sequence[str], key: str) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise BadEntry(f"line {places.line(kind, index, key)}: {key!r} is there twice")
