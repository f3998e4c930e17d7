"""Waiting for a run to end, for as long as it takes."""

from __future__ import annotations

import asyncio

from runlane import convert
from runlane.convert import Seconds, seconds
from runlane.errors import DeadlineExceeded, RunlaneError, is_transient
from runlane.tokens import Metadata
from runlane.types import Run
from runlane.v1 import run_service_pb2 as pb
from runlane.wire import Backoff, Wire

WAIT_SLICE = 30.0
"""For how many seconds one WaitRun call waits. A wait is made of many, so that a connection that
died without a word holds up one of them and not the whole."""


async def wait_run(wire: Wire, run_id: str, timeout: Seconds | None) -> Run:
    """The run at its end, or as it is when the time is up; see `Client.wait_run`."""
    clock = asyncio.get_running_loop().time
    deadline = None if timeout is None else clock() + seconds(timeout)
    backoff = Backoff(wire.retry)
    renewed = False
    while True:
        begun = clock()
        sent = wire.metadata
        wait = WAIT_SLICE if deadline is None else min(max(deadline - begun, 0.0), WAIT_SLICE)
        pause = 0.0
        try:
            run = await _once(wire, run_id, wait, sent)
            renewed = False
            if run.state.terminal or (deadline is not None and clock() >= deadline):
                return run
            # A server that does not wait as long as it was asked to is not asked in a tight loop.
            if clock() - begun < wait:
                pause = backoff.next()
            else:
                backoff.reset()
        except RunlaneError as error:
            pause = backoff.next(error)
            late = deadline is not None and clock() + pause >= deadline
            again = not renewed and wire.renewed(error, sent)
            renewed = renewed or again
            if late or not (again or is_transient(error) or isinstance(error, DeadlineExceeded)):
                raise
        await asyncio.sleep(pause)


async def _once(wire: Wire, run_id: str, wait: float, metadata: Metadata) -> Run:
    request = pb.WaitRunRequest(run_id=run_id, timeout=convert.to_duration(wait))
    response = await wire.once(wire.runs.WaitRun, request, wait + wire.timeout, metadata)
    return convert.run(response.run)
