"""Nodes over one database, the faults that hit them, and the state that their clients share."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from proofs.crash import witness
from proofs.crash.faults import (
    CUTS,
    ENDING,
    NODES,
    WORKER_CUTS,
    WORKER_LEASE,
    FaultKind,
    PlannedFault,
)
from proofs.crash.network import Network, Side
from proofs.crash.server import LIMITS
from proofs.crash.shared import SharedState
from proofs.crash.worked import WORKED
from runlane import DeadlineExceeded, RunlaneError
from runlane.errors import is_transient
from support.server import ListeningProcess, ServerProcess

PATH = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
"""The import path of a node, with the agent on it."""

NODE_FLAGS = (*LIMITS, "--insecure-anywhere")
"""The same low limits; the networks belong to the test, so no server is exposed."""

WORKER_FLAGS = (
    *("--agent", f"{WORKED}=worker", "--worker-lease", f"{WORKER_LEASE}s"),
    # A cancel has to travel to the worker and back, on a busy machine.
    *("--cancel-grace", "1s"),
)
"""Further flags of a node that workers connect to."""

ANY_NODE = 0.1
"""Probability that a client connects to any node, reachable or not: real clients learn of a lost
node only after a while."""


OF_LIBRARIES = (
    "unexpected connection_lost() call",
    "coro=<Connection.close() done",
    "coro=<PoolConnectionHolder.release() done",
    "ExecuteBatchError raised in core by servicer method",
)
"""Messages that libraries log. asyncpg leaves an exception unretrieved if a connection breaks while
it is opened, or while its pool closes it. grpc logs a client that left before its call ended."""

GAVE_UP = '"event": "node cut off from its store"'


class Node(ServerProcess):
    """A node that can be ended, stopped and cut off."""

    def __init__(  # noqa: PLR0917 - what it is made of
        self,
        number: int,
        folder: Path,
        network: Network,
        store: str,
        lease: float,
        flags: Sequence[str] = (),
    ) -> None:
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
            *NODE_FLAGS,
            *flags,
            env={witness.FILE: str(self.witness), "PYTHONPATH": PATH},
            listen=network.listen(number),
            prefix=network.prefix(number),
        )

    @property
    def errors(self) -> list[str]:
        """The errors in the log that should never happen."""
        errors = [line for line in self.log.splitlines() if '"level": "error"' in line]
        return [line for line in errors if not any(said in line for said in OF_LIBRARIES)]

    @property
    def gave_up(self) -> list[datetime]:
        """The times at which the node gave up its lease."""
        lines = [json.loads(line) for line in self.log.splitlines() if GAVE_UP in line]
        return [datetime.fromisoformat(line["timestamp"]) for line in lines]

    async def start(self, *more_flags: str) -> None:
        """Starts the node, and returns once it listens."""
        await super().start(*more_flags)
        self._network.serving(self.number, self.address)
        self.reachable = True

    async def kill(self) -> None:
        """Ends the node as a crash would."""
        self.reachable = False
        await super().kill()

    async def suffer(self, hit: PlannedFault) -> int:
        """Injects a fault, and returns when it is over; returns the exit code of a drained node."""
        code = 0
        self.reachable = False
        if hit.kind is FaultKind.DRAIN:
            code = await self.stop(signal.SIGTERM)
        elif hit.kind is FaultKind.KILL:
            await self.kill()
        elif hit.kind in CUTS:
            # A node that is cut off from its store still answers clients.
            self.reachable = Side.CLIENTS not in CUTS[hit.kind]
            for side in CUTS[hit.kind]:
                await self._network.cut(self.number, side, reset=hit.reset)
            if hit.kind is FaultKind.VANISH:
                await self.kill()
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


class WorkerProcess(ListeningProcess):
    """A worker of the SDK that can be ended, stopped and cut off; numbered after the nodes."""

    def __init__(self, number: int, folder: Path, network: Network) -> None:
        self.number = number
        self.witness = folder / "witness.jsonl"
        self._network = network
        folder.mkdir()
        targets = [network.address_for(number, node) for node in range(NODES)]
        # Each begins at another node.
        targets = targets[number % NODES :] + targets[: number % NODES]
        command = (*network.prefix(number), sys.executable, "-m", "proofs.crash.worked", *targets)
        env = {**os.environ, witness.FILE: str(self.witness), "PYTHONPATH": PATH}
        super().__init__(command, folder, env=env)

    @property
    def errors(self) -> list[str]:
        """The errors in the log that should never happen."""
        return [line for line in self.log.splitlines() if line.startswith("Traceback")]

    async def suffer(self, hit: PlannedFault) -> int:
        """Injects a fault, and returns when it is over; returns the exit code of a drained
        worker."""
        code = 0
        if hit.kind is FaultKind.DRAIN:
            code = await self.stop(signal.SIGTERM)
        elif hit.kind is FaultKind.KILL:
            await self.kill()
        elif hit.kind in WORKER_CUTS:
            await self._network.cut(self.number, Side.CLIENTS, reset=hit.reset)
        else:
            self.send(signal.SIGSTOP)
        await asyncio.sleep(hit.seconds)
        if hit.kind in ENDING:
            await self.start()
        elif hit.kind in WORKER_CUTS:
            await self._network.mend(self.number, Side.CLIENTS)
        else:
            self.send(signal.SIGCONT)
        return code


@dataclass(slots=True)
class NodesSharedState(SharedState):
    """The shared state of clients that move from node to node."""

    nodes: list[Node] = field(default_factory=list)
    workers: list[WorkerProcess] = field(default_factory=list)
    choice: random.Random = field(default_factory=random.Random)

    def pick(self) -> str:
        """The address of a node; in most cases a reachable one."""
        known = [node for node in self.nodes if node.reachable]
        if not known or self.choice.random() < ANY_NODE:
            known = self.nodes
        node = self.choice.choice(known)
        return node.reached_at

    def is_lost(self, error: RunlaneError) -> bool:
        """Whether another node may answer the call instead."""
        return is_transient(error) or isinstance(error, DeadlineExceeded)
