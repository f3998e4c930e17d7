"""A stranger cannot fill the memory of gRPC with frames that belong to no call."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections import Counter
from collections.abc import Collection

import pytest

from proofs.fuzz.frames import PRIORITY, frame
from runlane_server.access.caller import Caller, Credentials, Role
from runlane_server.access.control import AccessControl
from runlane_server.rpc.floods import FLOOD_BYTES, PAUSE, SECONDS, SUSPECT_SECONDS, Floods
from support.descriptors import no_descriptors
from support.raw_http2 import RawConnection, raw_connection
from support.rpc_wire import Wire, serving
from support.staging import SECONDS as TEST_SECONDS

FLOOD = frame(PRIORITY, bytes(4) + b"\x01", stream=3) * 1000

GET_RUN = "/runlane.v1.RunService/GetRun"

RUN_ACCEPTED = "/runlane.v1.RunService/RunAccepted"


async def flood(connection: RawConnection) -> None:
    """Sends more than a connection may without a call."""
    sent = 0
    while sent <= FLOOD_BYTES:
        await connection.write(FLOOD)
        sent += len(FLOOD)
    await connection.until_received()


async def look(wire: Wire, access: AccessControl) -> float:
    """Looks at the connections as the server does; returns when it looks again."""
    ports = {int(wire.address.rpartition(":")[2])}
    return await wire.endpoint.floods.look(ports, access.take_calling_ports())


async def flood_until_seen(connection: RawConnection, wire: Wire, access: AccessControl) -> float:
    """Returns when the server looks again."""
    while (pause := await look(wire, access)) == SECONDS:
        await flood(connection)  # the kernel may not have had all that was sent before
    return pause


async def test_a_flood_without_a_call_ends_its_connection_only() -> None:
    access = AccessControl()
    async with (
        serving(access=access) as wire,
        asyncio.timeout(TEST_SECONDS),
        raw_connection(wire.address) as quiet,
        raw_connection(wire.address) as flooding,
    ):
        await quiet.until_ended(quiet.open("/x"))
        await flood_until_seen(flooding, wire, access)
        with no_descriptors():
            assert await look(wire, access) == SECONDS
        await flood_until_seen(flooding, wire, access)
        while not flooding.closed:
            await flooding.changed()
        # A caller that waits to send more would wait for a minute without the reset.
        while not flooding.is_reset:
            await asyncio.sleep(0.01)
        await quiet.until_ended(quiet.open("/x"))
        assert await look(wire, access) == SECONDS


async def test_a_caller_whose_calls_wait_to_be_admitted_keeps_its_connection() -> None:
    access = AccessControl()
    async with (
        serving(access=access) as wire,
        asyncio.timeout(TEST_SECONDS),
        raw_connection(wire.address) as waiting,
    ):
        await flood_until_seen(waiting, wire, access)
        # It waits for its answers, and the server is busy with others.
        for _ in range(3):
            assert await look(wire, access) == SECONDS
        await waiting.until_ended(waiting.open("/x"))
        # A call ends the suspicion.
        call = waiting.open(GET_RUN)
        while not access.take_calling_ports():
            await asyncio.sleep(0.01)
        assert await look(wire, access) == SECONDS
        await waiting.send(call, b"\0\0\0\0\0", end=True)
        await waiting.until_ended(call)
        access.take_calling_ports()
        assert await look(wire, access) == SECONDS
        await flood_until_seen(waiting, wire, access)
        await waiting.until_ended(waiting.open("/x"))


class Reader:
    """Authenticates every caller as one that may read."""

    def authenticate(self, credentials: Credentials) -> Caller:
        return Caller("acme", Role.READ, "reader")


async def test_a_known_caller_whose_calls_are_refused_keeps_its_connection() -> None:
    access = AccessControl(Reader())
    async with (
        serving(access=access) as wire,
        asyncio.timeout(TEST_SECONDS),
        raw_connection(wire.address) as refused,
    ):
        await flood_until_seen(refused, wire, access)
        for _ in range(2):
            await flood(refused)
            await refused.until_ended(refused.open(RUN_ACCEPTED))
            assert await look(wire, access) == SECONDS
        await refused.until_ended(refused.open(RUN_ACCEPTED))


async def test_a_caller_whose_calls_are_admitted_may_send_as_much() -> None:
    access = AccessControl()
    async with (
        serving(access=access) as wire,
        asyncio.timeout(TEST_SECONDS),
        raw_connection(wire.address) as calling,
    ):
        await flood(calling)
        call = calling.open(GET_RUN)  # its message does not come
        while not access.take_calling_ports():
            await asyncio.sleep(0.01)
        for _ in range(3):
            assert await look(wire, access) == SECONDS
        await calling.send(call, b"\0\0\0\0\0", end=True)
        await calling.until_ended(call)
        # What it sent meanwhile does not count after the end of its call.
        access.take_calling_ports()
        for _ in range(2):
            assert await look(wire, access) == SECONDS
        assert not calling.closed


async def make_call(connection: RawConnection) -> None:
    """Makes a call that is admitted, and sends more meanwhile than a connection may without."""
    call = connection.open(GET_RUN)
    await flood(connection)
    await connection.send(call, b"\0\0\0\0\0", end=True)
    await connection.until_ended(call)


async def test_a_look_without_a_descriptor_forgets_no_connection() -> None:
    access = AccessControl()
    async with (
        serving(access=access) as wire,
        asyncio.timeout(TEST_SECONDS),
        raw_connection(wire.address) as idle,
    ):
        await make_call(idle)
        for _ in range(2):
            assert await look(wire, access) == SECONDS
        with no_descriptors():
            assert await look(wire, access) == SECONDS
        for _ in range(2):
            assert await look(wire, access) == SECONDS
        await idle.until_ended(idle.open("/x"))


async def test_a_look_without_a_descriptor_forgets_no_call() -> None:
    access = AccessControl()
    async with (
        serving(access=access) as wire,
        asyncio.timeout(TEST_SECONDS),
        raw_connection(wire.address) as idle,
    ):
        await idle.until_ended(idle.open("/x"))
        assert await look(wire, access) == SECONDS
        await make_call(idle)
        with no_descriptors():
            assert await look(wire, access) == SECONDS
        for _ in range(2):
            assert await look(wire, access) == SECONDS
        await idle.until_ended(idle.open("/x"))


async def test_a_connection_that_could_not_be_read_is_looked_at_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_descriptor(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    access = AccessControl()
    async with (
        serving(access=access) as wire,
        asyncio.timeout(TEST_SECONDS),
        raw_connection(wire.address) as flooding,
    ):
        await flooding.until_ended(flooding.open("/x"))
        access.take_calling_ports()
        with monkeypatch.context() as patch:
            patch.setattr(os, "dup", no_descriptor)  # the last one went after the look began
            assert await look(wire, access) == SECONDS
        await flood_until_seen(flooding, wire, access)
        await flood_until_seen(flooding, wire, access)
        while not flooding.closed:
            await flooding.changed()


class SlowFloods(Floods):
    """Looks as with thousands of connections."""

    def close(self, ports: Collection[int], calling: Collection[int]) -> Counter[str]:
        end = time.thread_time() + 0.03
        while time.thread_time() < end:
            pass
        return super().close(ports, calling)


async def test_looks_take_a_tenth_of_a_core_at_most() -> None:
    access = AccessControl()
    async with (
        serving(access=access) as wire,
        asyncio.timeout(TEST_SECONDS),
        raw_connection(wire.address) as flooding,
    ):
        wire.endpoint.floods = SlowFloods()
        pause = await flood_until_seen(flooding, wire, access)
        assert SUSPECT_SECONDS < 0.03 * PAUSE <= pause < SECONDS
