"""A port is shared by the processes of one server, and by no other server."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from threading import Barrier

import pytest

from runlane_server.core.errors import StartError
from runlane_server.net.addresses import Address
from runlane_server.process.shared_port import reserved_port

ANY = Address("127.0.0.1")
IN_USE = "address already in use"


def listening(address: Address, *, sharing: bool) -> socket.socket:
    """A listening socket, as gRPC opens it."""
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(sharing))
        made.bind((address.host, address.port))
        made.listen()
    except OSError:
        made.close()
        raise
    return made


def reserve(address: Address) -> Address:
    """Reserves a port for an instant."""
    with reserved_port(address) as reserved:
        return reserved


def test_processes_share_a_reserved_port_and_other_servers_cannot_bind_it() -> None:
    with reserved_port(ANY) as address:
        assert address.port
        with pytest.raises(OSError, match="already in use"):
            listening(address, sharing=False)
        with listening(address, sharing=True), listening(address, sharing=True):
            with pytest.raises(OSError, match="already in use"):
                listening(address, sharing=False)
            with pytest.raises(StartError, match=IN_USE):
                reserve(address)
        # The same while no process listens.
        with pytest.raises(StartError, match=IN_USE):
            reserve(address)
    with listening(address, sharing=False):
        pass


@pytest.mark.parametrize("sharing", [False, True])
def test_a_port_that_another_server_listens_on_is_not_reserved(sharing: bool) -> None:
    with listening(ANY, sharing=sharing) as other:
        taken = ANY.with_port(other.getsockname()[1])
        with pytest.raises(StartError, match=f"cannot listen on {taken}: {IN_USE}"):
            reserve(taken)


@pytest.mark.parametrize("sharing", [False, True])
def test_lingering_connections_of_a_previous_server_do_not_matter(sharing: bool) -> None:
    with listening(ANY, sharing=sharing) as other:
        port = other.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1", port))) as client:
            other.accept()[0].close()
            assert client.recv(1) == b""
    with reserved_port(ANY.with_port(port)) as address, listening(address, sharing=True):
        pass


def test_one_of_two_simultaneous_reservations_succeeds() -> None:
    free = reserve(ANY)
    both, done = Barrier(2), Barrier(2)

    def take(address: Address) -> bool:
        with ExitStack() as reservations:
            both.wait()
            try:
                reservations.enter_context(reserved_port(address))
            except StartError:
                return False
            else:
                return True
            finally:
                done.wait()

    with ThreadPoolExecutor(2) as pool:
        for _ in range(100):
            assert sorted(pool.map(take, [free, free])) == [False, True]


def test_localhost_gets_one_port_for_all_its_addresses() -> None:
    with reserved_port(Address("localhost")) as address, listening(address, sharing=True):
        assert address.host == "localhost"


@pytest.mark.parametrize("text", ["203.0.113.1:0", "no.such.host.invalid:0", "unix:/run/x"])
def test_an_address_of_another_host_is_an_error(text: str) -> None:
    with pytest.raises(StartError, match=f"cannot listen on {text}"):
        reserve(Address.parse(text))
