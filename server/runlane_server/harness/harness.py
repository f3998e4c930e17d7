"""The parts of a server that a test harness controls: gates, clock, and process.

Armed gates and the clock offset survive a restart that the harness itself requests.
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
"""The environment variable that carries `Harness.state` from a process to its successor."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The settings of a server that a test needs to know. Times are in seconds."""

    store: str = "memory"
    agent: str = "echo"
    limits: Limits = field(default_factory=Limits)
    drain_timeout: float = 0.0
    progress_interval: float = 0.0
    event_retention: float = 0.0

    @property
    def durable(self) -> bool:
        """Whether accepted runs survive the process."""
        return self.store != "memory"


class ProcessControl(Protocol):
    """Ends the process of a server, and starts it again."""

    @property
    def can_restart(self) -> bool:
        """Whether the process can be ended and restarted."""

    def crash(self, *, restart: bool) -> None:
        """Ends the process at once; with `restart` it starts again. Does not return.

        Raises Unsupported.
        """

    def drain(self, *, restart: bool) -> None:
        """Begins a graceful shutdown; with `restart` the process starts again. Raises
        Unsupported."""


class UncontrolledProcess:
    """The process of another program, such as a test, which a harness must not end."""

    can_restart = False

    def crash(self, *, restart: bool) -> None:
        """Raises Unsupported."""
        raise Unsupported("this server runs inside another program, whose process it cannot end")

    drain = crash


@dataclass(slots=True)
class Harness:
    """The state of a harness. It outlives a node that is restarted at the same address.

    `instance` is a random id of this process.
    """

    gates: Gates = field(default_factory=Gates)
    clock: Clock = field(default_factory=Clock)
    process: ProcessControl = field(default_factory=UncontrolledProcess)
    server: ServerInfo = field(default_factory=ServerInfo)
    instance: str = field(default_factory=lambda: secrets.token_hex(8))

    def state(self) -> str:
        """The state for the next process, as JSON: the armed gates and the clock offset."""
        gates = [gate.spec for gate in self.gates]
        return json.dumps({"offset": self.clock.offset, "gates": gates})

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], process: ProcessControl) -> Harness:
        """A harness in the state of the previous process, if the harness restarted that one."""
        state = json.loads(environment.get(STATE_VARIABLE, "{}"))
        specs = [
            GateSpec(gate_id, Point(point), *scope)
            for gate_id, point, *scope in state.get("gates", ())
        ]
        return cls(Gates(specs), Clock(state.get("offset", 0.0)), process)
