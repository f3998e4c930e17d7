"""Removals of single access checks, each with the probe that must detect it."""

from __future__ import annotations

from typing import Any, NamedTuple

from runlane_server.access import access_file, control, entries, jwts, node_keys, tokens
from runlane_server.process import security
from runlane_server.rpc import middleware, runs, webhooks
from runlane_server.rpc.cursor import Cursors
from runlane_server.rpc.runs import RunService
from runlane_server.rpc.sessions import SessionService

TENANT = "tenant()"
THEIRS = '"acme"'


class Removed(NamedTuple):
    """A removed check: `old` is replaced by `new` in a function of `owner`, and the probe
    `detected_by` must fail."""

    name: str
    owner: Any
    function: str
    old: str
    new: str
    detected_by: str


def of_tenant(owner: type, function: str, detected_by: str = "strangers") -> Removed:
    """A handler that ignores the tenant."""
    name = f"{function} ignores the tenant"
    return Removed(name, owner, function, TENANT, THEIRS, detected_by)


def of_agents(owner: type, function: str) -> Removed:
    """A handler that ignores the limit of its caller to some agents."""
    name = f"{function} ignores the agents of the caller"
    return Removed(name, owner, function, "CALLER.get().agents", "None", "agents")


REMOVED = (
    Removed(
        "the role is ignored",
        control.AccessControl,
        "permit",
        "not any(is_allowed(role, method) for role in caller.roles)",
        "False",
        "roles",
    ),
    Removed(
        "callers who start runs manage all webhooks",
        webhooks,
        "_check_scope",
        "not may_manage_webhooks(CALLER.get().roles)",
        "False",
        "roles",
    ),
    Removed(
        "every method is public",
        control.AccessControl,
        "identify",
        "if method in PUBLIC_METHODS",
        "if True",
        "anonymous",
    ),
    Removed(
        "no call is authenticated",
        control.AccessControl,
        "_authenticate",
        "self._authenticator.authenticate(credentials)",
        "ANONYMOUS",
        "anonymous",
    ),
    Removed(
        "unknown callers are accepted",
        access_file.AccessFile,
        "authenticate",
        "raise Unauthenticated(UNKNOWN_CALLER) from None",
        "return Caller('acme', 'admin', '')",
        "bad_tokens",
    ),
    Removed(
        "the error says what is wrong",
        access_file.AccessFile,
        "authenticate",
        "Unauthenticated(UNKNOWN_CALLER)",
        "Unauthenticated(failure.reason)",
        "bad_tokens",
    ),
    Removed(
        "the secret is not compared",
        tokens.TokenVerifier,
        "verify",
        "if not is_right:",
        "if False:",
        "bad_tokens",
    ),
    Removed(
        "the secret is compared with something else",
        tokens.TokenVerifier,
        "verify",
        'hash_of(match["secret"]), _NO_HASH if token is None else token.sha256',
        '"", ""',
        "bad_tokens",
    ),
    Removed(
        "a token may have a suffix",
        tokens.TokenVerifier,
        "verify",
        "_FORM.fullmatch(text)",
        "_FORM.match(text)",
        "bad_tokens",
    ),
    Removed(
        "any scheme is accepted",
        access_file.AccessFile,
        "_find",
        'if scheme.lower() != "bearer":',
        "if False:",
        "bad_tokens",
    ),
    Removed(
        "a token never expires",
        tokens.TokenVerifier,
        "verify",
        "now >= token.expires",
        "False",
        "expired",
    ),
    Removed(
        "the expiry of a token is not read",
        entries,
        "_token",
        'expires = _time(table, "expires")',
        'expires = None if _time(table, "expires") else None',
        "expired",
    ),
    Removed(
        "any name in a certificate is accepted",
        access_file.AccessFile,
        "_by_certificate",
        "[entries[name] for name in credentials.certificate if name in entries]",
        "list(entries.values())",
        "certificates",
    ),
    Removed(
        "a certificate takes precedence over a token",
        access_file.AccessFile,
        "_find",
        "if authorization is None:",
        "if credentials.certificate:",
        "certificates",
    ),
    Removed(
        "the signature of a node is not checked",
        node_keys.NodeKeys,
        "verify",
        'if not any(hmac.compare_digest(match["mac"], mac) for mac in macs):',
        "if False:",
        "nodes",
    ),
    Removed(
        "the age of a node's signature is not checked",
        node_keys.NodeKeys,
        "verify",
        "if not is_open and",
        "if False and",
        "nodes",
    ),
    Removed(
        "the signature of a node is valid at every node",
        node_keys,
        "_mac",
        "{address}",
        "",
        "nodes",
    ),
    Removed(
        "a node may call every method",
        control.AccessControl,
        "permit",
        "if caller.peer and method not in NODE_METHODS:",
        "if False:",
        "nodes",
    ),
    Removed(
        "a node may follow every run of the tenant",
        runs,
        "_check_peer",
        "caller.run_id != run_id",
        "False",
        "nodes",
    ),
    *(
        Removed(
            f"the {what} of a JSON Web Token is not checked",
            jwts.JwtVerifier,
            "_decode",
            '"require": ["exp", "iss", "aud"]',
            f'"require": ["exp", "iss", "aud"], "verify_{what}": False',
            "jwt_is_verified",
        )
        for what in ("aud", "iss", "nbf")  # "exp" is checked again in the cache
    ),
    Removed(
        "the signature of a JSON Web Token is not checked",
        jwts.JwtVerifier,
        "_decode",
        '"require": ["exp", "iss", "aud"]',
        '"verify_signature": False, "verify_exp": True, "verify_aud": True, "verify_iss": True',
        "jwt_is_verified",
    ),
    Removed(
        "any algorithm is accepted",
        jwts.JwtVerifier,
        "_decode",
        "algorithms=key.algorithms",
        'algorithms=["ES256", "RS256", "RS512"]',
        "jwt_algorithm",
    ),
    Removed(
        "a key may be used with any algorithm",
        jwts,
        "_keys",
        "if each in settings.algorithms",
        "",
        "jwt_algorithm",
    ),
    Removed(
        "a cached JSON Web Token never expires",
        jwts.JwtVerifier,
        "verify",
        "self._now() >= identity.expires",
        "False",
        "jwt_cached",
    ),
    Removed(
        "the name of a tenant is not validated",
        jwts.JwtVerifier,
        "_caller",
        "if not is_tenant(tenant):",
        "if False:",
        "jwt_is_verified",
    ),
    Removed(
        "a missing role means read",
        jwts.JwtVerifier,
        "_caller",
        "if not roles:",
        "roles = roles or [Role.READ]\n        if False:",
        "jwt_is_verified",
    ),
    Removed(
        "a changed file is not reloaded",
        access_file.AccessFile,
        "_reload",
        "if stamp(self._files) == self._seen:",
        "if True:",
        "revoked",
    ),
    Removed(
        "open calls are not rechecked",
        security.Security,
        "_refresh_access",
        "access_control.recheck()",
        "pass",
        "revoked",
    ),
    Removed(
        "a call is not registered",
        control.AccessControl,
        "register",
        "self._open_calls.add(call)",
        "pass",
        "revoked",
    ),
    Removed(
        "expiry is not noticed",
        access_file.AccessFile,
        "refresh",
        "or self._now() >= self._next_expiry",
        "",
        "expires_meanwhile",
    ),
    Removed(
        "only the last expiry is noticed",
        access_file.AccessFile,
        "authenticate",
        "min(self._next_expiry, identity.expires)",
        "max(self._next_expiry, identity.expires)",
        "expires_meanwhile",
    ),
    Removed(
        "a moved token keeps its calls",
        control.AccessControl,
        "confirm",
        "if caller.tenant != call.caller.tenant:",
        "if False:",
        "moved",
    ),
    Removed(
        "a write is cancelled",
        control.OpenCall,
        "revoke",
        "if not self.is_sending:",
        "if True:",
        "slow_reader",
    ),
    Removed(
        "a revoked call goes on writing",
        control.OpenCall,
        "raise_if_revoked",
        "if self.revocation is not None:",
        "if False:",
        "slow_reader",
    ),
    Removed(
        "an invalid file denies everybody",
        access_file.AccessFile,
        "_reload",
        "            return False\n        self._reported",
        "            self._contents = _Contents(Entries(), TokenVerifier(()), None)\n"
        "            return True\n        self._reported",
        "broken_file",
    ),
    Removed(
        "a cursor of another tenant is accepted",
        Cursors,
        "__init__",
        'Seal(store_id, "cursor", tenant)',
        'Seal(store_id, "cursor")',
        "cursors",
    ),
    Removed(
        "a page token of another tenant is accepted",
        RunService,
        "ListRuns",
        "lists.Tokens(self._store.store_id, tenant())",
        'lists.Tokens(self._store.store_id, "acme")',
        "cursors",
    ),
    Removed(
        "the authorization metadata is dropped",
        middleware,
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
        "SubscribeRun ignores the tenant",
        RunService,
        "SubscribeRun",
        "await self._coordinator.get_run(request.run_id, tenant=tenant())\n"
        "        key = RunKey(tenant(),",
        'await self._coordinator.get_run(request.run_id, tenant="acme")\n'
        '        key = RunKey("acme",',
        "strangers",
    ),
    Removed(
        "GetRun first reads across tenants",
        RunService,
        "GetRun",
        "run = await",
        'if await self._store.get_run(RunKey("acme", request.run_id)):\n'
        '                await self._store.get_run(RunKey("acme", request.run_id))\n'
        "            run = await",
        "same_path",
    ),
    of_tenant(RunService, "Cancel"),
    of_tenant(RunService, "CancelAll"),
    of_tenant(RunService, "_cancel_page", "same_names"),
    Removed(
        "GetRun ignores the tenant",
        RunService,
        "GetRun",
        "tenant=tenant()",
        'tenant="acme"',
        "strangers",
    ),
    of_tenant(RunService, "WaitRun"),
    of_tenant(SessionService, "DeleteSession"),
    of_tenant(SessionService, "_session"),
    Removed(
        "RunAccepted ignores the tenant",
        RunService,
        "RunAccepted",
        "wanted.run_id, tenant=tenant()",
        'wanted.run_id, tenant="acme"',
        "strangers",
    ),
    Removed(
        "ListRuns ignores the tenant",
        RunService,
        "ListRuns",
        "list_runs(tenant(),",
        'list_runs("acme",',
        "strangers",
    ),
    Removed(
        "UpdateRun ignores the tenant",
        RunService,
        "UpdateRun",
        "tenant(), request.run_id, patch",
        '"acme", request.run_id, patch',
        "strangers",
    ),
    Removed(
        "ListSessions ignores the tenant",
        SessionService,
        "ListSessions",
        "list_sessions(\n                tenant(),",
        'list_sessions(\n                "acme",',
        "lists",
    ),
    Removed(
        "CreateSession ignores the tenant",
        SessionService,
        "CreateSession",
        TENANT,
        THEIRS,
        "lists",
    ),
    Removed(
        "UpdateSession ignores the tenant",
        SessionService,
        "UpdateSession",
        "tenant=tenant()",
        'tenant="acme"',
        "strangers",
    ),
    Removed(
        "ForkSession ignores the tenant",
        SessionService,
        "ForkSession",
        "tenant=tenant()",
        'tenant="acme"',
        "strangers",
    ),
    Removed(
        "ListMessages ignores the tenant",
        SessionService,
        "ListMessages",
        "SessionKey(tenant(), request.session_id)",
        'SessionKey("acme", request.session_id)',
        "same_names",
    ),
    of_agents(RunService, "RunAccepted"),
    of_agents(RunService, "UpdateRun"),
    of_agents(SessionService, "CreateSession"),
    of_agents(SessionService, "UpdateSession"),
    of_agents(SessionService, "ForkSession"),
)
