"""Authenticates and authorizes every call, and rechecks the calls that stay open."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol

from runlane_server.access.call_limits import CallInFlight, CallLimits, Holder
from runlane_server.access.caller import ANONYMOUS, AuthenticationFailed, Caller, Credentials, Role
from runlane_server.access.failure_log import FailureLog
from runlane_server.access.node_keys import PREFIX, NodeKeys
from runlane_server.access.permissions import NODE_METHODS, PUBLIC_METHODS, is_allowed
from runlane_server.access.quotas import QuotaBook
from runlane_server.access.stream_quota import LONG_LIVED_METHODS, StreamQuota
from runlane_server.core.errors import PermissionDenied, RunlaneError, Unauthenticated

_PUBLIC = Caller("", Role.READ, "")
"""The caller of methods that need no authentication."""


class Authenticator(Protocol):
    """Authenticates callers."""

    def authenticate(self, credentials: Credentials) -> Caller:
        """Returns the caller with these credentials. Raises Unauthenticated."""


@dataclass(slots=True, eq=False)
class OpenCall:
    """A call in progress.

    `ids` is how many ids its subscription has. `revocation` is the error that ends it once its
    caller has lost access. `is_sending` is true during a write, which must not be cancelled.
    """

    method: str
    credentials: Credentials
    task: asyncio.Task[object]
    caller: Caller = _PUBLIC
    ids: int = 0
    revocation: RunlaneError | None = None
    is_sending: bool = False

    def revoke(self, error: RunlaneError) -> None:
        """Ends the call with an error, at once or after the write in progress."""
        self.revocation = error
        if not self.is_sending:
            self.task.cancel()

    def raise_if_revoked(self) -> None:
        """Raises the revocation, if there is one."""
        if self.revocation is not None:
            raise self.revocation


class AccessControl:
    """Decides which calls are served. Without an authenticator every call has full access, as the
    default tenant. `node_keys` are those of the nodes that share the store.
    """

    def __init__(
        self,
        authenticator: Authenticator | None = None,
        *,
        node_keys: NodeKeys | None = None,
        quotas: QuotaBook | None = None,
    ) -> None:
        self._authenticator = authenticator
        self.node_keys = node_keys or NodeKeys()
        self._open_calls: set[OpenCall] = set()
        self._callers: set[str] = set()
        self._failure_log = FailureLog(time.monotonic)
        self.stream_quota = StreamQuota(quotas or QuotaBook())
        self.call_limits = CallLimits()

    def identify(self, method: str, credentials: Credentials, *, is_open: bool = False) -> Caller:
        """Returns the caller of a method, which `permit` may refuse. Raises Unauthenticated.

        `is_open`: the call was authorized before, so a signature of a node may be older than 30 s.
        """
        if method in PUBLIC_METHODS:
            return _PUBLIC
        caller = self._authenticate(credentials, is_open=is_open)
        self._callers.add(credentials.peer)
        return caller

    def permit(self, caller: Caller, method: str) -> None:
        """Raises PermissionDenied if the caller may not call the method."""
        if method in PUBLIC_METHODS:
            return
        name = method.rpartition("/")[2]
        if caller.peer and method not in NODE_METHODS:
            raise PermissionDenied(f"a node may not call {name}")
        if not any(is_allowed(role, method) for role in caller.roles):
            shown = " or ".join(repr(role.value) for role in caller.roles)
            raise PermissionDenied(f"the role {shown} may not call {name}")

    def authorize(self, method: str, credentials: Credentials, *, is_open: bool = False) -> Caller:
        """Returns the caller of a method. Raises Unauthenticated or PermissionDenied."""
        caller = self.identify(method, credentials, is_open=is_open)
        self.permit(caller, method)
        return caller

    def register(self, call: OpenCall) -> None:
        """Adds an authorized call to those that `recheck` may revoke.

        Raises QuotaExceeded for a long-lived call if its tenant has no stream left.
        """
        if call.method in LONG_LIVED_METHODS:
            self.stream_quota.acquire(call.caller)
        self._open_calls.add(call)

    def take_calling_ports(self) -> set[int]:
        """The ports of known callers with open calls, or any calls since this was called last.

        A call that was refused counts: a caller that authenticates is no stranger.
        """
        peers, self._callers = self._callers, set()
        peers.update(one.credentials.peer for one in self._open_calls if one.caller is not _PUBLIC)
        ports = (peer.rpartition(":")[2] for peer in peers)
        return {int(port) for port in ports if port.isdecimal()}

    def weigh(self, call: OpenCall, ids: int) -> None:
        """Counts the ids of a registered subscription. Raises QuotaExceeded or Overloaded."""
        self.stream_quota.weigh(call.caller, ids)
        call.ids = ids

    def begin(self, call: OpenCall, peer: str) -> CallInFlight:
        """Counts an authorized call until it is closed, which is after its answer was sent.

        `peer` is the address of its connection, as gRPC writes it. Raises Overloaded.
        """
        public = call.method in PUBLIC_METHODS
        # All callers of a Unix socket have the same address.
        host, _, port = peer.rpartition(":")
        connection = peer if port.isdecimal() else ""
        holder = Holder("host", host) if public else Holder("tenant", call.caller.tenant)
        counted = public or call.method not in LONG_LIVED_METHODS
        return self.call_limits.begin(holder, connection, counted=counted)

    def unregister(self, call: OpenCall) -> None:
        """Removes a registered call that has ended."""
        self._open_calls.discard(call)
        if call.method in LONG_LIVED_METHODS:
            self.stream_quota.release(call.caller, call.ids)

    def recheck(self) -> None:
        """Revokes the open calls that would not be authorized now."""
        for call in tuple(self._open_calls):
            try:
                self.confirm(call)
            except RunlaneError as error:
                call.revoke(error)

    def confirm(self, call: OpenCall) -> None:
        """Raises Unauthenticated or PermissionDenied if a call would not be authorized now."""
        caller = self.authorize(call.method, call.credentials, is_open=True)
        if caller.tenant != call.caller.tenant:
            raise Unauthenticated("the caller belongs to another tenant now")

    def _authenticate(self, credentials: Credentials, *, is_open: bool) -> Caller:
        _, _, token = credentials.metadata.get("authorization", "").partition(" ")
        if token.startswith(PREFIX):
            return self._authenticate_node(token, credentials, is_open=is_open)
        if self._authenticator is None:
            return ANONYMOUS
        return self._authenticator.authenticate(credentials)

    def _authenticate_node(self, token: str, credentials: Credentials, *, is_open: bool) -> Caller:
        try:
            call = self.node_keys.verify(token, is_open=is_open)
        except AuthenticationFailed as error:
            self._failure_log.record(error, credentials.peer)
            raise Unauthenticated("the caller is not a node of this store") from None
        return Caller(call.tenant, Role.READ, "node", peer=True, run_id=call.run_id)
