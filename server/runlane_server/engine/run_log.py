"""The log lines of a run: accepted, started, ended; one short line each, without content.

A line costs about 5 microseconds.
"""

from __future__ import annotations

import re

import structlog

from runlane_server.core.model import RunComplete, SessionKey
from runlane_server.core.trace import log_fields
from runlane_server.core.transition import LaneRun, RunChange, Transition

log = structlog.get_logger()

MAX_LINES = 20
"""Ends that one transition logs one by one. A cancel may end thousands of waiting runs."""

_WORD = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_CLASS = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w{0,63}(?:Error|Exception|Exit|Interrupt)(?=:|$)")


def log_accepted(session_id: str, run: LaneRun) -> None:
    """Logs a run that is durable."""
    log.info("run accepted", session_id=session_id, run_id=run.run_id, accept_seq=run.accept_seq)


def log_ends(key: SessionKey, transition: Transition) -> None:
    """Logs the runs that a committed transition ended."""
    ended = [change for change in transition.runs if change.complete is not None]
    for change in ended[:MAX_LINES]:
        log.info("run ended", session_id=key.session_id, **_end_of(change))
    if len(ended) > MAX_LINES:
        log.info("more runs ended", session_id=key.session_id, count=len(ended) - MAX_LINES)


def _end_of(change: RunChange) -> dict[str, object]:
    run, complete = change.run, change.complete
    assert complete is not None  # noqa: S101 - `log_ends` selects these
    fields: dict[str, object] = {
        "run_id": run.run_id,
        "state": complete.state,
        "finish_reason": complete.finish_reason,
        **_failure_of(complete),
        **log_fields(run.trace),
    }
    if run.started_at is not None:
        fields["seconds"] = round((complete.ended_at - run.started_at) / 1e6, 3)
    return fields


def _failure_of(complete: RunComplete) -> dict[str, str]:
    """The reason, and the class of the message; the message itself may quote the prompt."""
    error = complete.error
    if error is None:
        return {}
    reason = error.reason if _WORD.fullmatch(error.reason) else "AGENT_ERROR"
    kind = _CLASS.match(error.message)
    return {"error": reason, "error_class": kind[0]} if kind else {"error": reason}
