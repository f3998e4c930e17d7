"""The rules and the registry of their cases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Never, TypeAlias

from runlane.types import FinishReason, RunState

if TYPE_CHECKING:
    from runlane.conformance.context import CaseContext

RULES: Mapping[int, str] = MappingProxyType(
    {
        1: "An accept is durable and never waits for the agent",
        2: "Empty prompts, missing and unknown sessions are rejected",
        3: "A run id is an idempotency key without expiry",
        4: "accept_seq strictly increases in accept order",
        5: "A run does not depend on its caller",
        6: "A failed accept leaves nothing behind",
        7: "At most one run per session is active, in accept order",
        8: "A session with work never looks idle",
        9: "A session is busy until its agent has returned",
        10: "A cancel covers every accepted run that has not ended",
        11: "A cancel does not affect runs accepted after it",
        12: "A cancel of an idle session has no effect",
        13: "A repeated cancel has no effect",
        14: "A run cancelled on entry has its turn in the transcript",
        15: "A run cancelled before its first message has one prompt",
        16: "A run cancelled mid-stream keeps its text",
        17: "A shutdown writes the end of active runs",
        18: "A cancel covers exactly its scope",
        19: "A cancel that races a completion has one consistent outcome",
        20: "A receipt has the covered runs, their states and the fence",
        21: "Every accepted run has exactly one RunComplete",
        22: "The transcript is visible before the RunComplete",
        23: "A RunComplete has all its fields",
        24: "The end of one run does not end the wait for another",
        25: "A subscription resumes by cursor, exactly once and in order",
        26: "A FOLD run joins the active turn at its next step",
        27: "QUEUE waits, REJECT is rejected, INTERRUPT goes first",
        28: "A completion does not affect later runs",
        29: "A burst of accepts on an idle session starts one run",
        30: "Runs wait until the agent is ready, or fail",
        31: "A run is executed by the agent that it names",
        32: "A run waits for its agent, and delays no other agent",
        33: "An attempt has one executor, and nobody else writes its output",
        34: "An event of a worker is stored once, and then acknowledged",
        35: "A worker has its lease to come back after a lost connection",
        36: "The run of a worker outlives the process of the server",
        37: "A cancel reaches the worker at once, and a stop gives runs back",
        38: "A retry policy repeats failed attempts in their place",
        39: "A step whose result is stored is not repeated",
        40: "A run that asks people waits without a slot",
        41: "The first answer to an input request counts",
        42: "A cancel or the end of the run withdraws its input requests",
        43: "An input request expires: its default applies, or the run fails",
        44: "Input survives the loss of a node, and nobody is asked twice",
        45: "Subscribers learn of every input request and of its end",
        46: "A waiting run can be edited, one that left the queue cannot",
        47: "A move changes the order of the starts, and nothing else",
        48: "A fork has the finished turns, and its origin is untouched",
        50: "The stream of a session is a snapshot and everything after it",
        51: "The stream of a session resumes by cursor, exactly once",
        52: "The stream of a session has the order of its lane",
        55: "Events are delivered to webhooks, signed and in order",
    }
)
"""The rules in one line each; CONTRIBUTING.md has their full text."""


class Need(StrEnum):
    """A capability of the server that a case requires; the value is the reason to skip it."""

    RESTARTS = "the server cannot restart its process"
    DURABLE = "the store is not durable"
    CLOCK = "the server cannot advance its clock"
    STORE_CLOCK = "the store has a clock of its own, which no test can advance"
    AGENTS = "the server has no agents echo=echo and single=scripted (1 slot)"
    WORKER = "no --worker-agent names an agent that is declared as worker"
    RETENTION = "the server retains events without limit"
    WEBHOOKS = "the server may not deliver to 127.0.0.1 (--webhook-allow-network 127.0.0.0/8)"


class RuleBroken(Exception):
    """The server broke the rule of the case; the message describes how."""


CaseFunction: TypeAlias = "Callable[[CaseContext], Awaitable[None]]"


@dataclass(frozen=True, slots=True)
class Case:
    """A check of one rule.

    Attributes:
        rule: The number of the rule.
        name: The expected behaviour, as a sentence.
        run: Executes the check; raises RuleBroken or an error of the client if it fails.
        needs: The capabilities that the server must have.
    """

    rule: int
    name: str
    run: CaseFunction
    needs: frozenset[Need]


CASES: list[Case] = []
"""All cases; `runlane.conformance.cases` registers them."""


def case(rule: int, *needs: Need) -> Callable[[CaseFunction], CaseFunction]:
    """Registers a function as a case of a rule. Its docstring is the name of the case."""

    def register(run: CaseFunction) -> CaseFunction:
        name = " ".join((run.__doc__ or "").split()).rstrip(".")
        CASES.append(Case(rule, name, run, frozenset(needs)))
        return run

    return register


def cases_of(rule: int) -> Iterator[Case]:
    """Returns the cases of a rule."""
    return (each for each in CASES if each.rule == rule)


def fail(message: str) -> Never:
    """Raises RuleBroken."""
    raise RuleBroken(message)


def expect(what: str, found: object, expected: object) -> None:
    """Raises RuleBroken unless both values are equal; `what` names them."""
    if found != expected:
        raise RuleBroken(f"{what}: expected {_format(expected)}, found {_format(found)}")


def expect_that(what: str, *, true: bool) -> None:
    """Raises RuleBroken unless the condition `what` is true."""
    if not true:
        raise RuleBroken(f"expected that {what}")


@asynccontextmanager
async def time_limit(what: str, seconds: float) -> AsyncIterator[None]:
    """Raises RuleBroken if a wait exceeds its limit; `what` completes "waiting for"."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        fail(f"timed out after {seconds:g} s waiting for {what}")


def _format(value: object) -> str:
    if value is FinishReason.CANCELED:
        return str(RunState.CANCELLED)  # one spelling for people
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_format, value))}]"
    return repr(value)
