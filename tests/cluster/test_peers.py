"""The connections of a node to the others."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest

from runlane_server.access.node_keys import NodeKeys
from runlane_server.cluster import peers as peers_module
from runlane_server.cluster.peers import Peers


async def test_calls_for_all_tenants_share_the_connections_to_a_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers_module, "MOST_CALLS", 2)
    peers = Peers(NodeKeys(["key"]))
    async with AsyncExitStack() as calls:
        first, second, third = [
            await calls.enter_async_context(peers._wire("127.0.0.1:1")) for _ in range(3)
        ]
        other = await calls.enter_async_context(peers._wire("127.0.0.1:2"))
        assert first is second
        assert len({id(first), id(third), id(other)}) == 3
    assert not peers._wires
    async with peers._wire("127.0.0.1:1") as again:
        assert again is not first
