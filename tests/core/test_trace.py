"""W3C Trace Context: parsing `traceparent`, and the span ids derived from a run."""

from __future__ import annotations

import pytest

from runlane_server.core.model import RunKey
from runlane_server.core.trace import (
    RunTrace,
    SpanContext,
    log_fields,
    parse_traceparent,
    traceparent_of,
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SENT = f"00-{TRACE}-{SPAN}-01"
KEY = RunKey("acme", "r1")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (SENT, SpanContext(TRACE, SPAN, sampled=True)),
        (f"00-{TRACE}-{SPAN}-00", SpanContext(TRACE, SPAN, sampled=False)),
        (f"00-{TRACE}-{SPAN}-02", SpanContext(TRACE, SPAN, sampled=False)),
        (f"00-{TRACE}-{SPAN}-ff", SpanContext(TRACE, SPAN, sampled=True)),
        # A later version may append fields.
        (f"cc-{TRACE}-{SPAN}-01", SpanContext(TRACE, SPAN, sampled=True)),
        (f"cc-{TRACE}-{SPAN}-01-more", SpanContext(TRACE, SPAN, sampled=True)),
    ],
)
def test_a_valid_traceparent_is_parsed(text: str, place: SpanContext) -> None:
    assert parse_traceparent(text) == place


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"cc-{TRACE}-{SPAN}-01.more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}0-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"{SENT}\n",
        f" {SENT}",
        f"00-{TRACE[:-1]}\u0665-{SPAN}-01",
    ],
)
def test_a_malformed_traceparent_is_ignored(text: str) -> None:
    assert parse_traceparent(text) is None
    assert traceparent_of({"traceparent": text}) == ""


def test_a_traceparent_is_stored_in_the_form_of_version_00() -> None:
    assert traceparent_of({"x": "y", "traceparent": f"cc-{TRACE}-{SPAN}-ff-more"}) == SENT
    assert traceparent_of({"x": "y"}) == ""
    assert log_fields(SENT) == {"trace_id": TRACE}
    assert log_fields("") == {}


def test_a_run_continues_the_trace_of_its_caller() -> None:
    trace = RunTrace.of(KEY, SENT, 0)
    assert (trace.trace_id, trace.parent, trace.sampled) == (TRACE, SPAN, True)
    assert not RunTrace.of(KEY, f"00-{TRACE}-{SPAN}-00", 1).sampled


def test_span_ids_are_equal_on_every_node_and_unique_per_run_and_name() -> None:
    spans = {
        RunTrace.of(key, sent, 1).span(name)
        for key in (KEY, RunKey("acme", "r2"), RunKey("other", "r1"))
        for sent in (SENT, "")
        for name in ("run", "agent 1", "agent 2")
    }
    assert len(spans) == 18
    assert RunTrace.of(RunKey("acme", "r1"), SENT, 1).span("run") in spans
    assert len({(place.trace_id, place.span_id) for place in spans}) == 18
    assert all(parse_traceparent(str(place)) == place for place in spans)


def test_the_ratio_decides_how_many_runs_without_a_caller_s_trace_are_sampled() -> None:
    def share(ratio: float) -> float:
        keys = [RunKey("acme", f"r{n}") for n in range(2_000)]
        return sum(RunTrace.of(key, "", ratio).sampled for key in keys) / len(keys)

    assert share(0) == 0
    assert share(1) == 1
    assert 0.2 < share(0.25) < 0.3
