"""Tells of runs as traces: when a run is accepted, waits, is active, and when its end is written.

    accept            the call, from its arrival to its answer
    ├── commit        until the run was durable
    └── run           from there to its end, however long that takes and on whichever nodes
        ├── wait      until it became active
        └── active    an attempt; one that went to another node is told of by the one that had it
            ├── agent     until its agent had returned
            └── commit    until its end was durable

A span is made when it is over, so nothing is held open, and a server that is killed leaves no span
that never ends: it leaves some out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from runlane_server.core.model import Micros, RunComplete, RunKey, RunState, SessionKey
from runlane_server.core.observer import Observer
from runlane_server.core.trace import RunTrace, SpanContext
from runlane_server.core.transition import LaneRun, Transition

Attributes: TypeAlias = Mapping[str, str | int]

NO_ATTRIBUTES: Final[Attributes] = MappingProxyType({})

ACCEPT: Final = "accept"
RUN: Final = "run"


class Span(NamedTuple):
    """Something that took a while. `parent` is the id of a span, empty for none; `error` is why it
    failed, empty if it did not. `remote_parent`: that span is of the caller.

    Only those have attributes that are looked for: the others are found by their trace.
    """

    name: str
    place: SpanContext
    parent: str
    begin: Micros
    end: Micros
    attributes: Attributes = NO_ATTRIBUTES
    error: str = ""
    remote_parent: bool = False


@dataclass(slots=True)
class _Attempt:
    """An attempt that is at work here."""

    number: int
    trace: RunTrace
    started_at: Micros
    returned_at: Micros | None = None
    ended_at: Micros | None = None

    def span(self, name: str) -> SpanContext:
        """Its span of that name."""
        return _span_of_attempt(self.trace, name, self.number)


class Tracer(Observer):
    """Makes spans of what a node does.

    `export` takes the spans. `ratio` is the share of the runs that are exported whose caller is in
    no trace, from 0 to 1; with `content` spans say why a run failed, in the words of its agent.
    """

    __slots__ = ("_at_work", "_content", "_export", "_now", "_ratio")

    def __init__(
        self,
        export: Callable[[Span], None],
        *,
        ratio: float,
        now: Callable[[], Micros],
        content: bool = False,
    ) -> None:
        self._export = export
        self._ratio = ratio
        self._now = now
        self._content = content
        self._at_work: dict[RunKey, _Attempt] = {}

    def on_accepted(self, key: RunKey, run: LaneRun, called_at: Micros) -> None:
        """A new run is durable: tells of the accept, and of its commit."""
        trace = self._trace(key, run)
        if not trace.sampled:
            return
        now, about = self._now(), _about(key)
        accept, commit = trace.span(ACCEPT), trace.span("accept commit")
        self._export(Span(ACCEPT, accept, trace.parent, called_at, now, about, remote_parent=True))
        self._export(Span("commit", commit, accept.span_id, run.accepted_at, now))

    def on_attempt_started(self, key: RunKey, run: LaneRun) -> None:
        """An attempt became active here: tells how long it has waited, if it is the first."""
        trace = self._trace(key, run)
        if not trace.sampled or run.started_at is None:
            return
        self._at_work[key] = _Attempt(run.attempt, trace, run.started_at)
        if run.attempt == 1:
            wait, parent = trace.span("wait"), trace.span(RUN).span_id
            times = run.accepted_at, run.started_at
            self._export(Span("wait", wait, parent, *times))

    def on_agent_returned(self, key: RunKey) -> None:
        """Its agent is at its end."""
        attempt = self._at_work.get(key)
        if attempt is not None and attempt.returned_at is None:
            attempt.returned_at = self._now()

    def on_lane_changed(self, key: SessionKey, made: Transition) -> None:
        """Tells of the runs that ended."""
        for change in made.runs:
            if change.complete is not None:
                self._ended(RunKey(key.tenant, change.run.run_id), change.run, change.complete)

    def on_attempt_ended(self, key: RunKey) -> None:
        """The attempt that was active here is not any more: tells of it."""
        attempt = self._at_work.pop(key, None)
        if attempt is None:
            return
        told = {**_about(key), "runlane.attempt": attempt.number}
        ended_at = attempt.ended_at or self._now()
        returned_at = attempt.returned_at or ended_at
        active, run = attempt.span("active"), attempt.trace.span(RUN)
        self._export(Span("active", active, run.span_id, attempt.started_at, ended_at, told))
        agent, times = attempt.span("agent"), (attempt.started_at, returned_at)
        self._export(Span("agent", agent, active.span_id, *times))
        if attempt.ended_at is not None:
            commit, times = attempt.span("commit"), (returned_at, ended_at)
            self._export(Span("commit", commit, active.span_id, *times))

    def agent_traceparent(self, key: RunKey, run: LaneRun) -> str:
        """The span of the agent, whose children are what it asks others for."""
        return str(_span_of_attempt(self._trace(key, run), "agent", run.attempt))

    def _ended(self, key: RunKey, run: LaneRun, complete: RunComplete) -> None:
        now = self._now()
        attempt = self._at_work.get(key)
        if attempt is not None:
            attempt.ended_at = now
        trace = self._trace(key, run)
        if not trace.sampled:
            return
        told = {
            **_about(key),
            "runlane.session_id": complete.session_id,
            "runlane.state": complete.state.value,
            "runlane.finish_reason": complete.finish_reason.value,
            "runlane.attempts": run.attempt,
        }
        place, parent = trace.span(RUN), trace.span(ACCEPT).span_id
        self._export(Span(RUN, place, parent, run.accepted_at, now, told, self._why(complete)))

    def _why(self, complete: RunComplete) -> str:
        """Why a run failed: what an agent says of it may be made of what it was told."""
        if complete.state is not RunState.FAILED:
            return ""
        error = complete.error
        if error is None:
            return complete.finish_reason.value
        return f"{error.reason}: {error.message}" if self._content else error.reason

    def _trace(self, key: RunKey, run: LaneRun) -> RunTrace:
        return RunTrace.of(key, run.trace, self._ratio)


def _about(key: RunKey) -> Attributes:
    return {"runlane.tenant": key.tenant, "runlane.run_id": key.run_id}


def _span_of_attempt(trace: RunTrace, name: str, number: int) -> SpanContext:
    return trace.span(f"{name} {number}")
