"""The socket at which the processes of agents connect."""

from __future__ import annotations

from pathlib import Path

import pytest

from runlane import Unauthenticated
from runlane.worker import Worker
from runlane_server.agents.processes.protocol import SECRET_KEY
from runlane_server.agents.worker.workers import Workers
from runlane_server.rpc.agent_socket import AgentSocket


def _ignore(_: int) -> None:
    """No slots are counted here."""


async def _answer(_: object) -> str:
    return "never called"


@pytest.mark.parametrize("metadata", [{}, {SECRET_KEY: "wrong"}])
async def test_a_process_without_the_secret_is_refused(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    socket, workers = AgentSocket(str(tmp_path / "s")), Workers()
    workers.serve("default", _ignore, lambda: None)
    socket.admit(socket.new_secret(), workers)
    await socket.start()
    try:
        with pytest.raises(Unauthenticated):
            await Worker(socket.address, {"default": _answer}, metadata=metadata).serve()
        assert workers.count("default") == 0
    finally:
        await socket.stop()
