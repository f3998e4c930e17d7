"""The allowed destinations of deliveries."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from structlog.testing import capture_logs

from runlane_server.webhooks.destination import HOST_REFUSED, Destinations, Refused, Target

GLOBAL_ONLY = Destinations()

NOT_GLOBAL = [
    *("127.0.0.1", "127.255.255.254", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
    *("0.0.0.0", "100.64.0.1", "192.0.0.1", "198.18.0.1", "203.0.113.1", "224.0.0.1"),  # noqa: S104
    *("239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1"),
    # Forms of IPv6 that hold an IPv4 address: mapped, compatible, NAT64, 6to4, Teredo.
    *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1"),
    *("2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1", "3fff::1", "100::1", "5f00::1"),
]


@pytest.mark.parametrize("address", NOT_GLOBAL)
def test_r55_an_address_that_is_not_global_is_refused(address: str) -> None:
    with pytest.raises(Refused):
        GLOBAL_ONLY.check(address, is_https=True)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00::1"])
def test_a_global_address_is_allowed_over_https_only(address: str) -> None:
    GLOBAL_ONLY.check(address, is_https=True)
    with pytest.raises(Refused, match="http"):
        GLOBAL_ONLY.check(address, is_https=False)


def test_an_allowed_network_is_allowed_over_http_too() -> None:
    some = Destinations([ip_network("10.0.0.0/8"), ip_network("fd00::/8")])
    some.check("10.1.2.3", is_https=False)
    some.check("fd00::1", is_https=False)
    for address in ("127.0.0.1", "::ffff:10.1.2.3", "fe80::1"):
        with pytest.raises(Refused):
            some.check(address, is_https=True)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://example.org/", "http"),
        ("file:///etc/passwd", "http"),
        ("https://", "http"),
        ("https:///x", "host"),
        ("https://user:secret@example.org/", "user"),
        ("https://example.org/#part", "fragment"),
        ("https://example.org/\r\nX-Header: 1", "printable"),
        ("https://example.org/a b", "printable"),
        ("https://exämple.org/", "printable"),
        ("https://example.org:0/", "port"),
        ("https://example.org:99999/", "port"),
        ("https://exam%0aple.org/", "host"),
        ("https://[::1/", "host"),
        ("https://example.org/" + "x" * 2048, "2048"),
    ],
)
def test_a_malformed_url_is_refused(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Target.parse(url)


def test_a_url_is_taken_apart() -> None:
    target = Target.parse("https://Example.org:8443/a/b?c=d&e")
    assert target == Target(True, "example.org", 8443, "/a/b?c=d&e", "Example.org:8443")
    assert Target.parse("http://[2606:4700::1]").path == "/"


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1/", "https://[::1]/", "http://example.org/", "http://8.8.8.8/"]
)
def test_a_literal_address_is_checked_before_anything_is_sent(url: str) -> None:
    with pytest.raises(Refused):
        GLOBAL_ONLY.check_literal(Target.parse(url))


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "addresses", [(), ("10.1.2.3",), ("fd00::1",), ("8.8.8.8", "10.1.2.3"), ("169.254.169.254",)]
)
@pytest.mark.parametrize("host", ["db.internal", "2130706433", "127.1"])
def test_r55_a_refusal_does_not_show_what_a_name_resolves_to(
    scheme: str, addresses: tuple[str, ...], host: str
) -> None:
    with capture_logs() as logs, pytest.raises(Refused) as raised:
        GLOBAL_ONLY.check_found(Target.parse(f"{scheme}://{host}/"), addresses)
    assert str(raised.value) == HOST_REFUSED
    assert [it["host"] for it in logs] == [host]
    assert not addresses or addresses[-1] in logs[0]["reason"] or scheme == "http"


def test_r55_a_name_that_resolves_to_a_global_address_over_http_is_refused_alike() -> None:
    with pytest.raises(Refused, match=HOST_REFUSED):
        GLOBAL_ONLY.check_found(Target.parse("http://example.org/"), ["8.8.8.8"])


def test_a_refusal_of_a_literal_address_names_it() -> None:
    with pytest.raises(Refused, match=r"10\.1\.2\.3 is not a global one"):
        GLOBAL_ONLY.check_found(Target.parse("https://10.1.2.3/"), ["10.1.2.3"])


def test_a_name_whose_addresses_are_all_allowed_is_not_refused() -> None:
    GLOBAL_ONLY.check_found(Target.parse("https://example.org/"), ["8.8.8.8", "2a00::1"])
