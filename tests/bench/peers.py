"""Another service that does the same work, under the same conditions."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial

from bench import wire
from bench.bench import Bench, figure
from bench.load import call
from bench.process import Server, cores
from bench.rates import completes, ratios
from bench.result import Figure, Row

METHOD = "/lf.a2a.v1.A2AService/SendMessage"

STORES = ("memory", "sqlite")


async def a2a(bench: Bench) -> list[Row]:
    """Accept to terminal event as the caller sees it: Runlane against the SDK of A2A."""
    if importlib.util.find_spec("a2a") is None:
        raise RuntimeError("the peer is not installed; run pip install -e '.[bench-peers]'")
    rows: list[Row] = []
    for store in STORES:
        ours, peer = await bench.in_turn(partial(completes, bench), partial(_tasks, bench, store))
        title = f"accept to terminal event over SQLite, to a2a-sdk over {store}"
        rows.append(Row(f"a2a-{store}", title, "/s", ratios(ours, peer), ours, peer))
    return rows


async def _tasks(bench: Bench, store: str) -> Figure:
    from a2a.types import a2a_pb2  # noqa: PLC0415 - may not be there

    message = a2a_pb2.Message(
        message_id=wire.name(0),
        role=a2a_pb2.ROLE_USER,
        parts=[a2a_pb2.Part(text=wire.PROMPT)],
    )
    request = call(METHOD, a2a_pb2.SendMessageRequest(message=message).SerializeToString())
    with bench.folder() as folder:
        place = "memory" if store == "memory" else str(folder / "a2a.db")
        argv = [sys.executable, "-m", "bench.a2a_peer", place]
        async with Server(argv, folder, cores()[0]) as server:
            return figure(await bench.run(server, kind="unary", call=request))
