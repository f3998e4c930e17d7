"""The compose file agrees with the image, the server and its monitoring."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.settings import DEPLOY, longest_stop, settings, variables
from runlane import Client
from support.server import clean_environment, run_to_exit, serving
from support.staging import SECONDS
from support.wire import Wire

FILE = DEPLOY / "compose.yaml"
MONITORING = DEPLOY / "compose"


def services() -> dict[str, Any]:
    """The services of the compose file."""
    found: dict[str, Any] = yaml.safe_load(FILE.read_text())["services"]
    return found


def server() -> dict[str, Any]:
    """The service of the server."""
    found: dict[str, Any] = services()["server"]
    return found


def mounted(volume: str) -> tuple[str, str]:
    """The source of a volume, and its place in the container."""
    source, target, *_ = volume.split(":")
    return source, target


def test_the_server_gets_valid_settings() -> None:
    config = settings(server()["command"])
    assert set(server()["environment"]) <= variables()
    (published,) = server()["ports"]
    assert published.endswith(f":{config.listen.port}")
    store = server()["environment"]["RUNLANE_STORE"]
    assert re.fullmatch(r"postgresql://runlane:\$\{POSTGRES_PASSWORD\}@database/runlane", store)
    assert services()["database"]["environment"]["POSTGRES_DB"] == "runlane"
    assert not any(flag.startswith("--store") for flag in server()["command"])


def test_every_port_is_published_on_this_machine_only() -> None:
    ports = [port for service in services().values() for port in service.get("ports", ())]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_stop_waits_longer_than_the_longest_shutdown() -> None:
    assert server()["stop_grace_period"] == "120s"
    assert longest_stop(settings(server()["command"])) < 120


def test_the_server_runs_without_privileges_as_the_user_of_the_image() -> None:
    assert server()["read_only"] is True
    assert server()["cap_drop"] == ["ALL"]
    (user,) = re.findall(r"^USER (\d+):\d+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    work = next(it for it in server()["tmpfs"] if it.startswith("/work:"))
    assert f"uid={user}" in work
    assert all("size=" in it for it in server()["tmpfs"])


def test_every_image_has_a_version() -> None:
    for name, service in services().items():
        assert re.search(r":v?\d+", service["image"]), name


def test_every_mounted_file_exists_and_every_volume_is_declared() -> None:
    declared = yaml.safe_load(FILE.read_text())["volumes"]
    for service in services().values():
        for volume in service.get("volumes", ()):
            source, _ = mounted(volume)
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in declared


def test_prometheus_scrapes_the_server_and_has_the_alerts() -> None:
    scraping = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    (job,) = scraping["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    metrics = settings(server()["command"]).metrics_listen
    assert metrics is not None
    assert (found["names"], found["port"]) == (["server"], metrics.port)
    places = dict(mounted(volume) for volume in services()["prometheus"]["volumes"])
    (rules,) = scraping["rule_files"]
    assert places["./prometheus/alerts.yaml"] == f"/etc/prometheus/{rules}"
    assert set(server()["networks"]) & set(services()["prometheus"]["networks"])
    assert set(server()["networks"]) & set(services()["database"]["networks"])


def test_grafana_has_the_data_source_and_the_dashboard() -> None:
    (source,) = yaml.safe_load((MONITORING / "grafana" / "datasource.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((MONITORING / "grafana" / "dashboards.yaml").read_text())[
        "providers"
    ]
    places = dict(mounted(volume) for volume in services()["grafana"]["volumes"])
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert places["./grafana/runlane.json"] == home
    assert Path(home).parent == Path(provider["options"]["path"])


def test_promtool_accepts_the_configuration_and_the_alerts(tmp_path: Path) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed")
    for volume in services()["prometheus"]["volumes"]:
        source, target = mounted(volume)
        if source.startswith("."):
            shutil.copy(DEPLOY / source, tmp_path / Path(target).name)
    checked = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
    rules = sum(len(group["rules"]) for group in groups)
    assert f"{rules} rules found" in checked.stdout


async def test_the_worker_executes_the_runs_of_its_agent(tmp_path: Path) -> None:
    service = services()["worker"]
    (source, target), program = mounted(service["volumes"][0]), service["entrypoint"][-1]
    assert target == program
    assert set(service["networks"]) & set(server()["networks"])
    name, _, _port = service["environment"]["RUNLANE_SERVER"].partition(":")
    assert services()[name] == server()
    flags = [flag for flag in server()["command"] if flag.startswith("--agent=")]
    async with serving(tmp_path, "--store", "memory:", *flags) as running:
        env = {**clean_environment(), **service["environment"], "RUNLANE_SERVER": running.address}
        command = (sys.executable, str(DEPLOY / source))
        worker = await asyncio.create_subprocess_exec(*command, env=env)
        try:
            async with Client(running.address) as client:
                agent = service["environment"]["RUNLANE_AGENT"]
                handle = await client.run_accepted("s", "hello", agent=agent, allow_missing=True)
                assert (await handle.completed(SECONDS)).text.strip() == "HELLO"
        finally:
            worker.terminate()
            await worker.wait()


async def checked_health(folder: Path, address: str) -> tuple[int, str, str]:
    """The health check of the container, of a server at this address."""
    kind, program, *arguments = server()["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "runlane-server")
    ours = [address if it == "127.0.0.1:50051" else it for it in arguments]
    return await asyncio.to_thread(run_to_exit, folder, *ours)


async def test_the_health_check_follows_the_server(tmp_path: Path) -> None:
    flags = ("--store", "memory:", "--agent", "scripted")
    async with serving(tmp_path, *flags) as running, Client(running.address) as client:
        assert await checked_health(tmp_path, running.address) == (0, "SERVING\n", "")
        handle = await Wire(client).start_blocked("s", "gate")
        running.send(signal.SIGTERM)
        async with asyncio.timeout(30):
            while (found := await checked_health(tmp_path, running.address))[0] == 0:
                pass
        assert found == (1, "NOT_SERVING\n", "")
        await handle.cancel()
        assert await running.wait() == 0
        code, out, err = await checked_health(tmp_path, running.address)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"runlane-server: error: health {running.address}: UNAVAILABLE: ")
