"""A peer: the same work by DBOS, a library that keeps workflows in a database.

Run it as `python -m bench.dbos_peer URL`, with the URL of a database. `Send` answers once the
workflow is stored, and `Run` with its result. The workflows run in this process.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import grpc
from dbos import DBOS


@DBOS.workflow()
async def echo(prompt: str) -> str:
    """An agent that echoes the prompt."""
    return prompt


async def send(request: bytes, _: Any) -> bytes:
    """Starts a workflow."""
    handle = await DBOS.start_workflow_async(echo, request.decode())
    workflow_id: str = handle.workflow_id
    return workflow_id.encode()


async def run(request: bytes, _: Any) -> bytes:
    """Starts a workflow, and waits for its end."""
    handle = await DBOS.start_workflow_async(echo, request.decode())
    answer: str = await handle.get_result()
    return answer.encode()


async def main() -> None:
    """Serves until it is killed."""
    logging.disable(logging.CRITICAL)
    DBOS(config={"name": "peer", "system_database_url": sys.argv[1]})
    DBOS.launch()
    handlers: dict[str, Any] = {
        name: grpc.unary_unary_rpc_method_handler(behavior)
        for name, behavior in {"Send": send, "Run": run}.items()
    }
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("dbos.Peer", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"dbos listening on 127.0.0.1:{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
