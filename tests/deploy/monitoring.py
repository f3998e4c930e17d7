"""The compose file by hand: server, PostgreSQL and a real Prometheus with the files of deploy/.

`make test-monitoring` runs this where `prometheus` is installed. Grafana is in no registry of
packages here, so its queries are put to Prometheus: each one must have data or be known to have
none in a healthy system.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import yaml

from deploy.settings import DEPLOY
from deploy.test_compose import MONITORING, server
from runlane import Client
from support.server import ServerProcess, serving
from support.staging import SECONDS
from telemetry.scrape import url_in

VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "1m", "$__range": "1m"}


def dashboard_queries() -> list[str]:
    """The queries of all panels, for all jobs and nodes."""
    panels = json.loads((DEPLOY / "grafana" / "runlane.json").read_text())["panels"]
    found: list[str] = []
    for panel in panels:
        for target in panel.get("targets", ()):
            query = str(target["expr"])
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            found.append(query)
    return found


IDLE = (
    "runlane_cancels_total",
    "runlane_rpc_refusals_total",
    "runlane_rpcs_open",
    "runlane_workers_quarantined",
    "runlane_worker_quarantines_total",
    "runlane_store_free_bytes",  # of SQLite
)
"""Metrics without a sample where nothing was cancelled or refused, and no worker is there."""


class Prometheus:
    """A Prometheus that listens."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def get(self, path: str, **parameters: str) -> Any:
        """Calls its API; returns the data. Raises HTTPStatusError for a query that is wrong."""
        answer = await self._http.get(f"/api/v1/{path}", params=parameters)
        return answer.raise_for_status().json()["data"]

    async def ready(self) -> None:
        """Waits until it serves."""
        async with asyncio.timeout(SECONDS):
            while True:
                with suppress(httpx2.TransportError):
                    if (await self._http.get("/-/ready")).status_code == 200:
                        return
                await asyncio.sleep(0.2)

    async def until(self, query: str) -> None:
        """Waits until a query has a result."""
        async with asyncio.timeout(SECONDS):
            while not (await self.get("query", query=query))["result"]:
                await asyncio.sleep(0.2)


@asynccontextmanager
async def scraping(folder: Path, running: ServerProcess) -> AsyncIterator[Prometheus]:
    """Prometheus with the configuration of deploy/, but of this server."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [urlsplit(url_in(running.log)).netloc]}]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "prometheus" / "alerts.yaml", folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={address}",
            stdout=log,
            stderr=log,
        )
    try:
        async with httpx2.AsyncClient(base_url=f"http://{address}") as http:
            prometheus = Prometheus(http)
            await prometheus.ready()
            yield prometheus
    finally:
        process.kill()
        await process.wait()


async def run(address: str) -> None:
    """Executes a run."""
    async with Client(address) as client:
        handle = await client.run_accepted("s", "Hello", allow_missing=True)
        await handle.completed(SECONDS)


async def test_prometheus_scrapes_the_server_and_every_query_and_alert_works(
    tmp_path: Path, postgres_url: str
) -> None:
    flags = [each for each in server()["command"] if "listen" not in each]
    env = {"RUNLANE_STORE": postgres_url}
    async with (
        serving(tmp_path, *flags, "--metrics-listen=127.0.0.1:0", env=env) as running,
        scraping(tmp_path, running) as prometheus,
    ):
        await prometheus.until("up == 1")
        await run(running.address)
        # An increase is one of a series that has been scraped before.
        await prometheus.until("sum(runlane_runs_ended_total) > 0")
        await run(running.address)
        await prometheus.until("sum(increase(runlane_runs_ended_total[1m])) > 0")
        queries = dashboard_queries()
        found = [await prometheus.get("query", query=each) for each in queries]
        empty = [each for each, data in zip(queries, found, strict=True) if not data["result"]]
        rules = (await prometheus.get("rules"))["groups"]
        health = [(rule["name"], rule["health"]) for group in rules for rule in group["rules"]]
        firing = (await prometheus.get("alerts"))["alerts"]
    print(f"{len(queries)} queries, {len(empty)} without data; {len(health)} alerts")
    assert [each for each in empty if not any(name in each for name in IDLE)] == []
    assert {state for _, state in health} == {"ok"}
    assert [each for each in firing if each["state"] == "firing"] == []
