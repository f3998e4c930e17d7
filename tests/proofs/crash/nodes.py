"""Several nodes over one database, what may happen to them, and what their clients share."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from proofs.crash import witness
from proofs.crash.faults import CUTS, ENDING, FaultKind, Hit
from proofs.crash.network import Network, Side
from proofs.crash.world import World
from runlane import DeadlineExceeded, RunlaneError
from runlane.errors import is_transient
from support.server import ServerProcess

PATH = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
"""Where a node finds the agent."""

LIMITS = (
    *("--max-active-runs", "3", "--max-waiting-runs", "4"),
    *("--cancel-grace", "200ms", "--drain-timeout", "300ms", "--progress-interval", "100ms"),
    *("--log-level", "info", "--log-format", "json"),
    # In networks of the test's own.
    "--insecure-anywhere",
)
"""So small that two nodes cannot have all sessions active, and queues are full now and then."""

ANY_NODE = 0.1
"""How often a client connects to any node, not to one of which it is known that it can be reached:
nobody knows that at once."""


OF_LIBRARIES = (
    "unexpected connection_lost() call",
    "coro=<Connection.close() done",
    "coro=<PoolConnectionHolder.release() done",
    "ExecuteBatchError raised in core by servicer method",
)
"""What libraries say by themselves. asyncpg leaves an exception behind that nobody asks for where a
connection breaks while it is made, or while its pool closes it; grpc tells of a client that was
gone when its call ended."""

GAVE_UP = '"event": "the node is cut off from its store"'


class Node(ServerProcess):
    """A node, to be ended, stopped and cut off."""

    def __init__(self, number: int, folder: Path, network: Network, store: str, lease: float):
        self.number = number
        self.reachable = False
        self.reached_at = network.address(number)
        self.witness = folder / "witness.jsonl"
        self._network = network
        folder.mkdir()
        super().__init__(
            folder,
            *("--store", network.store(number, store), "--agent", witness.AGENT),
            *("--node-lease", f"{lease}s", "--node-address", self.reached_at),
            *LIMITS,
            env={witness.FILE: str(self.witness), "PYTHONPATH": PATH},
            listen=network.listen(number),
            prefix=network.prefix(number),
        )

    @property
    def errors(self) -> list[str]:
        """The lines of its log that tell of what should never happen."""
        errors = [line for line in self.log.splitlines() if '"level": "error"' in line]
        return [line for line in errors if not any(said in line for said in OF_LIBRARIES)]

    @property
    def gave_up(self) -> list[datetime]:
        """When it took itself for lost."""
        lines = [json.loads(line) for line in self.log.splitlines() if GAVE_UP in line]
        return [datetime.fromisoformat(line["timestamp"]) for line in lines]

    async def start(self, *more_flags: str) -> None:
        """Starts it, and returns once it serves."""
        await super().start(*more_flags)
        self._network.serving(self.number, self.address)
        self.reachable = True

    async def kill(self) -> None:
        """Ends it as a crash would."""
        self.reachable = False
        await super().kill()

    async def suffer(self, hit: Hit) -> int:
        """Has a fault happen to it, and be over; returns the exit code of a node that drained."""
        code = 0
        self.reachable = False
        if hit.kind is FaultKind.DRAIN:
            code = await self.stop(signal.SIGTERM)
        elif hit.kind is FaultKind.KILL:
            await self.kill()
        elif hit.kind in CUTS:
            # Who is cut off from its store answers clients all the same.
            self.reachable = Side.CLIENTS not in CUTS[hit.kind]
            for side in CUTS[hit.kind]:
                await self._network.cut(self.number, side, reset=hit.reset)
        else:
            self.send(signal.SIGSTOP)
        await asyncio.sleep(hit.seconds)
        if hit.kind in CUTS:
            for side in CUTS[hit.kind]:
                await self._network.mend(self.number, side)
        elif hit.kind not in ENDING:
            self.send(signal.SIGCONT)
        if hit.kind in ENDING:
            await self.start()
        self.reachable = True
        return code


@dataclass(slots=True)
class NodesWorld(World):
    """Clients that connect to one node, and go on at another."""

    nodes: list[Node] = field(default_factory=list)
    choice: random.Random = field(default_factory=random.Random)

    def pick(self) -> str:
        """The address of a node, mostly of one that can be reached."""
        known = [node for node in self.nodes if node.reachable]
        if not known or self.choice.random() < ANY_NODE:
            known = self.nodes
        node = self.choice.choice(known)
        return node.reached_at

    def is_lost(self, error: RunlaneError) -> bool:
        """Whatever another node might do better."""
        return is_transient(error) or isinstance(error, DeadlineExceeded)
