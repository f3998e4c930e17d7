"""Scrapes metrics as Prometheus does."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from support.staging import SECONDS


class Page:
    """The metrics of a server at one moment."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self.samples = [sample for family in families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float | None:
        """The value of the first sample with at least these labels; None if there is none."""
        for sample in self.samples:
            if sample.name == f"runlane_{name}" and labels.items() <= sample.labels.items():
                return sample.value
        return None

    def labels(self, name: str) -> Mapping[str, str]:
        """The labels of the only sample of that name."""
        (found,) = [sample for sample in self.samples if sample.name == f"runlane_{name}"]
        return found.labels


def url_in(log: str) -> str:
    """The URL of the metrics in the JSON log of a server."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    (url,) = [line["url"] for line in lines if line["event"] == "metrics served"]
    return str(url)


async def scrape(url: str) -> Page:
    """Scrapes once."""

    def get() -> str:
        with urllib.request.urlopen(url, timeout=SECONDS) as response:  # noqa: S310 - our own
            assert response.headers["Content-Type"].startswith("text/plain")
            text: str = response.read().decode()
            return text

    return Page(await asyncio.to_thread(get))
