"""Where in a trace a run is, in the terms of W3C Trace Context (https://www.w3.org/TR/trace-context/).

A caller sends its place along as `traceparent`. It is kept with the run, since the run may become
active long after, on another node. The spans of a run have ids that follow from the run: whichever
node tells of one names the same parent, and no node has to ask another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from runlane_server.core.model import RunKey

HEADER = "traceparent"
"""The metadata of a call, and the header of a request, that has a place."""

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
    """The place that a `traceparent` names; None where it is none, which is no error: the trace
    begins anew then."""
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
    """The place that the metadata of a call has, as it is kept with a run; empty without one."""
    sent = metadata.get(HEADER)
    return str(parse_traceparent(sent) or "") if sent else ""


def log_fields(trace: str) -> dict[str, str]:
    """What the log says of a place: the id of its trace, and nothing where there is none."""
    place = parse_traceparent(trace) if trace else None
    return {} if place is None else {"trace_id": place.trace_id}


class RunTrace(NamedTuple):
    """The trace of a run. `parent` is the caller's span, empty if the run begins the trace; the
    spans of the run get their ids from `seed`."""

    trace_id: str
    parent: str
    sampled: bool
    seed: int

    @classmethod
    def of(cls, key: RunKey, trace: str, ratio: float) -> RunTrace:
        """The trace of a run whose caller was at a place, or nowhere (empty).

        The caller decides whether it is exported; where there is none, that share of the runs is.
        """
        digest = _digest("\0".join(key), 24)
        seed = int(digest[32:], 16)
        if (place := parse_traceparent(trace) if trace else None) is not None:
            return cls(place.trace_id, place.span_id, place.sampled, seed)
        trace_id = digest[:32]
        # Other parties sample by the same bits, so they come to the same end.
        sampled = ratio >= 1 or int(trace_id[16:], 16) < ratio * (1 << 64)
        return cls(trace_id, "", sampled, seed)

    def span(self, name: str) -> SpanContext:
        """The span of that name; the names of a run's spans are its own."""
        return SpanContext(self.trace_id, f"{self.seed ^ _salt(name):016x}", self.sampled)


@lru_cache(maxsize=1024)
def _salt(name: str) -> int:
    return int(_digest(name, 8), 16)


def _digest(text: str, size: int) -> str:
    return blake2b(text.encode(), digest_size=size).hexdigest()
