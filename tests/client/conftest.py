"""Fixtures of the client's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from runlane import Client
from support.peer import Peer, serving


@pytest_asyncio.fixture
async def peer() -> AsyncIterator[Peer]:
    """A scripted server."""
    async with serving() as peer:
        yield peer


@pytest_asyncio.fixture
async def client(peer: Peer) -> AsyncIterator[Client]:
    """A client of the peer."""
    async with peer.client() as client:
        yield client
