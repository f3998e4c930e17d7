"""Other services that do the same work, under the same conditions."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench import wire
from bench.bench import ACCEPT, CACHE, SUBSCRIBE, Bench, figure
from bench.load import call
from bench.nodes import database, node
from bench.process import Server, cores
from bench.rates import accepts, completes, ratios
from bench.result import Figure, Row

METHOD = "/lf.a2a.v1.A2AService/SendMessage"

STORES = ("memory", "sqlite")

RESTATE = "node_modules/@restatedev/restate-server-*/bin/restate-server"
"""The program of Restate's server in the folder `PEERS`, after `make bench-peers`."""

PEERS = CACHE / "peers"

WARMUP = 6.0
"""Seconds that Restate needs until its rate no longer grows."""

Serve = Callable[[], AbstractAsyncContextManager[Server]]
Job = dict[str, Any]


async def a2a(bench: Bench) -> list[Row]:
    """Accept to terminal event as the caller sees it: Runlane against the SDK of A2A."""
    _require("a2a")
    rows: list[Row] = []
    for store in STORES:
        ours, peer = await bench.in_turn(partial(completes, bench), partial(_tasks, bench, store))
        title = f"accept to terminal event over SQLite, to a2a-sdk over {store}"
        rows.append(Row(f"a2a-{store}", title, "/s", ratios(ours, peer), ours, peer))
    return rows


async def dbos(bench: Bench) -> list[Row]:
    """Runlane against DBOS: both over SQLite, and both over PostgreSQL on all cores."""
    _require("dbos")

    @asynccontextmanager
    async def serve() -> AsyncIterator[Server]:
        with bench.folder() as folder:
            url = f"sqlite:///{folder / 'dbos.db'}"
            async with _peer(["bench.dbos_peer", url], folder) as server:
                yield server

    rows = await _sends_and_ends(bench, "dbos", serve, _workflow("Send"), _workflow("Run"))
    ours, peer = await bench.in_turn(partial(_over_postgres, bench), partial(_shared, bench))
    title = "accept to terminal event over PostgreSQL, to dbos over PostgreSQL"
    return [*rows, Row("dbos-postgres-ends", title, "/s", ratios(ours, peer), ours, peer)]


def _workflow(method: str) -> Job:
    return {"kind": "unary", "call": call(f"/dbos.Peer/{method}", wire.PROMPT.encode())}


async def _over_postgres(bench: Bench) -> Figure:
    async with database() as store, node(bench, store.url) as server:
        return figure(await bench.run(server, kind="runs", call=ACCEPT, watch=SUBSCRIBE))


async def _shared(bench: Bench) -> Figure:
    async with database() as store:
        with bench.folder() as folder:
            argv = [sys.executable, "-m", "bench.dbos_peer", store.url]
            async with Server(argv, folder, None) as server:
                return figure(await bench.run(server, **_workflow("Run")))


async def restate(bench: Bench) -> list[Row]:
    """Runlane against Restate with an agent in Python. Needs the generator in Go."""
    _require("restate")
    program = next(PEERS.glob(RESTATE), None) or shutil.which("restate-server")
    if program is None:
        raise RuntimeError("restate-server is not installed; run make bench-peers")

    @asynccontextmanager
    async def serve() -> AsyncIterator[Server]:
        # The server may write until it is killed, while the folder is removed.
        made = tempfile.TemporaryDirectory(dir=bench.scratch, ignore_cleanup_errors=True)
        with made as folder:
            argv = ["bench.restate_peer", str(program), folder]
            async with _peer(argv, Path(folder)) as server:
                yield server

    def job(method: str) -> Job:
        path = f"/Session/{wire.name(0)}/{method}"
        return {"kind": "posts", "call": call(path, json.dumps(wire.PROMPT).encode())}

    return await _sends_and_ends(bench, "restate", serve, job("echo/send"), job("echo"))


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise RuntimeError(f"{module} is not installed; run make bench-peers")


def _peer(argv: Sequence[str], folder: Path) -> Server:
    return Server([sys.executable, "-m", *argv], folder, cores()[0])


async def _sends_and_ends(bench: Bench, name: str, serve: Serve, send: Job, run: Job) -> list[Row]:
    """Durable accepts, and accept to terminal event, against both of a peer."""

    async def measured(job: Job) -> Figure:
        warmup = bench.warmup if bench.quick else max(bench.warmup, WARMUP)
        async with serve() as server:
            return figure(await bench.run(server, **{**job, "warmup": warmup}))

    sent, theirs_sent, ended, theirs_ended = await bench.in_turn(
        partial(accepts, bench),
        partial(measured, send),
        partial(completes, bench),
        partial(measured, run),
    )
    title = f"durable accept, a session each, to {name}"
    sends = Row(f"{name}-sends", title, "/s", ratios(sent, theirs_sent), sent, theirs_sent)
    title = f"accept to terminal event, a session each, to {name}"
    ends = Row(f"{name}-ends", title, "/s", ratios(ended, theirs_ended), ended, theirs_ended)
    return [sends, ends]


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
        async with _peer(["bench.a2a_peer", place], folder) as server:
            return figure(await bench.run(server, kind="unary", call=request))
