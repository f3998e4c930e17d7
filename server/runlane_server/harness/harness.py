"""What a harness has a hold of: the gates, the clock, and the process of a server.

What it has done to a server outlives the process, if that is started anew by it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from runlane_server.core.errors import Unsupported
from runlane_server.core.limits import Limits
from runlane_server.harness.clock import Clock
from runlane_server.harness.gates import Gates, GateSpec, Point

STATE_VARIABLE = "RUNLANE_HARNESS_STATE"
"""The environment variable by which a process is told what the one before it was set to."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """How a server is set, as far as a test has to know. Times are in seconds."""

    store: str = "memory"
    agent: str = "echo"
    limits: Limits = field(default_factory=Limits)
    drain_timeout: float = 0.0
    progress_interval: float = 0.0
    event_retention: float = 0.0

    @property
    def durable(self) -> bool:
        """Whether what was accepted outlives the process."""
        return self.store != "memory"


class ProcessControl(Protocol):
    """The life of a server's process."""

    @property
    def can_restart(self) -> bool:
        """Whether it can be ended, and started anew."""

    def crash(self, *, restart: bool) -> None:
        """Ends it at once, and starts it anew if so wished. Does not return; raises Unsupported."""

    def drain(self, *, restart: bool) -> None:
        """Has it go down in good order, and start anew if so wished. Raises Unsupported."""


class UncontrolledProcess:
    """The process is somebody else's, such as that of a test, and is not to be ended."""

    can_restart = False

    def crash(self, *, restart: bool) -> None:
        """Raises Unsupported."""
        raise Unsupported("this server is part of another program, and cannot end its process")

    drain = crash


@dataclass(slots=True)
class Harness:
    """Holds all of it, for one server after the other at the same address."""

    gates: Gates = field(default_factory=Gates)
    clock: Clock = field(default_factory=Clock)
    process: ProcessControl = field(default_factory=UncontrolledProcess)
    server: ServerInfo = field(default_factory=ServerInfo)
    instance: str = field(default_factory=lambda: secrets.token_hex(8))

    def state(self) -> str:
        """What is to outlive the process."""
        gates = [gate.spec for gate in self.gates]
        return json.dumps({"offset": self.clock.offset, "gates": gates})

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], process: ProcessControl) -> Harness:
        """The harness as the process before this one left it, if that was ended by it."""
        known = json.loads(environment.get(STATE_VARIABLE, "{}"))
        gates = [
            GateSpec(gate_id, Point(point), *scope)
            for gate_id, point, *scope in known.get("gates", ())
        ]
        return cls(Gates(gates), Clock(known.get("offset", 0.0)), process)
