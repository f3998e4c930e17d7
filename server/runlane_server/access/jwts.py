"""JSON Web Tokens (RFC 7519) that somebody else issues; PyJWT verifies them."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from runlane_server.access.caller import Caller, Role
from runlane_server.access.known import Known, Refused
from runlane_server.access.names import is_tenant

ALGORITHMS = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
"""What may be allowed. With a shared secret (HS256) whoever can verify tokens can make them; and
where both are allowed, a public key is taken for a secret."""

REMEMBERED = 4096
"""How many verified tokens are remembered, so that not every call verifies a signature."""

_LONGEST = 8192
"""Characters; more does not fit into the headers that gRPC takes."""

_NAME_LENGTH = 64
_ROLES = (Role.ADMIN, Role.RUN, Role.READ)


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
"""The algorithms that go with a key: no token has it used in another way."""


class Key(NamedTuple):
    """A public key, and the algorithms it may be used with."""

    material: Any
    algorithms: Sequence[str]


class UnusableKeys(Exception):
    """The keys cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class JwtSettings:
    """What is asked of a token, and what it says of its holder.

    Tenant and role are fixed, or the values of claims; `tenants` and `roles` then say what a value
    stands for, and a value that is not there stands for nobody. Without them it is the tenant, or
    the role, itself. `leeway` is in seconds.
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


class Jwts:
    """Finds out who shows a token. Raises UnusableKeys if the keys cannot be used.

    `now` tells the seconds since 1970, for what is remembered.
    """

    def __init__(self, settings: JwtSettings, now: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._now = now
        self._keys = _keys(settings)
        self._remembered: OrderedDict[bytes, Known] = OrderedDict()

    def find(self, text: str) -> Known:
        """Who shows that token. Raises Refused."""
        if len(text) > _LONGEST:
            raise Refused("the token is too long")
        # By their hashes: how long a search takes tells nothing about tokens of others.
        digest = hashlib.sha256(text.encode()).digest()
        known = self._remembered.get(digest)
        if known is None:
            known = self._verified(text)
            self._remembered[digest] = known
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        if known.until is not None and self._now() >= known.until:
            del self._remembered[digest]
            raise Refused("the token has expired", subject=known.caller.name)
        return known

    def _verified(self, text: str) -> Known:
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
            until = float(claims["exp"]) + settings.leeway
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
            # Its text may have parts of the token.
            raise Refused("the token is not valid", error=type(error).__name__) from None
        return Known(self._caller(claims), until)

    def _key(self, header: Mapping[str, Any]) -> Key:
        if len(self._keys) == 1 and "kid" not in header:
            return next(iter(self._keys.values()))
        key = self._keys.get(header.get("kid") if self._settings.is_set else "")
        if key is None:
            raise Refused("the token is signed with a key that is not known")
        return key

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        settings = self._settings
        name = "".join(filter(str.isprintable, str(claims.get("sub", ""))))[:_NAME_LENGTH]
        tenant = settings.tenant or self._tenant(claims.get(settings.tenant_claim))
        role = settings.role or self._role(claims.get(settings.role_claim))
        if not is_tenant(tenant):
            raise Refused("the token names no tenant", subject=name)
        if role is None:
            raise Refused("the token names no role", subject=name)
        return Caller(tenant, role, name)

    def _tenant(self, claimed: object) -> str:
        if not isinstance(claimed, str):
            return ""
        return self._settings.tenants.get(claimed, "") if self._settings.tenants else claimed

    def _role(self, claimed: object) -> Role | None:
        """The highest of the roles that a claim names: a text, or a list of them."""
        values = claimed if isinstance(claimed, list) else [claimed]
        roles = self._settings.roles or {role.value: role for role in Role}
        named = {roles.get(value) for value in values if isinstance(value, str)}
        return next((role for role in _ROLES if role in named), None)


def _keys(settings: JwtSettings) -> dict[str | None, Key]:
    """The keys by their ids; the one of a PEM file by none."""
    try:
        import jwt  # noqa: PLC0415
    except ImportError:
        raise UnusableKeys("[jwt]: PyJWT is not installed; pip install 'runlane[jwt]'") from None
    try:
        text = settings.keys.read_text()
        found = _of_set(text) if settings.is_set else {"": _of_pem(text)}
    except OSError as error:
        raise UnusableKeys(f"{settings.keys}: {error.strerror}") from None
    except (ValueError, TypeError, LookupError, AttributeError, jwt.PyJWTError) as error:
        raise UnusableKeys(f"{settings.keys}: {str(error) or type(error).__name__}") from None
    keys = {
        name: Key(key.material, allowed)
        for name, key in found.items()
        if (allowed := [each for each in key.algorithms if each in settings.algorithms])
    }
    if not keys:
        raise UnusableKeys(f"{settings.keys}: has no key for {', '.join(settings.algorithms)}")
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
    """The keys of a JSON Web Key Set (RFC 7517) that are for signatures. Others may be in it."""
    import jwt  # noqa: PLC0415

    keys: dict[str | None, Key] = {}
    for data in json.loads(text)["keys"]:
        kind = data.get("kty"), data.get("crv")
        fitting = _RSA if kind[0] == "RSA" else _BY_KIND.get(kind, ())
        allowed = [each for each in fitting if data.get("alg", each) == each]
        if allowed and data.get("use", "sig") == "sig":
            keys[data.get("kid", "")] = Key(jwt.PyJWK(data, allowed[0]).key, allowed)
    return keys
