"""Stages races over the wire, for tests of whatever calls Runlane: holds runs at named points,
moves the server's clock, and has the server crash.

The server is one that was started with `--harness`. The same calls are there for any language, as
`runlane.harness.v1.HarnessService`.

    async with Harness("127.0.0.1:50051") as harness, Client("127.0.0.1:50051") as client:
        async with await harness.arm(GatePoint.BEFORE_ACTIVE, session_id="s") as gate:
            handle = await client.run_accepted("s", "Hello", allow_missing=True)
            await gate.reached()
            receipt = await client.cancel("s")      # covers the run before it is active
"""

from __future__ import annotations

from runlane.harness.client import ArmedGate, Arrival, Gate, GatePoint, Harness, Server

__all__ = ["ArmedGate", "Arrival", "Gate", "GatePoint", "Harness", "Server"]
