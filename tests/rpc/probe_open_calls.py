"""Probes of access control: open calls whose caller loses access."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc import StatusCode

from rpc.probe_base import RUNS, SESSIONS, ProbeTimeout, assert_unauthenticated
from runlane.v1 import run_service_pb2 as runs_pb
from runlane.v1 import session_service_pb2 as sessions_pb
from runlane_server.access import control as control_module
from support.callers import (
    LIFETIME,
    Outcome,
    World,
    guarded,
    outcome,
    request,
)

LONG_LIVED: Mapping[str, Any] = {
    RUNS + "SubscribeRunComplete": runs_pb.SubscribeRunCompleteRequest(),
    RUNS + "SubscribeRun": runs_pb.SubscribeRunRequest(run_id="r-theirs"),
    SESSIONS + "SubscribeSession": sessions_pb.SubscribeSessionRequest(session_ids=["s-theirs"]),
    RUNS + "WaitRun": runs_pb.WaitRunRequest(run_id="r-theirs"),
}


@asynccontextmanager
async def followed(world: World, who: str) -> AsyncIterator[list[Any]]:
    """Opens every kind of long-lived call, and waits until each is served."""
    calls = [world.open(method, asked, world.shown(who)) for method, asked in LONG_LIVED.items()]
    async with asyncio.timeout(ProbeTimeout.seconds):
        while {open_call.method for open_call in _open_calls(world, who)} != set(LONG_LIVED):
            await asyncio.sleep(0)
    yield calls
    for call in calls:
        call.cancel()


def _open_calls(world: World, who: str) -> list[control_module.OpenCall]:
    shown = world.shown(who)[0][1]
    return [
        open_call
        for open_call in world.access_control._open_calls
        if open_call.credentials.metadata.get("authorization") == shown
    ]


async def _end(call: Any) -> Outcome:
    """Waits for the end of a long-lived call."""
    try:
        if hasattr(call, "read"):
            while (message := await call.read()) is not grpc.aio.EOF:
                assert message is not None
            return Outcome(StatusCode.OK)
        return Outcome(StatusCode.OK, answer=await call)
    except grpc.aio.AioRpcError as error:
        return outcome(error)


async def _all_end(world: World, who: str, calls: list[Any]) -> None:
    """Asserts that all calls of a caller end as unauthenticated."""
    assert all(open_call.revocation for open_call in _open_calls(world, who))
    async with asyncio.timeout(ProbeTimeout.seconds):
        for call in calls:
            found = await _end(call)
            assert found.code is StatusCode.UNAUTHENTICATED, found
            assert found.reason == "UNAUTHENTICATED"


async def revoked(folder: Path) -> None:
    """Calls end when their token is revoked; calls of others go on."""
    async with (
        guarded(folder) as world,
        followed(world, "read") as calls,
        followed(world, "admin") as others,
    ):
        world.revoke("read")
        world.look()
        assert not [open_call for open_call in _open_calls(world, "admin") if open_call.revocation]
        await _all_end(world, "read", calls)
        assert len(_open_calls(world, "admin")) == len(others)
        world.wire.latches.open("g")
        assert (await _end(others[-1])).answer.run.run_id == "r-theirs"


async def expires_meanwhile(folder: Path) -> None:
    """Calls end when their token expires, and not before."""
    for who, after in (("expiring", LIFETIME), ("jwt", 3600)):
        async with guarded(folder) as world, followed(world, who) as calls:
            world.clock[0] += after - 2
            world.look()
            assert not any(open_call.revocation for open_call in _open_calls(world, who))
            world.clock[0] += 4
            world.look()
            await _all_end(world, who, calls)


async def moved(folder: Path) -> None:
    """Calls end when their token moves to another tenant."""
    async with guarded(folder) as world, followed(world, "expiring") as calls:
        entry = 'name = "expiring"\ntenant = '
        world.rewrite((entry + '"acme"', entry + '"other"'))
        world.look()
        await _all_end(world, "expiring", calls)


async def slow_reader(folder: Path) -> None:
    """A call that is revoked during a write ends with the error after it."""
    async with guarded(folder) as world:
        method = RUNS + "SubscribeRun"
        call = world.open(method, request(method), world.shown("read"))
        async with asyncio.timeout(ProbeTimeout.seconds):
            while not any(open_call.is_sending for open_call in _open_calls(world, "read")):
                await asyncio.sleep(0)
        world.revoke("read")
        world.look()
        await _all_end(world, "read", [call])


async def broken_file(folder: Path) -> None:
    """An invalid access file changes nothing."""
    async with guarded(folder) as world, followed(world, "read") as calls:
        text = world.path.read_text()
        for broken in (text + "\n[[token]]", "nonsense", ""):
            world.path.write_text(broken)
            world.look()
            if broken:
                assert len(_open_calls(world, "read")) == len(calls)
                method = RUNS + "GetRun"
                found = await world.ask(method, request(method), world.shown("read"))
                assert found.code is StatusCode.OK
                assert_unauthenticated(await world.ask(method, request(method)))
        await _all_end(world, "read", calls)  # an empty file is valid and has no callers
