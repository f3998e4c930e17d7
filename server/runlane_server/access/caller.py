"""Callers: identity, role, the credentials of a call, and valid names of tenants and tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

DEFAULT_TENANT = "default"

TENANT_FORM = "1 to 64 letters, digits, '.', '_' or '-', starting with a letter or a digit"
NAME_FORM = "1 to 64 letters, digits, '.', '_', '@' or '-', starting with a letter or a digit"

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


def is_tenant(text: str) -> bool:
    """Whether the text is a valid tenant name (`TENANT_FORM`)."""
    return _TENANT.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether the text is a valid name of a token (`NAME_FORM`)."""
    return _NAME.fullmatch(text) is not None


class Role(StrEnum):
    """The rights of a caller within its tenant."""

    READ = "read"
    """Look up and subscribe."""

    ANSWER = "answer"
    """`READ`, plus: answer input requests."""

    RUN = "run"
    """`READ`, plus: accept runs, cancel runs, create and change sessions."""

    OPERATOR = "operator"
    """`RUN` and `ANSWER`."""

    WEBHOOKS = "webhooks"
    """`READ`, plus: manage webhooks."""

    WORK = "work"
    """Execute runs as a worker, and nothing else."""

    ADMIN = "admin"
    """`OPERATOR`, `WEBHOOKS` and `WORK`, plus: delete sessions."""


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller. `name` is for the log.

    A `peer` is another node of the same store. It calls on behalf of a caller that it has
    authenticated itself, and may read nothing but the run `run_id`. `agents` are the agents that
    the caller may use; None: all. `others` are further roles, of a JSON Web Token that claims
    several.
    """

    tenant: str
    role: Role
    name: str
    peer: bool = False
    run_id: str = ""
    agents: frozenset[str] | None = None
    others: frozenset[Role] = frozenset()

    @property
    def roles(self) -> Sequence[Role]:
        """All roles of the caller; it has the rights of each."""
        return [self.role, *sorted(self.others)]


ANONYMOUS = Caller(DEFAULT_TENANT, Role.ADMIN, "")
"""The caller of every call on a server without access control."""

CALLER: ContextVar[Caller] = ContextVar("caller")
"""The caller of the current call. It has no default, so a handler that bypasses access control
fails instead of serving."""


def tenant() -> str:
    """The tenant of the current call."""
    return CALLER.get().tenant


class Credentials(NamedTuple):
    """The evidence that a call presents for its caller.

    `metadata` maps each key to its first value. `certificate` lists the names in the client's
    certificate, which the transport has verified, with their types (`access/certificate.py`); it is
    empty without a certificate. `peer` is the address that the call came from, for the log.
    """

    metadata: Mapping[str, str] = MappingProxyType({})
    certificate: Sequence[str] = ()
    peer: str = ""


CREDENTIALS: ContextVar[Credentials] = ContextVar("credentials")
"""The credentials of the current call."""


class Identity(NamedTuple):
    """A verified caller. `expires` is in seconds since 1970; None: as long as the entry exists."""

    caller: Caller
    expires: float | None = None


class AuthenticationFailed(Exception):
    """The credentials are not valid.

    `reason` and `details` are for the log; they contain no secret.
    """

    def __init__(self, reason: str, **details: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.details = details
