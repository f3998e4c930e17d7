"""The test cases, one module per group of rules.

Importing this package registers all cases in `runlane.conformance.rules.CASES`; import nothing else
from here. Cases use only the public interface of a server, and the harness.
"""

from __future__ import annotations

from runlane.conformance.cases import (
    accept,
    agents,
    answer,
    cancel,
    complete,
    fold,
    fork,
    order,
    retry,
    session_stream,
    start,
    update,
    webhook,
    worker_output,
    workers,
)

__all__ = [
    "accept",
    "agents",
    "answer",
    "cancel",
    "complete",
    "fold",
    "fork",
    "order",
    "retry",
    "session_stream",
    "start",
    "update",
    "webhook",
    "worker_output",
    "workers",
]
