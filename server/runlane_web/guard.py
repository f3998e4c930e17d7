"""Checks of a request before and while its body is read: host, origin, token, size."""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from google.rpc import code_pb2  # type: ignore[import-untyped]
from starlette.requests import ClientDisconnect, Request

from runlane_web.errors import Refused, invalid, shown
from runlane_web.grants import PREFIX

MAX_OF_STRANGER = 8 << 10
"""Maximum size in bytes of a body that is read before the server has accepted the caller."""

MAX_BODIES = 64 << 20
"""Maximum size in bytes of all bodies that are being read."""

BODY_TIMEOUT = 30.0
"""Seconds within which a body must have arrived."""

_DIGITS = 18
"""Maximum number of digits of a declared size."""

_JSON_TYPES = frozenset({"application/json", "application/a2a+json"})
"""A page needs leave to send either."""

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True, slots=True)
class Policy:
    """The requests that a gateway admits.

    Attributes:
        hosts: The names under which the gateway is reached, without port. A page of another name
            that resolves to this address (DNS rebinding) is refused.
        origins: Origins of web pages on other hosts that may call, such as
            `https://app.example.com`.
        token: The token that callers must send; empty: the server checks the caller's own.
    """

    hosts: frozenset[str] = _LOCAL_NAMES
    origins: frozenset[str] = frozenset()
    token: str = ""

    def check_host(self, host: str) -> None:
        """Checks the header Host. Raises Refused."""
        name = _netloc(f"//{host}").rpartition("@")[2]
        name = name.rsplit(":", 1)[0] if not name.endswith("]") else name
        if name.lower() not in self.hosts:
            raise Refused(
                code_pb2.PERMISSION_DENIED,
                "HOST_NOT_ALLOWED",
                f"Host: {shown(host, 100)} is not served here; "
                "the option --allowed-host adds a name",
                field="Host",
                http=421,
            )

    def check_origin(self, origin: str | None, host: str) -> str | None:
        """Checks the header Origin; returns it if it is another site's. Raises Refused."""
        if origin is None:
            return None
        if _netloc(origin) == host and origin.startswith(("http://", "https://")):
            return None
        if origin in self.origins:
            return origin
        raise Refused(
            code_pb2.PERMISSION_DENIED,
            "ORIGIN_NOT_ALLOWED",
            f"Origin: {shown(origin, 100)} may not call; the option --allowed-origin adds one",
            field="Origin",
        )

    def bearer(self, authorization: str | None, *, grants: bool = True) -> str:
        """Returns the caller's token. Raises Refused.

        Args:
            authorization: The header.
            grants: False where the token of a grant is not enough.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token or not _is_token(token):
            raise _unauthenticated("Authorization: must be `Bearer TOKEN`")
        if token.startswith(PREFIX):
            if not grants:
                raise _unauthenticated("Authorization: needs a token of the server")
        elif self.token and not hmac.compare_digest(token.encode(), self.token.encode()):
            raise _unauthenticated("Authorization: the token is not the one of this gateway")
        return token


def _is_token(token: str) -> bool:
    return len(token) <= 8192 and all("!" <= char <= "~" for char in token)


def _unauthenticated(message: str) -> Refused:
    return Refused(code_pb2.UNAUTHENTICATED, "UNAUTHENTICATED", message, field="Authorization")


def _netloc(url: str) -> str:
    """Host and port in an address; empty if it is none."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""


def host_names(listen_host: str, more: Iterable[str]) -> frozenset[str]:
    """The names under which a gateway that listens on an address is reached."""
    own = {listen_host} if listen_host not in ("", "0.0.0.0", "::") else set()  # noqa: S104
    return _LOCAL_NAMES | {name.lower() for name in (*own, *more)}


def declared_size(request: Request, limit: int) -> int | None:
    """The size of a body in bytes as declared; None if it is not. Raises Refused."""
    if "transfer-encoding" in request.headers:
        return None
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit():
        raise invalid("Content-Length", "must be a number")
    if len(declared) > _DIGITS or int(declared) > limit:
        raise _too_large(limit)
    return int(declared)


class Bodies:
    """Reads bodies, within limits of size and time.

    Args:
        limit: Maximum size in bytes of all bodies that are being read; a quarter of one caller.
    """

    def __init__(self, limit: int = MAX_BODIES) -> None:
        self._free = limit
        self._share = limit // 4
        self._of: Counter[str] = Counter()

    async def read(self, request: Request, caller: str, limit: int) -> bytes:
        """Reads the body of a request, of at most `limit` bytes. Raises Refused."""
        declared_size(request, limit)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                async for chunk in request.stream():
                    if len(chunk) > min(self._free, self._share - self._of[caller]):
                        raise _busy()
                    self._free -= len(chunk)
                    self._of[caller] += len(chunk)
                    size += len(chunk)
                    chunks.append(chunk)
                    if size > limit:
                        raise _too_large(limit)
        except TimeoutError:
            raise _too_slow() from None
        except ClientDisconnect:
            raise invalid("body", "ended before its declared length") from None
        finally:
            self._free += size
            self._of[caller] -= size
            if not self._of[caller]:
                del self._of[caller]
        if size:
            _check_type(request.headers.get("content-type", ""))
        return b"".join(chunks)


def _check_type(content_type: str) -> None:
    """A form of another site can send text, but no JSON, without asking first."""
    if content_type.partition(";")[0].strip().lower() not in _JSON_TYPES:
        raise Refused(
            code_pb2.INVALID_ARGUMENT,
            "INVALID_ARGUMENT",
            "Content-Type: must be application/json",
            field="Content-Type",
            http=415,
        )


def _too_large(limit: int) -> Refused:
    message = f"body: is larger than {limit} bytes"
    return Refused(code_pb2.INVALID_ARGUMENT, "INVALID_ARGUMENT", message, field="body", http=413)


def _too_slow() -> Refused:
    message = f"body: did not arrive within {BODY_TIMEOUT:g} s"
    return Refused(code_pb2.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", message, field="body", http=408)


def _busy() -> Refused:
    return Refused(
        code_pb2.RESOURCE_EXHAUSTED,
        "OVERLOADED",
        "too many bodies are being read; retry later",
        headers={"Retry-After": "1"},
    )
