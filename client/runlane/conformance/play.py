"""Plays the cases against a server."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum

from grpc import StatusCode

from runlane.client import Client

# Each of them registers its cases.
from runlane.conformance import (  # noqa: F401
    accepting,
    bursting,
    cancelling,
    completing,
    folding,
    ordering,
)
from runlane.conformance.rules import CASES, Broken, Case, Need
from runlane.conformance.world import World
from runlane.errors import RunlaneError, UnexpectedStatus
from runlane.harness.client import Harness, Server

AGENT = "scripted"
"""What the cases need the server to run."""

CASE_SECONDS = 6.0
"""How many times its patience a case may take as a whole."""


class Verdict(StrEnum):
    """What came of a case, or of a rule."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a case; `told` is what was wrong, or why it was left out."""

    case: Case
    verdict: Verdict
    seconds: float = 0.0
    told: str = ""


class NotSuited(Exception):
    """The server cannot be tested; the message says why."""


@dataclass(frozen=True, slots=True)
class Player:
    """Plays cases against one server.

    Attributes:
        connect: Makes a client of the server; takes the options of `Client`.
        harness: Has a hold of the server.
        patience: How many seconds a case waits for what has to happen.
    """

    connect: Callable[..., Client]
    harness: Harness
    patience: float

    async def play(
        self, rules: Sequence[int], on_rule: Callable[[Sequence[Result]], None] = lambda _: None
    ) -> list[Result]:
        """Plays the cases of these rules, one after the other; `on_rule` hears of each rule.

        Raises NotSuited, and RunlaneError where the server cannot be reached.
        """
        try:
            server = await self.harness.server()
        except UnexpectedStatus as error:
            if error.status is not StatusCode.UNIMPLEMENTED:
                raise
            raise NotSuited(
                f"the server serves no harness: start it with --harness --agent {AGENT}"
            ) from error
        if server.agent != AGENT:
            raise NotSuited(f"the server's agent is {server.agent}: start it with --agent {AGENT}")
        prefix = f"conformance-{secrets.token_hex(4)}"
        results: list[Result] = []
        for rule in sorted(set(rules)):
            played = [
                await self._result(each, server, f"{prefix}-r{rule:02}-{n}")
                for n, each in enumerate(cases_of(rule), start=1)
            ]
            on_rule(played)
            results += played
        return results

    async def _result(self, each: Case, server: Server, session: str) -> Result:
        if missing := [need for need in Need if need in each.needs and not _has(server, need)]:
            return Result(each, Verdict.SKIPPED, told="; ".join(missing))
        began = time.perf_counter()
        told = await self._told(each, server, session)
        verdict = Verdict.FAILED if told else Verdict.PASSED
        return Result(each, verdict, time.perf_counter() - began, told)

    async def _told(self, each: Case, server: Server, session: str) -> str:
        """What was wrong; empty if nothing was."""
        limit = self.patience * CASE_SECONDS
        try:
            async with asyncio.timeout(limit), AsyncExitStack() as closing:
                client = await closing.enter_async_context(self.connect())
                await each.play(
                    World(
                        client, self.harness, server, session, self.patience, closing, self.connect
                    )
                )
        except Broken as error:
            return str(error)
        except RunlaneError as error:
            return f"{error.reason or type(error).__name__}: {error}"
        except TimeoutError:
            return f"not done within {limit:g} s"
        except Exception as error:  # noqa: BLE001 - whatever a server does, the others are played
            return f"unexpected {type(error).__name__}: {error}"
        return ""


def cases_of(rule: int) -> Iterator[Case]:
    """The cases of a rule."""
    return (each for each in CASES if each.rule == rule)


def verdict_of(results: Sequence[Result]) -> Verdict:
    """What the results of a rule amount to: one that fails is enough, one that passes is too."""
    found = {result.verdict for result in results}
    order = (Verdict.FAILED, Verdict.PASSED)
    return next((verdict for verdict in order if verdict in found), Verdict.SKIPPED)


def _has(server: Server, need: Need) -> bool:
    match need:
        case Need.RESTARTS:
            return server.restarts
        case Need.DURABLE:
            return server.durable
        case Need.CLOCK:
            return server.advances_clock
        case Need.RETENTION:
            return bool(server.event_retention)
