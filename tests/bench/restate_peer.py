"""A peer: the same work by Restate, with one virtual object per session.

Run it as `python -m bench.restate_peer PROGRAM FOLDER`, with the program of Restate's server, which
keeps its log in the folder and calls the agent in this process. Both have the core of this process.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import urllib.request
from contextlib import closing

import restate
from hypercorn.asyncio import serve
from hypercorn.config import Config
from restate import ObjectContext, VirtualObject

_WITH_PARENT = '"$@" 3<&0 </dev/null >&2 & server=$!; read -r _; kill -9 $server'
"""Ends the server when this process has ended, however that ended."""

START_SECONDS = 30.0

session = VirtualObject("Session")


@session.handler()
async def echo(_: ObjectContext, prompt: str) -> str:
    """An agent that echoes the prompt."""
    return prompt


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port: int = listening.getsockname()[1]
        return port


def _is_registered(admin: int, agent: int) -> bool:
    request = urllib.request.Request(
        f"http://127.0.0.1:{admin}/deployments",
        data=b'{"uri": "http://127.0.0.1:%d"}' % agent,
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5.0):  # noqa: S310
            return True
    except OSError:
        return False


async def main() -> None:
    """Serves until it is killed."""
    program, folder = sys.argv[1:]
    ingress, admin, node, agent = (_free_port() for _ in range(4))
    config = Config()
    config.bind = [f"127.0.0.1:{agent}"]
    # By default each connection breaks after 1,000 of them, and with it all calls on it.
    config.keep_alive_max_requests = sys.maxsize
    serving = asyncio.create_task(serve(restate.app([session]), config))
    settings = {
        "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{ingress}",
        "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{admin}",
        "RESTATE_BIND_ADDRESS": f"127.0.0.1:{node}",
        "RESTATE_DISABLE_TELEMETRY": "true",
        # The default, 24, has half of the rate on one core.
        "RESTATE_DEFAULT_NUM_PARTITIONS": "1",
        "RESTATE_LOG_FILTER": "warn",
    }
    flags = ("--no-logo", "--listen-mode", "tcp", "--base-dir", folder, "--node-name", "peer")
    await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", _WITH_PARENT, "sh", program, *flags),
        stdin=asyncio.subprocess.PIPE,
        env={**os.environ, **settings},
    )
    async with asyncio.timeout(START_SECONDS):
        while not await asyncio.to_thread(_is_registered, admin, agent):
            await asyncio.sleep(0.2)
    sys.stdout.write(f"restate listening on 127.0.0.1:{ingress}\n")
    sys.stdout.flush()
    await serving


if __name__ == "__main__":
    asyncio.run(main())
