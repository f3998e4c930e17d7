"""A port is shared by the processes of one server, and by nobody else."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from threading import Barrier

import pytest

from runlane_server.core.errors import StartError
from runlane_server.process.shared_port import held

IN_USE = "address already in use"


def listening(address: str, *, sharing: bool) -> socket.socket:
    """A server's socket, as gRPC makes it."""
    host, _, port = address.rpartition(":")
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(sharing))
        made.bind((host, int(port)))
        made.listen()
    except OSError:
        made.close()
        raise
    return made


def test_processes_share_it_and_others_do_not() -> None:
    with held("127.0.0.1:0") as address:
        assert not address.endswith(":0")
        with pytest.raises(OSError, match="already in use"):
            listening(address, sharing=False)
        with listening(address, sharing=True), listening(address, sharing=True):
            with pytest.raises(OSError, match="already in use"):
                listening(address, sharing=False)
            with pytest.raises(StartError, match=IN_USE), held(address):
                pass
        # Also while no process is there.
        with pytest.raises(StartError, match=IN_USE), held(address):
            pass
    with listening(address, sharing=False):
        pass


@pytest.mark.parametrize("sharing", [False, True])
def test_a_port_where_somebody_listens_is_not_taken(sharing: bool) -> None:
    with listening("127.0.0.1:0", sharing=sharing) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}: {IN_USE}"):
            held(f"127.0.0.1:{port}").__enter__()


@pytest.mark.parametrize("sharing", [False, True])
def test_connections_of_a_server_that_was_there_are_not_in_the_way(sharing: bool) -> None:
    with listening("127.0.0.1:0", sharing=sharing) as other:
        port = other.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1", port))) as client:
            other.accept()[0].close()
            assert client.recv(1) == b""
    with held(f"127.0.0.1:{port}") as address, listening(address, sharing=True):
        pass


def test_of_two_who_come_at_once_one_gets_it() -> None:
    with held("127.0.0.1:0") as free:
        pass
    both, done = Barrier(2), Barrier(2)

    def take(address: str) -> bool:
        with ExitStack() as holding:
            both.wait()
            try:
                holding.enter_context(held(address))
            except StartError:
                return False
            else:
                return True
            finally:
                done.wait()

    with ThreadPoolExecutor(2) as pool:
        for _ in range(100):
            assert sorted(pool.map(take, [free, free])) == [False, True]


def test_localhost_has_one_port() -> None:
    with held("localhost:0") as address, listening(address, sharing=True):
        assert address.startswith("localhost:")


@pytest.mark.parametrize("address", ["203.0.113.1:0", "no.such.host.invalid:0", "unix:/run/x"])
def test_an_address_that_is_not_here(address: str) -> None:
    with pytest.raises(StartError, match=f"cannot listen on {address}"):
        held(address).__enter__()
