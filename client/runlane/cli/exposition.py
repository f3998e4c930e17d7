"""What a server tells Prometheus, read by a person's command: samples, rates and quantiles."""

from __future__ import annotations

import asyncio
import math
import re
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import pairwise

FETCH_SECONDS = 2.0
"""How long an endpoint has to answer."""

MAX_LINE = 4_096
"""Characters; no server of ours says more in a line, and one that is none is left out quickly."""

MAX_BYTES = 4 << 20
"""More than that no server of ours says; what is behind it is not read."""

_SAMPLE = re.compile(
    r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?"
)
_LABEL = re.compile(r'(?<!\w)(?P<name>\w++)="(?P<value>(?:[^"\\]|\\.)*+)"')
_ESCAPES = {"\\n": "\n", '\\"': '"', "\\\\": "\\"}


@dataclass(frozen=True, slots=True)
class Sample:
    """A value with its labels."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Scrape:
    """All that an endpoint told at one instant; `at` is in seconds of this machine's own clock.

    Where it told nothing, `error` says why.
    """

    at: float
    samples: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    error: str = ""

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over all series of that name with at least those labels; None without any."""
        values = [s.value for s in self._of(name, labels)]
        return sum(values) if values else None

    def label(self, name: str, label: str) -> str:
        """A label of the first series of that name; empty where there is none."""
        for sample in self._of(name, {}):
            return sample.labels.get(label, "")
        return ""

    def buckets(self, name: str) -> dict[float, float]:
        """How many values of a histogram were up to each bound, over all its series."""
        found: dict[float, float] = {}
        for sample in self._of(f"{name}_bucket", {}):
            try:
                bound = float(sample.labels.get("le", "+Inf"))
            except ValueError:
                continue
            found[bound] = found.get(bound, 0.0) + sample.value
        return found

    def _of(self, name: str, labels: Mapping[str, str]) -> list[Sample]:
        found = self.samples.get(name, ())
        return [sample for sample in found if labels.items() <= sample.labels.items()]


def parse(text: str, at: float) -> Scrape:
    """What is in a page of the text format; lines that are none of it are left out."""
    samples: dict[str, list[Sample]] = {}
    for line in text.splitlines():
        if len(line) > MAX_LINE:
            continue
        found = _SAMPLE.fullmatch(line.strip())
        if line.startswith("#") or found is None:
            continue
        try:
            value = float(found["value"])
        except ValueError:
            continue
        labels = {
            label["name"]: re.sub(r"\\.", lambda seen: _unescaped(seen[0]), label["value"])
            for label in _LABEL.finditer(found["labels"] or "")
        }
        samples.setdefault(found["name"], []).append(Sample(labels, value))
    return Scrape(at, samples)


def _unescaped(escape: str) -> str:
    return _ESCAPES.get(escape, escape)


async def fetch(url: str) -> Scrape:
    """Scrapes an endpoint. What goes wrong is part of what it returns."""
    try:
        text = await asyncio.to_thread(_get, url)
    except (OSError, HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or error
        return Scrape(time.monotonic(), error=str(getattr(why, "strerror", None) or why))
    return parse(text, time.monotonic())


def _get(url: str) -> str:
    # The scheme is checked where the address is given.
    with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as response:  # noqa: S310
        data: bytes = response.read(MAX_BYTES)
        return data.decode(errors="replace")


def rate(before: Scrape, now: Scrape, name: str, **labels: str) -> float | None:
    """How many a second, between two scrapes; a counter that fell began anew. None if unknown."""
    value = now.total(name, **labels)
    seconds = now.at - before.at
    if before.error or now.error or seconds <= 0:
        return None
    return max(0.0, _grown(before.total(name, **labels) or 0.0, value or 0.0)) / seconds


def quantile(before: Scrape, now: Scrape, name: str, share: float) -> float | None:
    """The value that this share of what was observed in between lies below, as far as the bounds
    of the histogram tell; None where nothing was observed."""
    earlier, later = before.buckets(name), now.buckets(name)
    grown = [(bound, _grown(earlier.get(bound, 0.0), later[bound])) for bound in sorted(later)]
    if before.error or not grown or grown[-1][1] <= 0:
        return None
    wanted = share * grown[-1][1]
    for (low, below), (high, upto) in pairwise([(0.0, 0.0), *grown]):
        if upto >= wanted and upto > below:
            # Above the last bound nothing is known but that.
            return (
                low if math.isinf(high) else low + (high - low) * (wanted - below) / (upto - below)
            )
    return None


def _grown(before: float, now: float) -> float:
    return now - before if now >= before else now
