"""One address cannot take all connections of a server."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from runlane_server.rpc.connection_shares import SECONDS as SHARE_SECONDS
from runlane_server.rpc.connection_shares import host
from support import server as processes
from support.descriptors import no_descriptors
from support.raw_http2 import RawConnection, raw_connection
from support.rpc_wire import Wire, serving
from support.staging import SECONDS

OTHER = "127.0.0.2"
"""Another address of this machine, from which one can connect to 127.0.0.1."""


@asynccontextmanager
async def sharing(share: int, listen: str = "127.0.0.1:0") -> AsyncIterator[Wire]:
    async with serving(max_per_address=share, listen=listen) as wire, asyncio.timeout(SECONDS):
        yield wire


def look(wire: Wire) -> Mapping[str, int]:
    """Looks at the connections as the server does every second; returns how many it closed."""
    return wire.endpoint.shares.close_excess(ports_of(wire))


def ports_of(wire: Wire) -> set[int]:
    port = wire.address.rpartition(":")[2]
    return {int(port)} if port.isdecimal() else set()


async def is_served(connection: RawConnection) -> bool:
    try:
        await connection.until_ended(connection.open("/x"))
    except ConnectionError:
        return False
    return True


async def until_closed(connection: RawConnection) -> None:
    while not connection.closed:
        await connection.changed()


async def test_the_newest_connections_above_the_share_are_closed() -> None:
    async with sharing(3) as wire, AsyncExitStack() as opened:
        connect = opened.enter_async_context
        # The order of descriptors says nothing: new connections get the lower ones here.
        low = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
        old = [await connect(raw_connection(wire.address)) for _ in range(3)]
        assert [await is_served(each) for each in old] == [True] * 3
        assert not look(wire)
        for descriptor in low:
            os.close(descriptor)
        new = [await connect(raw_connection(wire.address)) for _ in range(5)]
        other = await connect(raw_connection(wire.address, source=OTHER))
        assert [await is_served(each) for each in (*new, other)] == [True] * 6
        assert look(wire) == {"127.0.0.1": 5}
        for each in new:
            await until_closed(each)
        assert [await is_served(each) for each in (*old, other)] == [True] * 4
        assert not look(wire)


async def test_a_share_is_for_each_address() -> None:
    async with sharing(2) as wire, AsyncExitStack() as opened:
        connections = [
            await opened.enter_async_context(raw_connection(wire.address, source=f"127.0.0.{n}"))
            for n in range(2, 12)
        ]
        assert [await is_served(each) for each in connections] == [True] * 10
        assert not look(wire)
        assert [await is_served(each) for each in connections] == [True] * 10


async def test_connections_of_a_unix_socket_are_not_counted(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's'}"
    async with sharing(1, address) as wire, AsyncExitStack() as opened:
        connections = [
            await opened.enter_async_context(raw_connection(wire.address)) for _ in range(5)
        ]
        assert [await is_served(each) for each in connections] == [True] * 5
        assert not look(wire)
        assert [await is_served(each) for each in connections] == [True] * 5


async def test_shares_are_kept_after_descriptors_ran_out() -> None:
    async with sharing(2) as wire, AsyncExitStack() as opened:
        connect = opened.enter_async_context
        connections = [await connect(raw_connection(wire.address)) for _ in range(3)]
        assert [await is_served(each) for each in connections] == [True] * 3
        with no_descriptors():
            assert await wire.endpoint.shares.look(ports_of(wire)) == SHARE_SECONDS
        assert look(wire) == {"127.0.0.1": 1}


@pytest.mark.sqlite("it is about what is in front of the store")
async def test_a_process_with_few_descriptors_serves_others_while_one_address_takes_all(
    tmp_path: Path,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))  # the server inherits it
    async with AsyncExitStack() as opened:
        try:
            server = await opened.enter_async_context(processes.serving(tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        async with asyncio.timeout(SECONDS):
            taken = [
                await opened.enter_async_context(raw_connection(server.address)) for _ in range(200)
            ]
            while sum(not each.closed for each in taken) > 75:
                await asyncio.sleep(0.05)
            other = await opened.enter_async_context(raw_connection(server.address, source=OTHER))
            assert await is_served(other)
        await server.logs('"address": "127.0.0.1"')
        await server.logs('"limit": 75')


@pytest.mark.parametrize(
    ("address", "counts_as"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_an_ipv6_address_counts_as_its_network(address: str, counts_as: str) -> None:
    assert host(address) == counts_as
