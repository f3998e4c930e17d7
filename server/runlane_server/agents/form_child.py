"""The process that checks schemas and answers which might take for ever.

A check that takes more than a second of CPU ends the process, also in the middle of a regular
expression: the default action of the signal needs no Python.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

from runlane_server.agents.form_rules import schema_problem, violations

CPU_SECONDS = 1.0
MEMORY = 1 << 30


def main() -> None:
    """Answers requests, one JSON a line, until nobody sends any."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while line := sys.stdin.buffer.readline():
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        answer = json.dumps(_answer(**json.loads(line))).encode() + b"\n"
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


def _answer(schema: str, value: str | None = None) -> Any:
    try:
        if value is None:
            return {"problem": schema_problem(schema)}
        return {"violations": violations(schema, value)}
    except Exception as error:  # noqa: BLE001 - a schema may break its own validation
        return {"broken": type(error).__name__}
