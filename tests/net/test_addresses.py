"""Where the other nodes are told to reach this one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from runlane_server.core.errors import StartError
from runlane_server.net.addresses import of_process, own_listen, reached_at


@pytest.mark.parametrize(
    ("bound", "given", "reached"),
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
def test_the_address_that_is_given_goes_before_the_one_that_is_bound(
    bound: str, given: str | None, reached: str
) -> None:
    assert reached_at(bound, given) == reached


def test_a_socket_in_the_file_system_is_named_from_its_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reached_at("unix:x", None) == f"unix:{tmp_path}/x"


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "[::]", "[0:0::0]"])  # noqa: S104
def test_a_wildcard_is_no_address_for_others(wildcard: str) -> None:
    with socket.create_server(("", 0)) as listening:
        port = listening.getsockname()[1]
        host, _, told = reached_at(f"{wildcard}:{port}", None).rpartition(":")
        assert host not in {"", wildcard}
        assert int(told) == port
        socket.create_connection((host.strip("[]"), port)).close()


def test_port_0_needs_one_that_is_bound() -> None:
    with pytest.raises(StartError, match="has no port"):
        reached_at("unix:/run/x", "10.0.0.7:0")


@pytest.mark.parametrize(
    ("given", "number", "own", "listen"),
    [
        (None, 2, None, "0.0.0.0:0"),
        ("h:0", 2, "h:0", "0.0.0.0:0"),
        ("h:7000", 1, "h:7000", "0.0.0.0:7000"),
        ("h:7000", 3, "h:7002", "0.0.0.0:7002"),
    ],
)
def test_processes_have_a_port_each(
    given: str | None, number: int, own: str | None, listen: str
) -> None:
    assert of_process(given, number) == own
    assert own_listen("0.0.0.0:50051", own) == listen


def test_ports_may_run_out() -> None:
    assert of_process("h:65535", 1) == "h:65535"
    with pytest.raises(StartError, match="process 2"):
        of_process("h:65535", 2)
