"""The trace of a run, in the terms of W3C Trace Context (https://www.w3.org/TR/trace-context/).

A caller sends the context of its span as `traceparent`. It is stored with the run, because the run
may become active much later and on another node. The span ids of a run are derived from the run:
every node that exports one of its spans names the same parent, without asking another node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from runlane_server.core.model import RunKey

HEADER = "traceparent"
"""The metadata key of a call, and the header of a request, that carries a span context."""

_FORM = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_SAMPLED = 0x01


class SpanContext(NamedTuple):
    """A span of a trace: 32 and 16 hexadecimal digits, and whether the trace is to be exported."""

    trace_id: str
    span_id: str
    sampled: bool

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def parse_traceparent(text: str) -> SpanContext | None:
    """Parses a `traceparent`; None if it is malformed: that is no error, a new trace begins."""
    found = _FORM.fullmatch(text)
    if found is None:
        return None
    version, trace_id, span_id, flags = found.groups()
    if version == "00" and len(text) != len("00--") + 32 + 16 + 3:
        return None
    if not (trace_id.strip("0") and span_id.strip("0")):
        return None
    return SpanContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def traceparent_of(metadata: Mapping[str, str]) -> str:
    """The `traceparent` in the metadata of a call, in the form stored with a run; empty if none."""
    sent = metadata.get(HEADER)
    return str(parse_traceparent(sent) or "") if sent else ""


def log_fields(trace: str) -> dict[str, str]:
    """The log fields for a `traceparent`: the trace id, or nothing if there is no trace."""
    context = parse_traceparent(trace) if trace else None
    return {} if context is None else {"trace_id": context.trace_id}


class RunTrace(NamedTuple):
    """The trace of a run. `parent` is the id of the caller's span, empty if the run begins the
    trace; the span ids of the run are derived from `seed`."""

    trace_id: str
    parent: str
    sampled: bool
    seed: int

    @classmethod
    def of(cls, key: RunKey, trace: str, ratio: float) -> RunTrace:
        """The trace of a run with the caller's `traceparent`, which may be empty.

        The caller decides whether it is exported. Without a caller's trace, `ratio` is the fraction
        of runs to export, from 0 to 1.
        """
        digest = _digest("\0".join(key), 24)
        seed = int(digest[32:], 16)
        if (context := parse_traceparent(trace) if trace else None) is not None:
            return cls(context.trace_id, context.span_id, context.sampled, seed)
        trace_id = digest[:32]
        # Other systems sample by the same bits, so they decide alike.
        sampled = ratio >= 1 or int(trace_id[16:], 16) < ratio * (1 << 64)
        return cls(trace_id, "", sampled, seed)

    def span(self, name: str) -> SpanContext:
        """The context of the run's span with that name; names are unique within a run."""
        return SpanContext(self.trace_id, f"{self.seed ^ _salt(name):016x}", self.sampled)


@lru_cache(maxsize=1024)
def _salt(name: str) -> int:
    return int(_digest(name, 8), 16)


def _digest(text: str, size: int) -> str:
    return blake2b(text.encode(), digest_size=size).hexdigest()
