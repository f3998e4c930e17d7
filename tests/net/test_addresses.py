"""Addresses: how they are parsed, and which one other nodes get to know."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from runlane_server.core.errors import StartError
from runlane_server.net.addresses import Address, advertised_address


def at(text: str) -> Address:
    return Address.parse(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50051", Address("127.0.0.1", 50051)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:1", Address("::1", 1)),
        ("[fe80::1%eth0]:65535", Address("fe80::1%eth0", 65535)),
        ("unix:/run/x.sock", Address(path="/run/x.sock")),
        ("unix:x:1", Address(path="x:1")),
    ],
)
def test_an_address_is_parsed_and_printed_as_the_same_text(text: str, address: Address) -> None:
    assert at(text) == address
    assert str(address) == text
    assert address.is_unix is text.startswith("unix:")


@pytest.mark.parametrize(
    "text",
    [
        *("", ":1", "host", "host:", "host:65536", "host:-1", "::1:50051", "[]:1", "[host]:1"),
        *("unix:", "a..b:1", "a" * 64 + ":1", "\N{LATIN SMALL LETTER E WITH ACUTE}" * 254 + ":1"),
    ],
)
def test_a_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not of the form|does not name a host"):
        at(text)


def test_an_address_resolves_to_what_a_socket_binds() -> None:
    for text in ("127.0.0.1:0", "localhost:0"):
        for family, place in at(text).resolve():
            with socket.socket(family) as bound:
                bound.bind(place)
                assert bound.getsockname()[1] > 0
    assert at("unix:/run/x").resolve() == [(socket.AF_UNIX, "/run/x")]


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match="there is no port"):
        at("host:1").with_port(port)


@pytest.mark.parametrize(
    ("bound", "node_address", "advertised"),
    [
        ("127.0.0.1:7000", None, "127.0.0.1:7000"),
        ("[::1]:7000", None, "[::1]:7000"),
        ("db.example:7000", None, "db.example:7000"),
        ("0.0.0.0:7000", "10.0.0.7:9", "10.0.0.7:9"),
        ("0.0.0.0:7000", "10.0.0.7:0", "10.0.0.7:7000"),
        ("unix:/run/x", None, "unix:/run/x"),
        ("unix:/run/x", "10.0.0.7:9", "10.0.0.7:9"),
    ],
)
def test_the_node_address_overrides_the_bound_address(
    bound: str, node_address: str | None, advertised: str
) -> None:
    given = None if node_address is None else at(node_address)
    assert advertised_address(at(bound), given) == at(advertised)


def test_a_unix_socket_is_advertised_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert advertised_address(at("unix:x"), None) == at(f"unix:{tmp_path}/x")


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::", "0:0::0"])  # noqa: S104
def test_a_wildcard_host_is_advertised_as_an_address_that_can_be_connected_to(
    wildcard: str,
) -> None:
    with socket.create_server(("", 0)) as listening:
        port = listening.getsockname()[1]
        advertised = advertised_address(Address(wildcard, port), None)
        assert advertised.host not in {"", wildcard}
        assert advertised.port == port
        socket.create_connection((advertised.host, port)).close()


def test_port_0_of_a_node_address_needs_a_bound_port() -> None:
    with pytest.raises(StartError, match="has no port"):
        advertised_address(at("unix:/run/x"), at("10.0.0.7:0"))
