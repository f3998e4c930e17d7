"""Makes a trace of each run.

    accept            the call, from its arrival to its answer
    ├── commit        until the run is durable
    └── run           from its acceptance to its end, on any nodes
        ├── wait      until it is active
        └── active    one attempt, exported by the node that executed it
            ├── agent     until its agent returns
            └── commit    until its end is durable

A span is made when it has ended, so none is held open. A server that is killed leaves no span
without an end; it omits some.
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
    """A finished span.

    `parent` is the id of the parent span, empty for none; `remote_parent` says that it is the
    caller's. `error` is the reason of a failure, empty for none. Only spans that people search for
    have attributes; the others are found through their trace.
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
    """An attempt that is active on this node."""

    number: int
    trace: RunTrace
    started_at: Micros
    returned_at: Micros | None = None
    ended_at: Micros | None = None

    def span(self, name: str) -> SpanContext:
        """Its span of this name."""
        return _span_of_attempt(self.trace, name, self.number)


class Tracer(Observer):
    """Makes spans from the events of a node.

    `export` receives the spans. `ratio` is the fraction, from 0 to 1, of runs to trace when the
    caller sends no traceparent. With `content` the span of a failed run has the agent's message.
    """

    __slots__ = ("_attempts", "_content", "_export", "_now", "_ratio")

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
        self._attempts: dict[RunKey, _Attempt] = {}

    def on_accepted(self, key: RunKey, run: LaneRun, called_at: Micros) -> None:
        """A new run is durable: exports the accept and its commit."""
        trace = self._trace(key, run)
        if not trace.sampled:
            return
        now, attributes = self._now(), _attributes(key)
        accept, commit = trace.span(ACCEPT), trace.span("accept commit")
        self._export(
            Span(ACCEPT, accept, trace.parent, called_at, now, attributes, remote_parent=True)
        )
        self._export(Span("commit", commit, accept.span_id, run.accepted_at, now))

    def on_attempt_started(self, key: RunKey, run: LaneRun) -> None:
        """An attempt became active on this node: exports the wait before the first attempt."""
        trace = self._trace(key, run)
        if not trace.sampled or run.started_at is None:
            return
        self._attempts[key] = _Attempt(run.attempt, trace, run.started_at)
        if run.attempt == 1:
            wait, parent = trace.span("wait"), trace.span(RUN).span_id
            times = run.accepted_at, run.started_at
            self._export(Span("wait", wait, parent, *times))

    def on_agent_returned(self, key: RunKey) -> None:
        """The agent of the attempt has returned."""
        attempt = self._attempts.get(key)
        if attempt is not None and attempt.returned_at is None:
            attempt.returned_at = self._now()

    def on_lane_changed(self, key: SessionKey, made: Transition) -> None:
        """Exports the runs that ended."""
        for change in made.runs:
            if change.complete is not None:
                self._ended(RunKey(key.tenant, change.run.run_id), change.run, change.complete)

    def on_attempt_ended(self, key: RunKey) -> None:
        """The attempt is no longer active on this node: exports it."""
        attempt = self._attempts.pop(key, None)
        if attempt is None:
            return
        attributes = {**_attributes(key), "runlane.attempt": attempt.number}
        ended_at = attempt.ended_at or self._now()
        returned_at = attempt.returned_at or ended_at
        active, run = attempt.span("active"), attempt.trace.span(RUN)
        self._export(Span("active", active, run.span_id, attempt.started_at, ended_at, attributes))
        agent, times = attempt.span("agent"), (attempt.started_at, returned_at)
        self._export(Span("agent", agent, active.span_id, *times))
        if attempt.ended_at is not None:
            commit, times = attempt.span("commit"), (returned_at, ended_at)
            self._export(Span("commit", commit, active.span_id, *times))

    def agent_traceparent(self, key: RunKey, run: LaneRun) -> str:
        """The span of the agent, as the parent of the agent's own requests."""
        return str(_span_of_attempt(self._trace(key, run), "agent", run.attempt))

    def _ended(self, key: RunKey, run: LaneRun, complete: RunComplete) -> None:
        now = self._now()
        attempt = self._attempts.get(key)
        if attempt is not None:
            attempt.ended_at = now
        trace = self._trace(key, run)
        if not trace.sampled:
            return
        attributes = {
            **_attributes(key),
            "runlane.session_id": complete.session_id,
            "runlane.state": complete.state.value,
            "runlane.finish_reason": complete.finish_reason.value,
            "runlane.attempts": run.attempt,
        }
        place, parent = trace.span(RUN), trace.span(ACCEPT).span_id
        self._export(
            Span(RUN, place, parent, run.accepted_at, now, attributes, self._error(complete))
        )

    def _error(self, complete: RunComplete) -> str:
        """The reason of a failure; with `content` also the message, which may quote the prompt."""
        if complete.state is not RunState.FAILED:
            return ""
        error = complete.error
        if error is None:
            return complete.finish_reason.value
        return f"{error.reason}: {error.message}" if self._content else error.reason

    def _trace(self, key: RunKey, run: LaneRun) -> RunTrace:
        return RunTrace.of(key, run.trace, self._ratio)


def _attributes(key: RunKey) -> Attributes:
    return {"runlane.tenant": key.tenant, "runlane.run_id": key.run_id}


def _span_of_attempt(trace: RunTrace, name: str, number: int) -> SpanContext:
    return trace.span(f"{name} {number}")
