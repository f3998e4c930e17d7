"""Who calls: what a handler has to know of it, and what proves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

DEFAULT_TENANT = "default"


class Role(StrEnum):
    """What a caller may do, within its tenant."""

    READ = "read"
    """Look up and subscribe."""

    RUN = "run"
    """The same; and accept runs, cancel them, and create sessions."""

    ADMIN = "admin"
    """The same; and delete sessions."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who was let in. `name` is for the log.

    A `peer` is another node of the same store, which asks on behalf of somebody it let in itself.
    """

    tenant: str
    role: Role
    name: str
    peer: bool = False


ANYBODY = Caller(DEFAULT_TENANT, Role.ADMIN, "")
"""Every caller, where the server was told of none."""

CALLER: ContextVar[Caller] = ContextVar("caller")
"""Who made the call that is being handled. There is none by default: what is not behind the door
serves nobody."""


def tenant() -> str:
    """The tenant whose call is being handled."""
    return CALLER.get().tenant


class Credentials(NamedTuple):
    """What a call brings along to prove who makes it.

    `metadata` is its first value for each key. `certificate` has the names in the client's
    certificate, which the transport has verified: none, if there is none.
    """

    metadata: Mapping[str, str] = MappingProxyType({})
    certificate: Sequence[str] = ()


SHOWN: ContextVar[Credentials] = ContextVar("shown")
"""What the call that is being handled brought along."""
