"""The names in a client certificate, each with its type, read from the certificate itself.

gRPC reports names without their type, so that a DNS name could pass for a URI, and cuts them at a
zero byte, so that `alice\\0.example` would pass for `alice`. TLS has verified the certificate; this
module only reads it (RFC 5280), and refuses what it does not understand.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

UNREADABLE = "unreadable"
"""Stands for the names of a certificate that is refused. It has no type, so no entry matches it."""

SUBJECT_FORM = (
    "a name with its type, such as uri=spiffe://acme/job, dns=job.acme.example or cn=job, without "
    "spaces and unprintable characters"
)

_SUBJECT = re.compile(r"(?:uri|dns|cn)=\S+")
_UNTYPED = re.compile(r"[^\s=]+")

_SEQUENCE, _VERSION, _EXTENSIONS, _OCTETS = 0x30, 0xA0, 0xA3, 0x04
_COMMON_NAME, _ALTERNATIVE_NAMES = bytes.fromhex("0603550403"), bytes.fromhex("0603551d11")
_SAN_TYPES = {0x82: "dns", 0x86: "uri"}
_TEXTS = {0x0C: "utf-8", 0x13: "ascii", 0x16: "ascii"}
"""The string types of a common name, with their encodings. Others are obsolete and ambiguous."""


class _Bad(ValueError):
    """The certificate is malformed, ambiguous, or has a name that could mislead."""


class _Item(NamedTuple):
    """An element of DER: its tag, its content, and both with the length in between."""

    tag: int
    content: bytes
    whole: bytes


def is_subject(text: str) -> bool:
    """Whether the text is a valid name, with or without a type (`SUBJECT_FORM`)."""
    is_form = _SUBJECT.fullmatch(text) or _UNTYPED.fullmatch(text)
    return text.isprintable() and is_form is not None


def typed_subject(text: str) -> str:
    """Adds the type to a name without one, which files of former versions have."""
    if _SUBJECT.fullmatch(text):
        return text
    if "://" in text:
        return f"uri={text}"
    return f"dns={text}" if "." in text and "@" not in text else f"cn={text}"


@lru_cache(maxsize=1024)
def certificate_names(pem: bytes) -> tuple[str, ...]:
    """Returns the URIs and DNS names of a certificate, or else its only common name, with types.

    The common name counts only without alternative names of any type (RFC 6125). The result is
    `UNREADABLE` if a name contains an unprintable character, or the certificate cannot be read.
    """
    try:
        der = ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))
        names = tuple(_names(der))
    except (ValueError, IndexError):
        return (UNREADABLE,)
    return names if all(map(str.isprintable, names)) else (UNREADABLE,)


def _names(der: bytes) -> Iterator[str]:
    """Yields the typed names of a certificate."""
    (certificate,) = _items(der)
    # tbsCertificate: [version], serial, algorithm, issuer, validity, subject, key, ..., extensions
    fields = [
        item for item in _items(_items(certificate.content)[0].content) if item.tag != _VERSION
    ]
    alternatives = list(_alternative_names(fields[6:]))
    if len(alternatives) > 1:
        raise _Bad
    if not alternatives:
        yield from _common_names(fields[4])
        return
    (names,) = _items(alternatives[0])
    for name in _items(names.content):
        if name.tag in _SAN_TYPES:
            yield f"{_SAN_TYPES[name.tag]}={name.content.decode('ascii')}"


def _alternative_names(fields: list[_Item]) -> Iterator[bytes]:
    """Yields the value of each extension subjectAltName."""
    for field in fields:
        if field.tag != _EXTENSIONS:
            continue
        (extensions,) = _items(field.content)
        for extension in _items(extensions.content):
            kind, *_, value = _items(extension.content)
            if kind.whole == _ALTERNATIVE_NAMES:
                if value.tag != _OCTETS:
                    raise _Bad
                yield value.content


def _common_names(subject: _Item) -> Iterator[str]:
    found = [
        value
        for attributes in _items(subject.content)
        for attribute in _items(attributes.content)
        for kind, value in (_items(attribute.content),)
        if kind.whole == _COMMON_NAME
    ]
    if len(found) > 1:
        # Programs disagree about which one counts.
        raise _Bad
    for value in found:
        if value.tag not in _TEXTS:
            raise _Bad
        yield f"cn={value.content.decode(_TEXTS[value.tag])}"


def _items(der: bytes) -> list[_Item]:
    """Returns the elements in a piece of DER. Raises _Bad, IndexError."""
    found = []
    at = 0
    while at < len(der):
        start, tag, length = at, der[at], der[at + 1]
        at += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(der[at : at + size], "big")
            if not 1 <= size <= 4 or length < 0x80:
                raise _Bad
            at += size
        if tag & 0x1F == 0x1F or at + length > len(der):
            raise _Bad
        found.append(_Item(tag, der[at : at + length], der[start : at + length]))
        at += length
    return found
