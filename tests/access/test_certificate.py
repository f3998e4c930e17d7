"""Names in client certificates: typed, read from the certificate, and refused when they mislead."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

import pytest
from cryptography import x509
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from runlane_server.access.certificate import UNREADABLE, certificate_names
from support.certificates import Authority

AUTHORITY = Authority()
URI = x509.UniformResourceIdentifier
DNS = x509.DNSName
MISREAD = (UNREADABLE,)


def names(
    *common_names: str, sans: Sequence[x509.GeneralName] = (), text: _ASN1Type | None = None
) -> tuple[str, ...]:
    """The names in a certificate that is made for them."""
    subject = [
        x509.NameAttribute(NameOID.COMMON_NAME, name, text, _validate=False)
        for name in common_names
    ]
    return certificate_names(AUTHORITY.issue_for(x509.Name(subject), sans).certificate)


def test_a_name_has_the_type_that_it_has_in_the_certificate() -> None:
    job = "spiffe://acme/job"
    assert names("x", sans=[URI(job)]) == (f"uri={job}",)
    assert names("x", sans=[DNS(job)]) == (f"dns={job}",)
    assert names(job) == (f"cn={job}",)
    assert names("x", sans=[x509.RFC822Name(job)]) == ()
    assert names("x", sans=[URI(job), DNS("a.example")]) == (f"uri={job}", "dns=a.example")


@pytest.mark.parametrize(
    "san",
    [
        DNS("a.example"),
        x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
        x509.OtherName(x509.ObjectIdentifier("1.2.3"), b"\x04\x01a"),
        x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "me")])),
    ],
)
def test_a_common_name_counts_only_without_alternative_names_of_any_type(
    san: x509.GeneralName,
) -> None:
    assert names("me") == ("cn=me",)
    assert "cn=me" not in names("me", sans=[san])


def test_no_name_is_read_from_a_certificate_that_could_mislead() -> None:
    for bad in ("me\0.example", "me\n", "\x1bme", "m\u202ee", "m\u200be", "\u2066me"):
        assert names(bad) == MISREAD, bad
    for bad in ("me\0.example", "me\r\nx", "\x7f"):
        assert names("x", sans=[DNS(bad)]) == MISREAD, bad
        assert names("x", sans=[URI("spiffe://acme/job"), URI(bad)]) == MISREAD, bad
    assert names("me", "you") == MISREAD
    assert names("you", "me") == MISREAD
    assert names("me", text=_ASN1Type.BMPString) == MISREAD
    assert names("me", text=_ASN1Type.T61String) == MISREAD
    assert names("me", text=_ASN1Type.PrintableString) == ("cn=me",)
    assert names("Jörg") == ("cn=Jörg",)
    assert names() == ()


def test_bytes_that_are_no_certificate_have_no_name() -> None:
    for pem in (b"", b"\xff", b"-----BEGIN CERTIFICATE-----\n\n-----END CERTIFICATE-----\n"):
        assert certificate_names(pem) == MISREAD


DER = ssl.PEM_cert_to_DER_cert(
    AUTHORITY.issue("me", ["spiffe://acme/job", "a.example"]).certificate.decode()
)


@given(st.integers(0, len(DER) - 1), st.binary(min_size=0, max_size=3))
def test_a_damaged_certificate_raises_nothing(at: int, put: bytes) -> None:
    damaged = DER[:at] + put + DER[at + 1 :]
    for name in certificate_names(ssl.DER_cert_to_PEM_cert(damaged).encode()):
        assert name.isprintable()
