"""Scrapes Prometheus metrics endpoints and computes rates and quantiles between two scrapes."""

from __future__ import annotations

import asyncio
import math
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import pairwise

FETCH_SECONDS = 2.0
"""Timeout of an endpoint."""

MAX_LINE = 1_024
"""Maximum length of a line in characters; longer lines are skipped. The parser's time grows with
the square of the length, and Runlane's own lines are far shorter."""

MAX_BYTES = 1 << 20
"""Maximum size of a page; the rest is not read. Runlane's own pages are far smaller."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A value with its labels."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Scrape:
    """The samples of an endpoint at one time, by name.

    `at` is in seconds of this machine's monotonic clock. If the scrape failed, `error` has the
    reason and there are no samples.
    """

    at: float
    samples: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    error: str = ""

    def total(self, name: str, **labels: str) -> float | None:
        """Returns the sum of all series with this name and these labels; None without any."""
        values = [sample.value for sample in self._select(name, labels)]
        return sum(values) if values else None

    def label(self, name: str, label: str) -> str:
        """Returns a label of the first series with this name; empty without one."""
        for sample in self._select(name, {}):
            return sample.labels.get(label, "")
        return ""

    def buckets(self, name: str) -> dict[float, float]:
        """Returns the cumulative counts of a histogram by upper bound, summed over its series."""
        counts: dict[float, float] = {}
        for sample in self._select(f"{name}_bucket", {}):
            try:
                bound = float(sample.labels.get("le", "+Inf"))
            except ValueError:
                continue
            counts[bound] = counts.get(bound, 0.0) + sample.value
        return counts

    def least(self, name: str) -> float | None:
        """The least value of the series of a metric; None without any."""
        return min((sample.value for sample in self._select(name, {})), default=None)

    def _select(self, name: str, labels: Mapping[str, str]) -> list[Sample]:
        series = self.samples.get(name, ())
        return [sample for sample in series if labels.items() <= sample.labels.items()]


def parse(text: str, at: float) -> Scrape:
    """Parses a page in Prometheus' text format; skips lines that are not valid samples."""
    samples: dict[str, list[Sample]] = {}
    for line in text.splitlines():
        if len(line) <= MAX_LINE and not line.startswith("#"):
            for name, sample in _parse_line(line):
                samples.setdefault(name, []).append(sample)
    return Scrape(at, samples)


def _parse_line(line: str) -> Iterator[tuple[str, Sample]]:
    # Not at the top of the module: it takes as long to load as the rest of the command.
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415

    try:
        # The parser gives up at the first invalid line, so it gets one line at a time.
        for family in text_string_to_metric_families(line):
            for sample in family.samples:
                yield sample.name, Sample(sample.labels, float(sample.value))
    except (ValueError, IndexError, OverflowError):
        # A blank label name raises IndexError, an integer too large for a float OverflowError.
        return


async def fetch(url: str) -> Scrape:
    """Scrapes an endpoint. Never raises for a failed scrape; `Scrape.error` has the reason."""
    return await asyncio.to_thread(_scrape, url)


def _scrape(url: str) -> Scrape:
    try:
        # EndpointType has checked the scheme.
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as response:  # noqa: S310
            page: bytes = response.read(MAX_BYTES)
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return Scrape(time.monotonic(), error=str(getattr(reason, "strerror", None) or reason))
    at = time.monotonic()
    return parse(page.decode(errors="replace"), at)


def rate(before: Scrape, now: Scrape, name: str, **labels: str) -> float | None:
    """Returns the increase of a counter per second between two scrapes; None if unknown."""
    value = now.total(name, **labels)
    seconds = now.at - before.at
    if before.error or now.error or seconds <= 0:
        return None
    return max(0.0, _increase(before.total(name, **labels) or 0.0, value or 0.0)) / seconds


def quantile(before: Scrape, now: Scrape, name: str, share: float) -> float | None:
    """Estimates a quantile of the observations between two scrapes from the histogram's buckets.

    `share` is from 0 to 1. Returns None without observations.
    """
    earlier, later = before.buckets(name), now.buckets(name)
    counts = [(bound, _increase(earlier.get(bound, 0.0), later[bound])) for bound in sorted(later)]
    if before.error or not counts or counts[-1][1] <= 0:
        return None
    rank = share * counts[-1][1]
    for (low, below), (high, up_to) in pairwise([(0.0, 0.0), *counts]):
        if up_to >= rank and up_to > below:
            # The last bucket has no upper bound; its lower bound is the best estimate.
            if math.isinf(high):
                return low
            return low + (high - low) * (rank - below) / (up_to - below)
    return None


def _increase(before: float, now: float) -> float:
    """Returns the increase of a counter, which restarts from 0 with its server."""
    return now - before if now >= before else now
