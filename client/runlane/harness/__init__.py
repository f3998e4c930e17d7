"""The test harness: holds runs at gates, advances the server's clock and crashes the server.

For tests of programs that call Runlane, against a server started with `--harness`; never for
production. Import everything from here; `runlane.harness.sync` has the `Harness` for tests without
an event loop. Other languages use `runlane.harness.v1.HarnessService`.

    async with Harness("127.0.0.1:50051") as harness, Client("127.0.0.1:50051") as client:
        async with await harness.arm(GatePoint.BEFORE_ACTIVE, session_id="s") as gate:
            handle = await client.run_accepted("s", "Hello", allow_missing=True)
            await gate.reached()
            receipt = await client.cancel("s")      # covers the run before it becomes active
"""

from __future__ import annotations

from runlane.harness.client import ArmedGate, Arrival, Gate, GatePoint, Harness, Server

__all__ = ["ArmedGate", "Arrival", "Gate", "GatePoint", "Harness", "Server"]
