"""Who may come in, by the access file; it is read again when it changes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from runlane_server.access.caller import Caller, Credentials
from runlane_server.access.entries import BadEntry, Entries, parse
from runlane_server.access.failures import Failures
from runlane_server.access.file_stamp import Stamp, stamp
from runlane_server.access.jwts import Jwts, UnusableKeys
from runlane_server.access.known import Known, Refused
from runlane_server.access.quotas import Quotas
from runlane_server.access.tokens import PREFIX, Tokens
from runlane_server.core.errors import StartError, Unauthenticated

log = structlog.get_logger()

REFUSED = "the caller is not known here"
"""All that a caller is told, whatever is wrong."""


@dataclass(frozen=True, slots=True)
class _Contents:
    """What was read."""

    entries: Entries
    tokens: Tokens
    jwts: Jwts | None


class AccessFile:
    """Identities that a file names. Raises StartError if it cannot be used.

    `now` tells the seconds since 1970. For one event loop.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._failures = Failures(now)
        self._first_end = math.inf
        self._files: tuple[Path, ...] = (path,)
        self._seen: Stamp = ()
        try:
            self._contents = self._read()
        except BadEntry as error:
            raise StartError(f"--access {error}") from None

    @property
    def has_certificates(self) -> bool:
        """Whether somebody is known by a certificate."""
        return bool(self._contents.entries.certificates)

    @property
    def quotas(self) -> Quotas:
        """What the tenants may take."""
        return self._contents.entries.quotas

    def identify(self, credentials: Credentials) -> Caller:
        """Who that is. Raises Unauthenticated, which does not say why; the log does."""
        try:
            known = self._find(credentials)
        except Refused as refused:
            self._failures.tell(refused)
            raise Unauthenticated(REFUSED) from None
        if known.until is not None:
            self._first_end = min(self._first_end, known.until)
        return known.caller

    def refresh(self) -> bool:
        """Takes up what changed in the files, and what the time is.

        Returns whether somebody who was let in may not be any more. A file that cannot be used
        changes nothing; the log is told once.
        """
        changed = self._reload()
        if changed or self._now() >= self._first_end:
            # Those who may stay are identified again, and tell when the next one ends.
            self._first_end = math.inf
            return True
        return False

    def _reload(self) -> bool:
        if stamp(self._files) == self._seen:
            return False
        try:
            self._contents = self._read()
        except BadEntry as error:
            why = str(error)
            log.error("the access file is not taken up; what was before holds", why=why)  # noqa: TRY400 - a mistake in a file, not in the code
            return False
        log.info("the access file was read again", tokens=len(self._contents.entries.tokens))
        return True

    def _read(self) -> _Contents:
        # The stamps come first: what is written while it is read is seen at the next look.
        self._files, self._seen = (self._path,), stamp([self._path])
        try:
            entries = parse(self._path.read_text(encoding="utf-8"), self._path.parent)
            jwts = None
            if entries.jwt is not None:
                self._files = (self._path, entries.jwt.keys)
                self._seen += stamp([entries.jwt.keys])
                jwts = Jwts(entries.jwt, self._now)
        except OSError as error:
            raise BadEntry(f"{self._path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise BadEntry(f"{self._path}: is not UTF-8") from None
        except (BadEntry, UnusableKeys) as error:
            raise BadEntry(f"{self._path}: {error}") from None
        return _Contents(entries, Tokens(entries.tokens), jwts)

    def _find(self, credentials: Credentials) -> Known:
        shown = credentials.metadata.get("authorization")
        if shown is None:
            return self._by_certificate(credentials)
        scheme, _, text = shown.partition(" ")
        if scheme.lower() != "bearer":
            raise Refused("the authorization is no bearer token")
        if text.startswith(PREFIX) or self._contents.jwts is None:
            return self._contents.tokens.find(text, self._now())
        return self._contents.jwts.find(text)

    def _by_certificate(self, credentials: Credentials) -> Known:
        entries = self._contents.entries.certificates
        callers = [entries[name] for name in credentials.certificate if name in entries]
        if len({(caller.tenant, caller.role) for caller in callers}) == 1:
            return Known(callers[0])
        if callers:
            raise Refused("the names in the certificate stand for several callers")
        if credentials.certificate:
            raise Refused("the certificate is not known", names=repr(credentials.certificate)[:200])
        raise Refused("the caller shows nothing")
