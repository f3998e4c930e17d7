"""One round of several nodes: load, faults during the load, and a check of the result."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from proofs.crash import witness
from proofs.crash.actor import Actor
from proofs.crash.checker import Violation, check
from proofs.crash.faults import GAVE_UP, NODES, WORKER_LEASE, FaultKind, Plan, PlannedFault
from proofs.crash.history import Fault, Replay
from proofs.crash.network import Network
from proofs.crash.nodes import WORKER_FLAGS, Node, NodesSharedState, WorkerProcess
from proofs.crash.nodes_rules import near, recoveries
from proofs.crash.observer import ask_for_everything, end_everything, read_log
from proofs.crash.report import RoundReport
from proofs.crash.round import PATIENCE, bounded
from proofs.crash.worked import WORKED
from runlane import RunState
from runlane_server.store.postgres.database import Database
from support.postgres import plain

SESSIONS = 9
TIMEOUT = 1.5
"""Timeout of a call in seconds; it is then repeated at another node."""

STAY = 4.0
"""Seconds after which a stream resumes at another node: a silent stream and a dead one look the
same."""

OPEN_SECONDS = 15.0
"""Seconds after which the transactions of a node have ended: longer than any statement may take."""

OPEN = """
SELECT pid, state, wait_event, now() - xact_start AS since, left(query, 200) AS query
FROM pg_stat_activity
WHERE pid IN (
    SELECT pid FROM pg_locks
        JOIN pg_class ON pg_class.oid = relation
        JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = $1
)
"""
"""The connections that hold a lock in a schema."""

CANCELS = 0.3
"""So many that most runs start, and some are active when their node is lost."""


@dataclass(slots=True)
class Report(RoundReport):
    """The result of a round."""

    plan: Plan
    unhit: int = 0
    """How often a node gave up without a fault."""
    continued: int = 0
    """How often an attempt of a worker continued on another node."""

    @property
    def recoveries(self) -> list[float]:
        """For each run that lost its node: the seconds until it ended or was started again."""
        found = recoveries(self.history)
        return [seconds for fault, _, seconds in found if fault.node < NODES]

    def figures(self) -> dict[str, int]:
        """The round in numbers."""
        kinds = Counter(fault.kind for fault in self.history.faults)
        return {
            "faults": sum(kinds[kind] for kind in FaultKind),
            **{str(kind): kinds[kind] for kind in FaultKind},
            "attempts worked on": len(self.history.attempts),
            "failovers": len(self.recoveries),
            "given up unhit": self.unhit,
            **(self._worker_figures() if self.plan.workers else {}),
            **self.load_figures(),
        }

    def _worker_figures(self) -> dict[str, int]:
        runs = [run for run in self.history.final.runs.values() if run.agent == WORKED]
        return {
            "faults of workers": sum(fault.node >= NODES for fault in self.history.faults),
            "runs of workers": len(runs),
            "completed by workers": sum(run.state is RunState.COMPLETED for run in runs),
            "attempts of workers": sum(work.node >= NODES for work in self.history.attempts),
            "continued on another node": self.continued,
        }


async def play(plan: Plan, folder: Path, network: Network, store: str) -> Report:
    """Plays a plan in an empty folder and an empty store. Ends all processes that it starts."""
    report = Report(plan)
    report.history.lease = plan.lease
    report.history.worker_lease = WORKER_LEASE if plan.workers else 0.0
    rng = random.Random(f"{plan.seed} load")  # noqa: S311 - it is to repeat itself
    flags = WORKER_FLAGS if plan.workers else ()
    shared = NodesSharedState(
        rng,
        tuple(f"s{n}" for n in range(SESSIONS)),
        timeout=TIMEOUT,
        stay=STAY,
        cancels=CANCELS,
        history=report.history,
        agents=("", WORKED) if plan.workers else ("",),
        nodes=[Node(n, folder / f"n{n}", network, store, plan.lease, flags) for n in range(NODES)],
        workers=[
            WorkerProcess(n, folder / f"n{n}", network) for n in range(NODES, NODES + plan.workers)
        ],
    )
    async with _running(shared.nodes), _running(shared.workers):
        await _load(shared, plan, report)
    report.violations += [Violation("left open", what) for what in await left_open(store)]
    lease = timedelta(seconds=plan.lease)
    for node in shared.nodes:
        given_up = [Fault(node.number, GAVE_UP, at - lease, at) for at in node.gave_up]
        report.continued += node.log.count('"event": "run continued"')
        report.unhit += sum(not near(fault, report.history) for fault in given_up)
        report.history.faults += given_up
        report.history.attempts += witness.read(node.witness, node.number)
        report.violations += [Violation("log", f"node {node.number}: {e}") for e in node.errors]
    for worker in shared.workers:
        report.history.attempts += witness.read(worker.witness, worker.number)
        errors = [Violation("log", f"worker {worker.number}: {e}") for e in worker.errors]
        report.violations += errors
    report.violations += check(report.history)
    return report


async def left_open(store: str) -> list[str]:
    """Ends the transactions that nodes left open in a database, and returns them.

    There is none as long as each transaction is one statement: it ends by itself, even if its
    node is gone.
    """
    beside = await plain(store)
    schema = Database.parse(store).schema
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(OPEN_SECONDS):
                while await beside.fetch(OPEN, schema):
                    await asyncio.sleep(0.1)
        rows = await beside.fetch(OPEN, schema)
        for row in rows:
            await beside.execute("SELECT pg_terminate_backend($1)", row["pid"])
    finally:
        await beside.close()
    return [", ".join(f"{name} {value}" for name, value in row.items()) for row in rows]


@asynccontextmanager
async def _running(nodes: Sequence[Node | WorkerProcess]) -> AsyncIterator[None]:
    try:
        await asyncio.gather(*(node.start() for node in nodes))
        yield
    finally:
        await asyncio.gather(*(node.kill() for node in nodes))


async def _load(shared: NodesSharedState, plan: Plan, report: Report) -> None:
    """Runs the clients and the faults, and then reads the final state."""
    shared.up.set()
    actors = [Actor(shared, f"c{n}", scripted=True) for n in range(plan.actors)]
    tasks = [asyncio.create_task(actor.work()) for actor in actors]
    chaos = asyncio.create_task(_strike(shared, plan, report))
    violations = report.violations
    try:
        await asyncio.wait({chaos, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in (chaos, *tasks):
            if task.done():
                task.result()
        if not chaos.done():
            raise RuntimeError("a client left early")
        shared.over.set()
        patience = PATIENCE + 3 * report.history.worker_lease
        await bounded("the clients", asyncio.gather(*tasks), violations)
        await bounded("the runs", end_everything(shared), violations, patience)
        await bounded("subscribers", asyncio.gather(*shared.listening), violations)
        await bounded("the observer", _observe(shared), violations)
    finally:
        for task in (chaos, *tasks, *shared.listening):
            task.cancel()
        await asyncio.gather(chaos, *tasks, *shared.listening, return_exceptions=True)


async def _observe(shared: NodesSharedState) -> None:
    """Reads the final state from any node, and the event log from each."""
    await ask_for_everything(shared)
    for node in shared.nodes:
        events, _ = await read_log(node.reached_at, shared.sessions)
        shared.history.final.replays.append(Replay("", events))


async def _strike(shared: NodesSharedState, plan: Plan, report: Report) -> None:
    """Injects the planned faults.

    A fault waits while its node still suffers from another, and while its node is the only
    healthy one: no node could take over then.
    """
    members: list[Node | WorkerProcess] = [*shared.nodes, *shared.workers]
    locks = [asyncio.Lock() for _ in members]
    spared = asyncio.Semaphore(len(shared.nodes) - 1)
    # The workers may all be away.
    spared_workers = asyncio.Semaphore(max(len(shared.workers), 1))
    begun = asyncio.get_running_loop().time()

    async def hit(at: float, planned: PlannedFault) -> None:
        await asyncio.sleep(begun + at - asyncio.get_running_loop().time())
        is_worker = planned.node >= len(shared.nodes)
        async with locks[planned.node], spared_workers if is_worker else spared:
            await _hit(members[planned.node], planned, report)

    hits = [asyncio.create_task(hit(*each)) for each in plan.hits]
    try:
        await asyncio.gather(*hits)
        await asyncio.sleep(begun + plan.seconds - asyncio.get_running_loop().time())
    finally:
        for each in hits:
            each.cancel()
        await asyncio.gather(*hits, return_exceptions=True)
    died = [member.number for member in members if member.has_ended]
    report.violations += [Violation("died", f"node {number} ended by itself") for number in died]


async def _hit(node: Node | WorkerProcess, hit: PlannedFault, report: Report) -> None:
    begun = datetime.now(UTC)
    if node.has_ended:
        report.violations.append(Violation("died", f"node {node.number} ended by itself"))
        await node.start()
    code = await node.suffer(hit)
    if code:
        report.violations.append(Violation("exit", f"node {node.number} left with {code}"))
    fault = Fault(node.number, hit.kind, begun, datetime.now(UTC))
    report.history.faults.append(fault)
