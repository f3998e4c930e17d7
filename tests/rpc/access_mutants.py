"""Checks of the door, each taken out, and the probe that has to notice it."""

from __future__ import annotations

from typing import Any, NamedTuple

from runlane_server.access import door as doors
from runlane_server.access import entries, identities, jwts, tokens
from runlane_server.process import security
from runlane_server.rpc import guard
from runlane_server.rpc.cursor import Cursors
from runlane_server.rpc.runs import RunService
from runlane_server.rpc.sessions import SessionService

TENANT = "tenant()"
THEIRS = '"acme"'


class Removed(NamedTuple):
    """A check that is not made: `old` is exchanged for `new` in a function of `owner`; and the
    probe that has to notice it."""

    name: str
    owner: Any
    function: str
    old: str
    new: str
    noticed_by: str


def of_tenant(owner: type, function: str, noticed_by: str = "strangers") -> Removed:
    """A handler that does not look whose it is."""
    name = f"{function} does not look whose it is"
    return Removed(name, owner, function, TENANT, THEIRS, noticed_by)


REMOVED = (
    Removed(
        "the role is not looked at",
        doors.Door,
        "admit",
        "if not allows(caller.role, method):",
        "if False:",
        "roles",
    ),
    Removed(
        "everybody may ask everything",
        doors.Door,
        "admit",
        "if method in OPEN:",
        "if True:",
        "nobody",
    ),
    Removed(
        "nobody is identified",
        doors.Door,
        "_identify",
        "ANYBODY if self._identities is None else self._identities.identify(credentials)",
        "ANYBODY",
        "nobody",
    ),
    Removed(
        "who is not known comes in",
        identities.AccessFile,
        "identify",
        "raise Unauthenticated(REFUSED) from None",
        "return Caller('acme', 'admin', '')",
        "bad_tokens",
    ),
    Removed(
        "the caller is told what is wrong",
        identities.AccessFile,
        "identify",
        "Unauthenticated(REFUSED)",
        "Unauthenticated(refused.why)",
        "bad_tokens",
    ),
    Removed(
        "the secret is not compared",
        tokens.Tokens,
        "find",
        "if not right:",
        "if False:",
        "bad_tokens",
    ),
    Removed(
        "the secret is compared with something else",
        tokens.Tokens,
        "find",
        'hash_of(form["secret"]), _NO_HASH if token is None else token.sha256',
        '"", ""',
        "bad_tokens",
    ),
    Removed(
        "a token may be a part of what is shown",
        tokens.Tokens,
        "find",
        "_FORM.fullmatch(text)",
        "_FORM.match(text)",
        "bad_tokens",
    ),
    Removed(
        "another scheme will do",
        identities.AccessFile,
        "_find",
        'if scheme.lower() != "bearer":',
        "if False:",
        "bad_tokens",
    ),
    Removed(
        "a token never expires",
        tokens.Tokens,
        "find",
        "now >= token.expires",
        "False",
        "expired",
    ),
    Removed(
        "the time of a token is not read",
        entries,
        "_token",
        "None if expires is None else expires.timestamp()",
        "None",
        "expired",
    ),
    Removed(
        "any name in a certificate will do",
        identities.AccessFile,
        "_by_certificate",
        "[entries[name] for name in credentials.certificate if name in entries]",
        "list(entries.values())",
        "certificates",
    ),
    Removed(
        "a certificate goes before a token",
        identities.AccessFile,
        "_find",
        "if shown is None:",
        "if credentials.certificate:",
        "certificates",
    ),
    Removed(
        "the key of the nodes is not checked",
        doors.Door,
        "_peer",
        "if not (self._peer_key and hmac.compare_digest(shown, self._peer_key)):",
        "if False:",
        "nodes",
    ),
    Removed(
        "no key is a key",
        doors.Door,
        "_peer",
        "self._peer_key and ",
        "",
        "nodes",
    ),
    Removed(
        "a node may do everything",
        doors.Door,
        "_peer",
        "Role.READ",
        "Role.ADMIN",
        "nodes",
    ),
    *(
        Removed(
            f"the {what} of a JSON Web Token is not checked",
            jwts.Jwts,
            "_verified",
            '"require": ["exp", "iss", "aud"]',
            f'"require": ["exp", "iss", "aud"], "verify_{what}": False',
            "jwt_is_verified",
        )
        for what in ("aud", "iss", "nbf")  # "exp" is looked at again where it is remembered
    ),
    Removed(
        "the signature of a JSON Web Token is not checked",
        jwts.Jwts,
        "_verified",
        '"require": ["exp", "iss", "aud"]',
        '"verify_signature": False, "verify_exp": True, "verify_aud": True, "verify_iss": True',
        "jwt_is_verified",
    ),
    Removed(
        "any algorithm will do",
        jwts.Jwts,
        "_verified",
        "algorithms=key.algorithms",
        'algorithms=["ES256", "RS256", "RS512"]',
        "jwt_algorithm",
    ),
    Removed(
        "a key may be used in every way",
        jwts,
        "_keys",
        "if each in settings.algorithms",
        "",
        "jwt_algorithm",
    ),
    Removed(
        "a JSON Web Token that is remembered never expires",
        jwts.Jwts,
        "find",
        "self._now() >= known.until",
        "False",
        "jwt_remembered",
    ),
    Removed(
        "a tenant may be called anything",
        jwts.Jwts,
        "_caller",
        "if not is_tenant(tenant):",
        "if False:",
        "jwt_is_verified",
    ),
    Removed(
        "who has no role may look",
        jwts.Jwts,
        "_caller",
        "if role is None:",
        "role = role or Role.READ\n        if False:",
        "jwt_is_verified",
    ),
    Removed(
        "a change is not taken up",
        identities.AccessFile,
        "_reload",
        "if stamp(self._files) == self._seen:",
        "if True:",
        "revoked",
    ),
    Removed(
        "calls that are open are not looked at again",
        security.Security,
        "refresh",
        "door.look_again()",
        "pass",
        "revoked",
    ),
    Removed(
        "a visit is not kept in mind",
        doors.Door,
        "enter",
        "self._visits.add(visit)",
        "pass",
        "revoked",
    ),
    Removed(
        "that time passes is not noticed",
        identities.AccessFile,
        "refresh",
        "or self._now() >= self._first_end",
        "",
        "expires_meanwhile",
    ),
    Removed(
        "only the first who leaves is waited for",
        identities.AccessFile,
        "identify",
        "min(self._first_end, known.until)",
        "max(self._first_end, known.until)",
        "expires_meanwhile",
    ),
    Removed(
        "a call goes on for the tenant it had",
        doors.Door,
        "look_again",
        "if caller.tenant != visit.caller.tenant:",
        "if False:",
        "moved",
    ),
    Removed(
        "a write is cancelled in the middle",
        doors.Visit,
        "refuse",
        "if not self.sends:",
        "if True:",
        "slow_reader",
    ),
    Removed(
        "a write that ends is followed by others",
        doors.Visit,
        "check",
        "if self.refused is not None:",
        "if False:",
        "slow_reader",
    ),
    Removed(
        "a broken file lets nobody in",
        identities.AccessFile,
        "_reload",
        "            return False\n        log.info",
        "            self._contents = _Contents(Entries(), Tokens(()), None)\n"
        "            return True\n        log.info",
        "broken_file",
    ),
    Removed(
        "a cursor of another tenant is accepted",
        Cursors,
        "decode",
        "if binding != self._binding(tenant):",
        "if False:",
        "cursors",
    ),
    Removed(
        "a page token of another tenant is accepted",
        RunService,
        "_page_tokens",
        '            "ListRuns",\n            tenant(),',
        '            "ListRuns",',
        "cursors",
    ),
    Removed(
        "everybody is of one tenant",
        guard,
        "credentials_of",
        "    return Credentials(metadata,",
        "    metadata.pop('authorization', None)\n    return Credentials(metadata,",
        "roles",
    ),
    Removed(
        "a subscription sees all tenants",
        RunService,
        "SubscribeRunComplete",
        "self._feed.subscribe(tenant(), ",
        'self._feed.subscribe("acme", ',
        "feeds",
    ),
    Removed(
        "a run is followed whosever it is",
        RunService,
        "SubscribeRun",
        "await self._coordinator.get_run(request.run_id, tenant=tenant())\n"
        "        key = RunKey(tenant(),",
        'await self._coordinator.get_run(request.run_id, tenant="acme")\n'
        '        key = RunKey("acme",',
        "strangers",
    ),
    Removed(
        "it is looked first whether anybody has it",
        RunService,
        "GetRun",
        "run = await",
        'if await self._store.get_run(RunKey("acme", request.run_id)):\n'
        '            await self._store.get_run(RunKey("acme", request.run_id))\n'
        "        run = await",
        "same_path",
    ),
    of_tenant(RunService, "Cancel"),
    of_tenant(RunService, "CancelAll"),
    of_tenant(RunService, "GetRun"),
    of_tenant(RunService, "WaitRun"),
    of_tenant(SessionService, "DeleteSession"),
    of_tenant(SessionService, "_session"),
    Removed(
        "RunAccepted does not look whose it is",
        RunService,
        "RunAccepted",
        "wanted.run_id, tenant=tenant()",
        'wanted.run_id, tenant="acme"',
        "strangers",
    ),
    Removed(
        "ListRuns does not look whose they are",
        RunService,
        "ListRuns",
        "list_runs(\n                tenant(),",
        'list_runs(\n                "acme",',
        "strangers",
    ),
    Removed(
        "ListSessions does not look whose they are",
        SessionService,
        "ListSessions",
        "list_sessions(tenant(),",
        'list_sessions("acme",',
        "lists",
    ),
    Removed(
        "CreateSession does not look whose it is",
        SessionService,
        "CreateSession",
        TENANT,
        THEIRS,
        "lists",
    ),
    Removed(
        "ListMessages does not look whose they are",
        SessionService,
        "ListMessages",
        "SessionKey(tenant(), request.session_id)",
        'SessionKey("acme", request.session_id)',
        "same_names",
    ),
)
