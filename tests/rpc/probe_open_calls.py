"""Probes of the access_control: calls that last, and whose caller may not stay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc import StatusCode

from rpc.probe_base import RUNS, Patience, refused_as_unknown
from runlane.v1 import run_service_pb2 as runs_pb
from runlane_server.access import control as control_module
from support.callers import (
    LIFETIME,
    Outcome,
    World,
    guarded,
    outcome,
    request,
)

LASTING: Mapping[str, Any] = {
    RUNS + "SubscribeRunComplete": runs_pb.SubscribeRunCompleteRequest(),
    RUNS + "SubscribeRun": runs_pb.SubscribeRunRequest(run_id="r-theirs"),
    RUNS + "WaitRun": runs_pb.WaitRunRequest(run_id="r-theirs"),
}


@asynccontextmanager
async def followed(world: World, who: str) -> AsyncIterator[list[Any]]:
    """Calls that last, by a caller; each is being served."""
    calls = [world.open(method, asked, world.shown(who)) for method, asked in LASTING.items()]
    async with asyncio.timeout(Patience.seconds):
        while {open_call.method for open_call in _open_calls(world, who)} != set(LASTING):
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
    """How a call that lasts ends."""
    try:
        if hasattr(call, "read"):
            while (message := await call.read()) is not grpc.aio.EOF:
                assert message is not None
            return Outcome(StatusCode.OK)
        return Outcome(StatusCode.OK, answer=await call)
    except grpc.aio.AioRpcError as error:
        return outcome(error)


async def _all_end(world: World, who: str, calls: list[Any]) -> None:
    """All calls of that caller end, because he may not go on."""
    assert all(open_call.revocation for open_call in _open_calls(world, who))
    async with asyncio.timeout(Patience.seconds):
        for call in calls:
            found = await _end(call)
            assert found.code is StatusCode.UNAUTHENTICATED, found
            assert found.reason == "UNAUTHENTICATED"


async def revoked(folder: Path) -> None:
    """What was begun with a token ends with it; nobody else notices."""
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
    """What was begun with a token ends when its time is up, and not before."""
    for who, after in (("expiring", LIFETIME), ("jwt", 3600)):
        async with guarded(folder) as world, followed(world, who) as calls:
            world.clock[0] += after - 2
            world.look()
            assert not any(open_call.revocation for open_call in _open_calls(world, who))
            world.clock[0] += 4
            world.look()
            await _all_end(world, who, calls)


async def moved(folder: Path) -> None:
    """A token that is of another tenant now does not go on reading what is of the first."""
    async with guarded(folder) as world, followed(world, "expiring") as calls:
        entry = 'name = "expiring"\ntenant = '
        world.rewrite((entry + '"acme"', entry + '"other"'))
        world.look()
        await _all_end(world, "expiring", calls)


async def slow_reader(folder: Path) -> None:
    """A call that is being told something when it is to end is told that it ends, too."""
    async with guarded(folder) as world:
        method = RUNS + "SubscribeRun"
        call = world.open(method, request(method), world.shown("read"))
        async with asyncio.timeout(Patience.seconds):
            while not any(open_call.is_sending for open_call in _open_calls(world, "read")):
                await asyncio.sleep(0)
        world.revoke("read")
        world.look()
        await _all_end(world, "read", [call])


async def broken_file(folder: Path) -> None:
    """A file that cannot be read changes nothing, neither for the better nor for the worse."""
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
                refused_as_unknown(await world.ask(method, request(method)))
        await _all_end(world, "read", calls)  # an empty file is a file: it knows nobody
