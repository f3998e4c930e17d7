"""Servers and clients for the tests over the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runlane import Client
from support.server import ServerProcess, serving
from support.wire import Wire


@pytest.fixture(autouse=True)
def _store(served_store: None) -> None:
    """All servers here use the store of the test."""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    """A server with the scripted agent."""
    async with serving(tmp_path, "--agent", "scripted") as process:
        yield process


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[Client]:
    async with Client(server.address) as made:
        yield made


@pytest.fixture
async def wire(client: Client) -> Wire:
    return Wire(client)
