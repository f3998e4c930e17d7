"""Authenticates callers by the access file, which is reloaded when it changes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from runlane_server.access.caller import AuthenticationFailed, Caller, Credentials, Identity
from runlane_server.access.entries import BadEntry, Entries, parse
from runlane_server.access.failure_log import FailureLog
from runlane_server.access.file_stamp import Stamp, stamp
from runlane_server.access.grants import Grant
from runlane_server.access.jwts import JwtVerifier, UnusableKeys
from runlane_server.access.quotas import Quotas
from runlane_server.access.tokens import PREFIX, TokenVerifier
from runlane_server.core.errors import Unauthenticated, start_error

log = structlog.get_logger()

UNKNOWN_CALLER = "invalid or missing credentials"
"""The message of every failed authentication. It does not say what is wrong; the log does."""


class _Unreadable(BadEntry):
    """The file, or one that it names, could not be read this time."""


@dataclass(frozen=True, slots=True)
class _Contents:
    """The loaded file, with the verifiers made from it."""

    entries: Entries
    tokens: TokenVerifier
    jwts: JwtVerifier | None


class AccessFile:
    """Authenticates callers by a file and the keys that it names. For one event loop.

    `now` returns seconds since 1970. Raises StartError for an invalid file.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._failure_log = FailureLog(now)
        self._next_expiry = math.inf
        self._files: tuple[Path, ...] = (path,)
        self._seen: Stamp = ()
        self._reported = ""
        try:
            self._contents = self._read()
        except BadEntry as error:
            raise start_error(f"--access {error}", error.__cause__) from None

    @property
    def has_certificates(self) -> bool:
        """Whether the file has callers with certificates."""
        return bool(self._contents.entries.certificates)

    @property
    def quotas(self) -> Quotas:
        """The quotas of the tenants."""
        return self._contents.entries.quotas

    @property
    def grants(self) -> Sequence[Grant]:
        """The standing approvals."""
        return self._contents.entries.grants

    def authenticate(self, credentials: Credentials) -> Caller:
        """Returns the caller. Raises Unauthenticated; only the log says why."""
        try:
            identity = self._find(credentials)
        except AuthenticationFailed as failure:
            self._failure_log.record(failure, credentials.peer)
            raise Unauthenticated(UNKNOWN_CALLER) from None
        if identity.expires is not None:
            self._next_expiry = min(self._next_expiry, identity.expires)
        return identity.caller

    def refresh(self) -> bool:
        """Reloads changed files. Returns whether open calls need a recheck.

        They do after a reload, and when an identity has expired. An invalid file changes nothing
        and is logged once. A file that could not be read, for example because descriptors ran out,
        is read again by each refresh: it may revoke a token.
        """
        changed = self._reload()
        if changed or self._now() >= self._next_expiry:
            # The recheck authenticates every open call again, which finds the next expiry.
            self._next_expiry = math.inf
            return True
        return False

    def _reload(self) -> bool:
        if stamp(self._files) == self._seen:
            return False
        try:
            self._contents = self._read()
        except BadEntry as error:
            if isinstance(error, _Unreadable):
                self._seen = ()
            if str(error) != self._reported:
                self._reported = str(error)
                # A mistake in a file, not in the code: no traceback.
                log.error("invalid access file ignored", error=str(error))  # noqa: TRY400
            return False
        self._reported = ""
        log.info("access file reloaded", tokens=len(self._contents.entries.tokens))
        return True

    def _read(self) -> _Contents:
        # The stamps come first, so that a write during the read is found by the next refresh.
        self._files, self._seen = (self._path,), stamp([self._path])
        try:
            entries = parse(self._path.read_text(encoding="utf-8"), self._path.parent)
            jwts = None
            if entries.jwt is not None:
                self._files = (self._path, entries.jwt.keys)
                self._seen += stamp([entries.jwt.keys])
                jwts = JwtVerifier(entries.jwt, self._now)
        except OSError as error:
            raise _Unreadable(f"{error.filename or self._path}: {error.strerror}") from error
        except UnicodeDecodeError:
            raise BadEntry(f"{self._path}: not UTF-8") from None
        except (BadEntry, UnusableKeys) as error:
            raise BadEntry(f"{self._path}: {error}") from None
        return _Contents(entries, TokenVerifier(entries.tokens), jwts)

    def _find(self, credentials: Credentials) -> Identity:
        authorization = credentials.metadata.get("authorization")
        if authorization is None:
            return self._by_certificate(credentials)
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise AuthenticationFailed("authorization scheme is not Bearer")
        if text.startswith(PREFIX) or self._contents.jwts is None:
            return self._contents.tokens.verify(text, self._now())
        return self._contents.jwts.verify(text)

    def _by_certificate(self, credentials: Credentials) -> Identity:
        entries = self._contents.entries.certificates
        callers = [entries[name] for name in credentials.certificate if name in entries]
        if len({(caller.tenant, caller.role, caller.agents) for caller in callers}) == 1:
            return Identity(callers[0])
        if callers:
            raise AuthenticationFailed("certificate names match several callers")
        if credentials.certificate:
            raise AuthenticationFailed(
                "unknown certificate", names=repr(credentials.certificate)[:200]
            )
        raise AuthenticationFailed("no credentials")
