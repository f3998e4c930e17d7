"""The door: every call comes through it, and open streams are looked at again."""

from __future__ import annotations

import asyncio
import hmac
import time
from dataclasses import dataclass
from typing import Protocol

from runlane_server.access.caller import ANYBODY, Caller, Credentials, Role
from runlane_server.access.failures import Failures
from runlane_server.access.known import Refused
from runlane_server.access.permissions import OPEN, allows
from runlane_server.access.quotas import QuotaBook
from runlane_server.access.stream_quota import LASTING, Streams
from runlane_server.core.errors import PermissionDenied, RunlaneError, Unauthenticated

PEER_KEY = "runlane-peer"
"""The metadata with which another node of the same store proves that it is one."""

PEER_TENANT = "runlane-peer-tenant"
"""The metadata that tells for which tenant it asks, in hexadecimal UTF-8."""

_NOBODY = Caller("", Role.READ, "")
"""Who asks what anybody may ask."""


class Identities(Protocol):
    """Knows who may come in."""

    def identify(self, credentials: Credentials) -> Caller:
        """Who that is. Raises Unauthenticated."""


@dataclass(slots=True, eq=False)
class Visit:
    """A call that is being handled. `caller` is who was let in; `refused` is set when it may not go
    on; `sends` while something is being sent."""

    method: str
    credentials: Credentials
    task: asyncio.Task[object]
    caller: Caller = _NOBODY
    refused: RunlaneError | None = None
    sends: bool = False

    def refuse(self, error: RunlaneError) -> None:
        """Ends the call, as soon as nothing is being sent: that cannot be cancelled."""
        self.refused = error
        if not self.sends:
            self.task.cancel()

    def check(self) -> None:
        """Raises what the call is refused for meanwhile."""
        if self.refused is not None:
            raise self.refused


class Door:
    """Lets calls in. Without identities everybody may do everything, as the default tenant.

    `peer_key` is what only the nodes of one store know.
    """

    def __init__(
        self,
        identities: Identities | None = None,
        *,
        peer_key: str = "",
        quotas: QuotaBook | None = None,
    ) -> None:
        self._identities = identities
        self._peer_key = peer_key.encode()
        self._visits: set[Visit] = set()
        self._failures = Failures(time.monotonic)
        self.streams = Streams(quotas or QuotaBook())

    def admit(self, method: str, credentials: Credentials) -> Caller:
        """Who makes that call, if they may. Raises Unauthenticated and PermissionDenied."""
        if method in OPEN:
            return _NOBODY
        caller = self._identify(credentials)
        if not allows(caller.role, method):
            name = method.rpartition("/")[2]
            raise PermissionDenied(f"the role {caller.role.value!r} may not call {name}")
        return caller

    def enter(self, visit: Visit) -> None:
        """A call was let in: it is cancelled, as soon as it may not go on. Raises QuotaExceeded
        where it is to last, and its tenant has as many of those open as it may."""
        if visit.method in LASTING:
            self.streams.enter(visit.caller)
        self._visits.add(visit)

    def leave(self, visit: Visit) -> None:
        """A call that entered is over."""
        self._visits.discard(visit)
        if visit.method in LASTING:
            self.streams.leave(visit.caller)

    def look_again(self) -> None:
        """Who may come in has changed, or time has passed: ends the calls that would not be let in
        now."""
        for visit in tuple(self._visits):
            try:
                caller = self.admit(visit.method, visit.credentials)
                if caller.tenant != visit.caller.tenant:
                    raise Unauthenticated("the caller is of another tenant by now")
            except RunlaneError as error:
                visit.refuse(error)

    def _identify(self, credentials: Credentials) -> Caller:
        if PEER_KEY in credentials.metadata:
            return self._peer(credentials)
        return ANYBODY if self._identities is None else self._identities.identify(credentials)

    def _peer(self, credentials: Credentials) -> Caller:
        shown = credentials.metadata[PEER_KEY].encode()
        if not (self._peer_key and hmac.compare_digest(shown, self._peer_key)):
            self._failures.tell(Refused("the key of the node is wrong"))
            raise Unauthenticated("the caller is no node of this store")
        try:
            tenant = bytes.fromhex(credentials.metadata.get(PEER_TENANT, "")).decode()
        except ValueError:
            raise Unauthenticated("the node does not say for which tenant it asks") from None
        return Caller(tenant, Role.READ, "node", peer=True)
