"""JSON Web Tokens (RFC 7519) of other issuers, verified with PyJWT."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from runlane_server.access.caller import AuthenticationFailed, Caller, Identity, Role, is_tenant
from runlane_server.extras import missing

ALGORITHMS = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
"""Algorithms that an access file may allow. HS256 is not among them: with a shared secret, every
verifier can issue tokens, and where both kinds are allowed a public key can pass for a secret."""

MAX_CACHED = 4096
"""Size of the cache of verified tokens, which saves most calls a signature check."""

_MAX_LENGTH = 8192
"""Characters."""

_NAME_LENGTH = 64


_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_OKP = ("EdDSA",)
_BY_CURVE = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_BY_KIND: Mapping[object, Sequence[str]] = {
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): _OKP,
    ("OKP", "Ed448"): _OKP,
}
"""The algorithms of each kind of key. A token cannot choose another one for the key."""


class Key(NamedTuple):
    """A public key with the algorithms allowed for it."""

    material: Any
    algorithms: Sequence[str]


class UnusableKeys(Exception):
    """The keys cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class JwtSettings:
    """Which tokens are valid, and how their claims map to a caller.

    Tenant and role are either fixed or read from a claim. `tenants` and `roles` map values of the
    claim; an unmapped value is refused. Without a map the value itself is the tenant or role.
    `agents` are those that the callers may use; None: all. `keys` is a JSON Web Key Set if
    `is_set`, else a public key as PEM. `leeway` is in seconds.
    """

    keys: Path
    is_set: bool
    algorithms: Sequence[str]
    issuer: str
    audience: str
    tenant: str = ""
    tenant_claim: str = ""
    role: Role | None = None
    role_claim: str = ""
    tenants: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)
    leeway: float = 30.0
    agents: frozenset[str] | None = None


class JwtVerifier:
    """Verifies tokens and caches the result.

    `now` returns seconds since 1970; it expires cached tokens. Raises UnusableKeys, or OSError if
    the keys cannot be read.
    """

    def __init__(self, settings: JwtSettings, now: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._now = now
        self._keys = _keys(settings)
        self._cache: OrderedDict[bytes, Identity] = OrderedDict()

    def verify(self, text: str) -> Identity:
        """Returns the identity behind a token. Raises AuthenticationFailed."""
        if len(text) > _MAX_LENGTH:
            raise AuthenticationFailed("token too long")
        # Keyed by hash, so that the time of a lookup reveals nothing about other tokens.
        digest = hashlib.sha256(text.encode()).digest()
        identity = self._cache.get(digest)
        if identity is None:
            identity = self._decode(text)
            self._cache[digest] = identity
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        if identity.expires is not None and self._now() >= identity.expires:
            del self._cache[digest]
            raise AuthenticationFailed("token expired", subject=identity.caller.name)
        return identity

    def _decode(self, text: str) -> Identity:
        import jwt  # noqa: PLC0415 - an extra

        settings = self._settings
        try:
            key = self._key(jwt.get_unverified_header(text))
            claims = jwt.decode(
                text,
                key.material,
                algorithms=key.algorithms,
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=settings.leeway,
                options={"require": ["exp", "iss", "aud"]},
            )
            # An integer may be larger than any float.
            expires = float(claims["exp"]) + settings.leeway
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
            # The text of the error may contain parts of the token.
            raise AuthenticationFailed("invalid token", error=type(error).__name__) from None
        return Identity(self._caller(claims), expires)

    def _key(self, header: Mapping[str, Any]) -> Key:
        if len(self._keys) == 1 and "kid" not in header:
            return next(iter(self._keys.values()))
        key = self._keys.get(header.get("kid") if self._settings.is_set else "")
        if key is None:
            raise AuthenticationFailed("token signed with an unknown key")
        return key

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        settings = self._settings
        name = "".join(filter(str.isprintable, str(claims.get("sub", ""))))[:_NAME_LENGTH]
        tenant = settings.tenant or self._tenant(claims.get(settings.tenant_claim))
        roles = [settings.role] if settings.role else self._roles(claims.get(settings.role_claim))
        if not is_tenant(tenant):
            raise AuthenticationFailed("token without a valid tenant", subject=name)
        if not roles:
            raise AuthenticationFailed("token without a valid role", subject=name)
        first, *others = roles
        return Caller(tenant, first, name, agents=settings.agents, others=frozenset(others))

    def _tenant(self, claimed: object) -> str:
        if not isinstance(claimed, str):
            return ""
        return self._settings.tenants.get(claimed, "") if self._settings.tenants else claimed

    def _roles(self, claimed: object) -> Sequence[Role]:
        """The roles in a claim, which is a string or a list of strings."""
        values = claimed if isinstance(claimed, list) else [claimed]
        roles = self._settings.roles or {role.value: role for role in Role}
        named = {roles.get(value) for value in values if isinstance(value, str)}
        return [role for role in reversed(Role) if role in named]


def _keys(settings: JwtSettings) -> dict[str | None, Key]:
    """The keys by id; the key of a PEM file has the id `""`. Raises UnusableKeys or OSError."""
    try:
        import jwt  # noqa: PLC0415
    except ImportError as error:
        raise UnusableKeys(f"[jwt]: {missing(error) or error}") from None
    try:
        text = settings.keys.read_text()
        found = _of_set(text) if settings.is_set else {"": _of_pem(text)}
    except (ValueError, TypeError, LookupError, AttributeError, jwt.PyJWTError) as error:
        raise UnusableKeys(f"{settings.keys}: {str(error) or type(error).__name__}") from None
    keys = {
        name: Key(key.material, allowed)
        for name, key in found.items()
        if (allowed := [each for each in key.algorithms if each in settings.algorithms])
    }
    if not keys:
        raise UnusableKeys(f"{settings.keys}: no key for {', '.join(settings.algorithms)}")
    return keys


def _of_pem(text: str) -> Key:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415

    material = load_pem_public_key(text.encode())
    if isinstance(material, rsa.RSAPublicKey):
        return Key(material, _RSA)
    if isinstance(material, ec.EllipticCurvePublicKey):
        return Key(material, [_BY_CURVE[material.curve.name]])
    return Key(material, _OKP)


def _of_set(text: str) -> dict[str | None, Key]:
    """The signature keys of a JSON Web Key Set (RFC 7517); others are ignored."""
    import jwt  # noqa: PLC0415

    keys: dict[str | None, Key] = {}
    for data in json.loads(text)["keys"]:
        kind = data.get("kty"), data.get("crv")
        fitting = _RSA if kind[0] == "RSA" else _BY_KIND.get(kind, ())
        allowed = [each for each in fitting if data.get("alg", each) == each]
        if allowed and data.get("use", "sig") == "sig":
            keys[data.get("kid", "")] = Key(jwt.PyJWK(data, allowed[0]).key, allowed)
    return keys
