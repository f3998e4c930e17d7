"""Runs the cases against a server."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum

from grpc import StatusCode

from runlane.client import Client
from runlane.conformance import cases  # noqa: F401 - registers the cases
from runlane.conformance.cases.agents import find_echo, find_limited
from runlane.conformance.context import CaseContext
from runlane.conformance.rules import Case, Need, RuleBroken, cases_of
from runlane.conformance.worker_stream import WorkerAgent
from runlane.errors import InvalidArgument, RunlaneError, UnexpectedStatus
from runlane.harness.client import Harness, Server

AGENT = "scripted"
"""The agent that the cases require."""

CASE_TIMEOUT_FACTOR = 6.0
"""Maximum duration of a case, as a multiple of the timeout of one wait."""


class Verdict(StrEnum):
    """The outcome of a case or of a rule."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a case; `detail` is the failure, or the reason for skipping it."""

    case: Case
    verdict: Verdict
    seconds: float = 0.0
    detail: str = ""


class UnsuitableServer(Exception):
    """The server cannot be tested; the message has the reason."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs cases against one server.

    Attributes:
        connect: Creates a client of the server; takes the options of `Client`.
        harness: The harness of the server.
        timeout: Maximum seconds that a case waits for an expected event.
        worker_agent: The agent whose runs the cases execute as a worker, if the server has one.
    """

    connect: Callable[..., Client]
    harness: Harness
    timeout: float
    worker_agent: WorkerAgent | None = None

    async def run(
        self, rules: Sequence[int], on_rule: Callable[[Sequence[Result]], None] = lambda _: None
    ) -> list[Result]:
        """Runs the cases of these rules sequentially; calls `on_rule` with the results of each.

        Raises UnsuitableServer, and RunlaneError if the server cannot be reached.
        """
        try:
            server = await self.harness.server()
        except UnexpectedStatus as error:
            if error.status is not StatusCode.UNIMPLEMENTED:
                raise
            raise UnsuitableServer(
                f"the server has no harness; start it with --harness --agent {AGENT}"
            ) from error
        if server.agent != AGENT:
            raise UnsuitableServer(
                f"the server's agent is {server.agent}; start it with --agent {AGENT}"
            )
        found = await self._find_needs()
        await self._check_worker_agent()
        prefix = f"conformance-{secrets.token_hex(4)}"
        results: list[Result] = []
        for rule in sorted(set(rules)):
            of_rule = [
                await self._run_case(case, server, f"{prefix}-r{rule:02}-{n}", found)
                for n, case in enumerate(cases_of(rule), start=1)
            ]
            on_rule(of_rule)
            results += of_rule
        return results

    async def _find_needs(self) -> frozenset[Need]:
        """Abilities of the server that are no settings of it, or that only its calls show."""
        found = {
            Need.AGENTS: await self._has_agents(),
            Need.WORKER: self.worker_agent is not None,
            Need.WEBHOOKS: await self._delivers(),
        }
        return frozenset(need for need, has in found.items() if has)

    async def _delivers(self) -> bool:
        """Whether the server may deliver to webhooks on this machine."""
        async with self.connect() as client:
            try:
                made = await client.create_webhook("http://127.0.0.1:9/", enabled=False)
            except (InvalidArgument, UnexpectedStatus):
                return False
            await client.delete_webhook(made.webhook.webhook_id)
        return True

    async def _has_agents(self) -> bool:
        """Whether the server has the agents that the cases of R31 and R32 use."""
        async with self.connect() as client:
            try:
                agents = await client.list_agents()
            except UnexpectedStatus as error:
                if error.status is not StatusCode.UNIMPLEMENTED:
                    raise
                return False
        return find_echo(agents) is not None and find_limited(agents) is not None

    async def _check_worker_agent(self) -> None:
        if self.worker_agent is None:
            return
        async with self.connect() as client:
            agents = await client.list_agents()
        name = self.worker_agent.name
        if (name, "worker") not in {(agent.name, agent.kind) for agent in agents}:
            raise UnsuitableServer(
                f"the server has no agent {name!r} for workers; start it with --agent {name}=worker"
            )

    async def _run_case(
        self, case: Case, server: Server, session: str, found: frozenset[Need]
    ) -> Result:
        provided = {need for need in Need if _provides(server, need)} | found
        if missing := [need for need in Need if need in case.needs - provided]:
            return Result(case, Verdict.SKIPPED, detail="; ".join(missing))
        started = time.perf_counter()
        failure = await self._find_failure(case, server, session)
        verdict = Verdict.FAILED if failure else Verdict.PASSED
        return Result(case, verdict, time.perf_counter() - started, failure)

    async def _find_failure(self, case: Case, server: Server, session: str) -> str:
        """Runs a case; returns its failure, or an empty text if it passed."""
        limit = self.timeout * CASE_TIMEOUT_FACTOR
        try:
            async with asyncio.timeout(limit), AsyncExitStack() as exit_stack:
                client = await exit_stack.enter_async_context(self.connect())
                await case.run(
                    CaseContext(
                        client,
                        self.harness,
                        server,
                        session,
                        self.timeout,
                        exit_stack,
                        self.connect,
                        self.worker_agent,
                    )
                )
        except RuleBroken as error:
            return str(error)
        except RunlaneError as error:
            return f"{error.reason or type(error).__name__}: {error}"
        except TimeoutError:
            return f"the case timed out after {limit:g} s"
        except Exception as error:  # noqa: BLE001 - one case must not stop the others
            return f"unexpected {type(error).__name__}: {error}"
        return ""


def _provides(server: Server, need: Need) -> bool:
    match need:
        case Need.AGENTS | Need.WORKER | Need.WEBHOOKS:
            return False  # not a setting of the server
        case Need.RESTARTS:
            return server.restarts
        case Need.DURABLE:
            return server.durable
        case Need.STORE_CLOCK:
            return server.store != "postgresql"
        case Need.CLOCK:
            return server.advances_clock
        case Need.RETENTION:
            return bool(server.event_retention)
