"""Checks several nodes over one database, by the records of the agents themselves."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from proofs.crash.faults import GAVE_UP, LOSING, NODES, PAUSES, FaultKind
from proofs.crash.history import AttemptRecord, Fault, History, Rule
from proofs.crash.worked import attempts_of
from runlane import Run, Started

LATE = 10.0
"""Seconds after the lease in which the runs of a lost node end or are started again."""

NOTICE = 1.5
"""Seconds after a pause in which a node notices that it lost its lease, and stops its agents."""

AFTER = 5.0
"""Seconds beyond two leases in which a fault still has effects: reconnecting takes time."""

NOTICED = 30.0
"""Seconds after which a node has noticed that a worker is silent (`rpc.endpoint.OPTIONS`)."""

UNAWARE = 25.0
"""Seconds in which a worker without a fault of its own learns that its attempt is over: it notices
a node that vanished, and connects to another one."""


def _begun_twice(history: History) -> Iterator[str]:
    """Each attempt of a run is executed once, on one node."""
    count = Counter((work.run_id, work.attempt) for work in history.attempts)
    for (run_id, attempt), times in count.items():
        if times > 1:
            nodes = sorted(w.node for w in history.attempts if w.run_id == run_id)
            yield f"attempt {attempt} of {run_id} was begun {times} times, on nodes {nodes}"


def _unrecorded(history: History) -> Iterator[str]:
    """Every executed attempt is among the events of its run, in order."""
    started = {run_id: _starts(history, run_id) for run_id in history.final.runs}
    for run_id, starts in started.items():
        if [attempt for attempt, _ in starts] != list(range(1, len(starts) + 1)):
            yield f"the attempts of {run_id} are {[attempt for attempt, _ in starts]}"
    for work in history.attempts:
        run = history.final.runs.get(work.run_id)
        at = dict(started.get(work.run_id, [])).get(work.attempt)
        name = f"attempt {work.attempt} of {work.run_id}"
        if run is None or run.session_id != work.session_id:
            yield f"{name} was worked on, in {work.session_id}, which has no such run"
        elif at is None or run.attempt < work.attempt:
            yield f"{name} was worked on, and is not in its events"
        elif work.begun < at:
            yield f"{name} was worked on before it was started"


def _at_once(history: History) -> Iterator[str]:
    """Two agents never work in one session at the same time, on any nodes (R7, R9).

    A node that was stopped cannot know that it lost its lease; it has to notice soon after.
    """
    by_session: defaultdict[str, list[AttemptRecord]] = defaultdict(list)
    for work in history.attempts:
        if not work.stubborn:
            by_session[work.session_id].append(_until_end(work, history))
    for session_id, works in by_session.items():
        works.sort(key=lambda work: work.begun)
        for earlier, later in itertools.pairwise(works):
            if earlier.ended is None or later.begun < earlier.ended:
                lost = _stood_still(earlier, later.begun, history)
                if lost or _stood_still(later, later.begun, history, NOTICE):
                    continue
                workers = filter(_is_of_worker, (earlier, later))
                if any(_did_not_know(work, later.begun, history) for work in workers):
                    continue
                yield (
                    f"in {session_id} attempt {later.attempt} of {later.run_id} was begun on node "
                    f"{later.node} at {later.begun}, while attempt {earlier.attempt} of "
                    f"{earlier.run_id} was worked on, on node {earlier.node} until {earlier.ended}"
                )


def _is_of_worker(work: AttemptRecord) -> bool:
    return work.node >= NODES


def _did_not_know(work: AttemptRecord, until: datetime, history: History) -> bool:
    """Whether a worker may not have known yet that its attempt was over, or got its turn late,
    because a fault of its own or of a node had broken its connection."""
    effects = timedelta(seconds=2 * history.lease + AFTER)
    broken = [
        fault
        for fault in history.faults
        if (fault.node == work.node or fault.node < NODES)
        and fault.begun <= until
        and fault.ended + effects >= work.begun
    ]
    if not broken or work.ended is None:
        return bool(broken)
    aware, since = timedelta(0), until
    for fault in sorted(history.faults, key=lambda fault: fault.begun):
        if fault.node == work.node and fault.ended > since:
            aware += max(min(fault.begun, work.ended) - since, timedelta(0))
            since = fault.ended
    aware += max(work.ended - since, timedelta(0))
    return aware <= timedelta(seconds=UNAWARE)


def _until_end(work: AttemptRecord, history: History) -> AttemptRecord:
    """The end of an agent: at the latest that of its node."""
    if work.ended is not None:
        return work
    ends = [
        fault.ended if fault.kind is FaultKind.DRAIN else fault.begun
        for fault in history.faults
        if fault.node == work.node
        and fault.kind in {FaultKind.KILL, FaultKind.DRAIN, FaultKind.VANISH}
        and fault.ended >= work.begun
    ]
    return replace(work, ended=min(ends, default=None))


def _stood_still(
    work: AttemptRecord, until: datetime, history: History, before: float = 0.0
) -> bool:
    """Whether a node was stopped when it lost its work, and has run for only a short time since.

    It may have been stopped again at once; or have been stopped until `before` seconds before the
    work, when it was about to start it.
    """
    pauses = [f for f in history.faults if f.node == work.node and f.kind in PAUSES]
    pauses.sort(key=lambda fault: fault.begun)
    begun = work.begun - timedelta(seconds=before)
    during = [f for f in pauses if begun <= f.ended and f.begun <= until]
    if not during or work.ended is None:
        return False
    since = during[-1].ended
    awake = work.ended - since
    for pause in pauses:
        if since <= pause.begun < work.ended:
            awake -= min(pause.ended, work.ended) - pause.begun
    return awake <= timedelta(seconds=NOTICE)


def _uncaused(history: History) -> Iterator[str]:
    """A run is started again only after a fault of its node, or of its worker (R36)."""
    worked = {(work.run_id, work.attempt): work for work in history.attempts}
    for run_id in history.final.runs:
        for (lost, begun), (_, at) in itertools.pairwise(_starts(history, run_id)):
            work = worked.get((run_id, lost))
            if not any(_may_have_lost(fault, work, begun, at, history) for fault in history.faults):
                node = "a node" if work is None else f"node {work.node}"
                yield f"attempt {lost} of {run_id} was lost at {at}; nothing happened to {node}"


def _may_have_lost(
    fault: Fault, work: AttemptRecord | None, begun: datetime, at: datetime, history: History
) -> bool:
    seconds = 2 * history.lease + AFTER
    same = work is None or work.node == fault.node
    if work is not None and _is_of_worker(work):
        if same:
            seconds = NOTICED + history.worker_lease + AFTER
        # A node may be lost before it knows that the worker has begun.
        same = same or not _has_output(work, history)
    return same and fault.begun <= at and fault.ended + timedelta(seconds=seconds) >= begun


def _has_output(work: AttemptRecord, history: History) -> bool:
    attempts = dict(attempts_of(history.final.events.get(work.run_id, [])))
    return bool(attempts.get(work.attempt))


def near(fault: Fault, history: History) -> bool:
    """Whether another fault of the same node may have caused a fault."""
    effects = timedelta(seconds=2 * history.lease + AFTER)
    return any(
        other.node == fault.node and other.begun <= fault.ended <= other.ended + effects
        for other in history.faults
        if other.kind != GAVE_UP
    )


def _late(history: History) -> Iterator[str]:
    """The runs of a lost node end, or are started again, soon (R21, R24).

    Only the time counts in which another node was able to take over.
    """
    for fault, run, seconds in recoveries(history):
        limit = history.lease + LATE
        if fault.node >= NODES:
            # If its node is lost too, the lease of the worker begins again on another one.
            limit = 2 * history.worker_lease + LATE
        if seconds <= limit:
            continue
        end = fault.begun + timedelta(seconds=seconds)
        if seconds - _alone(fault, end, history) > limit:
            yield f"{run.run_id} stood still for {seconds:.1f} s after the {fault.kind} of its node"


def _alone(fault: Fault, end: datetime, history: History) -> float:
    """Seconds in which all other nodes had a fault too, so that none could take over."""
    lease = timedelta(seconds=history.lease)
    others = [f for f in history.faults if f.node != fault.node and f.node < NODES]
    nodes = {f.node for f in others}
    edges = [edge for f in others for edge in (f.begun, f.ended + lease)]
    edges = sorted({fault.begun, end, *(edge for edge in edges if fault.begun < edge < end)})
    alone = 0.0
    for begin, until in itertools.pairwise(edges):
        hit = {f.node for f in others if f.begun <= begin and until <= f.ended + lease}
        if len(nodes) > 1 and hit == nodes:
            alone += (until - begin).total_seconds()
    return alone


def recoveries(history: History) -> Iterator[tuple[Fault, Run, float]]:
    """For each run that lost its node: the seconds until it ended or was started again."""
    for work in history.attempts:
        run = history.final.runs.get(work.run_id)
        if run is None:
            continue
        for fault in history.faults:
            if not _was_lost(work, fault, history):
                continue
            ends = [at for attempt, at in _starts(history, run.run_id) if attempt > work.attempt]
            if (complete := run.run_complete) is not None:
                ends.append(complete.ended_at)
            if after := [at for at in ends if at > fault.begun]:
                yield fault, run, (min(after) - fault.begun).total_seconds()


def _was_lost(work: AttemptRecord, fault: Fault, history: History) -> bool:
    if fault.node != work.node or fault.kind not in LOSING:
        return False
    if _is_of_worker(work) and fault.kind is not FaultKind.KILL:
        return False  # the connection may outlast it
    if fault.kind in {FaultKind.KILL, FaultKind.VANISH}:
        return work.ended is None and _until_end(work, history).ended == fault.begun
    return work.begun < fault.begun and (work.ended is None or work.ended > fault.begun)


def _starts(history: History, run_id: str) -> list[tuple[int, datetime]]:
    events = history.final.events.get(run_id, [])
    return [(e.body.attempt, e.time) for e in events if isinstance(e.body, Started)]


RULES: Mapping[str, Rule] = {
    "begun twice": _begun_twice,
    "unrecorded": _unrecorded,
    "at once": _at_once,
    "uncaused": _uncaused,
    "late": _late,
}
