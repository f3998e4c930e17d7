"""A server whose file descriptors run out."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import pytest

from runlane import Client, Session
from runlane.errors import Unauthenticated
from runlane_server.access import editing
from runlane_server.access.caller import Role
from support.server import serving
from support.staging import SECONDS

# The numbers below this limit are always taken, so that the server gets no new descriptor, also
# if it closes some of its others.
STANDARD_STREAMS = 3


@pytest.mark.sqlite("it is about the access file, in front of any store")
async def test_a_token_revoked_without_descriptors_loses_its_access_afterwards(
    tmp_path: Path,
) -> None:
    access = tmp_path / "access.toml"
    token = editing.add(access, "ci", tenant="acme", role=Role.READ)
    async with (
        serving(tmp_path, "--access", str(access)) as server,
        Client(server.address, token=token) as client,
        asyncio.timeout(SECONDS),
    ):
        assert await sessions(client) == []
        limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (STANDARD_STREAMS, limits[1]))
        editing.remove(access, "ci")
        await server.logs("Too many open files")
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
        with pytest.raises(Unauthenticated):
            await list_forever(client)


async def sessions(client: Client) -> list[Session]:
    return [session async for session in client.list_sessions()]


async def list_forever(client: Client) -> None:
    while True:
        await sessions(client)
