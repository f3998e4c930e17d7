"""The settings of the facade, and its caller."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast

from a2a.server.context import ServerCallContext

from runlane.client import Client

CALLER = "runlane.caller"
"""The place of the caller in the state of a `ServerCallContext`."""

MAX_HOPS = 8


@dataclass(frozen=True, slots=True)
class Settings:
    """The operator's decisions.

    Attributes:
        agent: The agent of new tasks; empty: the session's, or the server's default.
        metadata: Keys of the metadata of messages that become labels of runs.
        max_hops: Maximum number of agents that a message has passed before.
        modes: The media types that the agent takes.
    """

    agent: str = ""
    metadata: frozenset[str] = frozenset()
    max_hops: int = MAX_HOPS
    modes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Caller:
    """The server as one caller sees it.

    Attributes:
        calls: For calls that are answered at once.
        streams: For streams and waiting calls: the server limits the calls of a connection, and
            open streams must not keep others waiting.
        take_place: Takes a place for a stream or a waiting call until the call ends. Raises
            Refused.
        run_id: The idempotency key of the call; empty: none.
    """

    calls: Client
    streams: Client
    take_place: Callable[[], Awaitable[None]]
    run_id: str = ""


def caller_of(context: ServerCallContext) -> Caller:
    """The caller of a call."""
    return cast("Caller", context.state[CALLER])


def context_for(caller: Caller) -> ServerCallContext:
    """The context of a call."""
    return ServerCallContext(state={CALLER: caller})
