"""The manifests agree with each other and with the server."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.health import NOT_SERVING, SERVING, health, wait_for_health
from deploy.settings import DEPLOY, longest_stop, settings, variables
from runlane import Client
from runlane_server.access import editing
from runlane_server.access.caller import Role
from runlane_server.net.addresses import Address
from support.server import clean_environment, serving
from support.wire import Wire

FOLDER = DEPLOY / "kubernetes"
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def manifest(name: str) -> dict[str, Any]:
    """The content of a manifest."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return found


def pod() -> dict[str, Any]:
    """The pod of a node."""
    found: dict[str, Any] = manifest("deployment.yaml")["spec"]["template"]["spec"]
    return found


def container() -> dict[str, Any]:
    """The container of a node."""
    (found,) = pod()["containers"]
    assert isinstance(found, dict)
    return found


def flags(pod_ip: str = "10.0.0.1") -> list[str]:
    """The flags of the server, with the variables that Kubernetes fills in."""
    return [argument.replace("$(POD_IP)", pod_ip) for argument in container()["args"]]


def seconds_before_the_signal() -> int:
    program, seconds = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    return int(seconds)


def selections(found: object) -> Iterator[dict[str, str]]:
    """All label selectors of a manifest."""
    if isinstance(found, list):
        for one in found:
            yield from selections(one)
    if isinstance(found, dict):
        for key, value in found.items():
            if key == "matchLabels":
                yield value
            yield from selections(value)


def test_the_kustomization_lists_every_manifest() -> None:
    files = {path.name for path in FOLDER.iterdir()} - {"kustomization.yaml"}
    assert sorted(manifest("kustomization.yaml")["resources"]) == sorted(files)
    assert not any("namespace" in manifest(name)["metadata"] for name in files)


def test_the_kustomization_leaves_selectors_of_other_pods_alone() -> None:
    """Labels that it adds to selectors would exclude clients and Prometheus from the service."""
    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("kubectl is not installed")
    made = subprocess.run(
        [kubectl, "kustomize", str(FOLDER)], capture_output=True, text=True, check=True
    )
    (network,) = [it for it in yaml.safe_load_all(made.stdout) if it["kind"] == "NetworkPolicy"]
    assert network["spec"] == manifest("network.yaml")["spec"]


def test_the_grace_period_is_longer_than_the_longest_shutdown() -> None:
    needed = seconds_before_the_signal() + longest_stop(settings(flags()))
    assert pod()["terminationGracePeriodSeconds"] > needed


def test_the_startup_probe_waits_longer_than_a_migration_takes() -> None:
    postgres = pytest.importorskip("runlane_server.store.postgres.schema")
    probe = container()["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > postgres.MIGRATION_TIMEOUT


def test_all_ports_agree() -> None:
    config = settings(flags())
    port, metrics = container()["ports"]
    number = port["containerPort"]
    assert config.metrics_listen
    assert config.metrics_listen.port == metrics["containerPort"]
    assert config.node_address
    assert config.listen.port == config.node_address.port == number
    assert {container()[probe]["grpc"]["port"] for probe in PROBES} == {number}
    (of_service,) = manifest("service.yaml")["spec"]["ports"]
    assert (of_service["port"], of_service["targetPort"]) == (number, port["name"])
    rules = manifest("network.yaml")["spec"]
    for rule in (rules["ingress"][0], rules["egress"][0]):
        assert [one["port"] for one in rule["ports"]] == [number]
    assert [one["port"] for one in rules["ingress"][1]["ports"]] == [metrics["containerPort"]]


def test_every_volume_that_programs_write_to_has_a_limit() -> None:
    written = [volume["emptyDir"] for volume in pod()["volumes"] if "emptyDir" in volume]
    assert written
    assert all("sizeLimit" in volume for volume in written)
    assert "ephemeral-storage" in container()["resources"]["limits"]


def test_no_caller_has_access_without_identification() -> None:
    config = settings(flags())
    assert config.access
    assert not config.insecure_anywhere


def test_each_node_advertises_the_address_of_its_pod() -> None:
    assert settings(flags("10.1.2.3")).node_address == Address("10.1.2.3", 50051)
    env = {one["name"]: one["valueFrom"] for one in container()["env"]}
    assert env["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    # With the network of the host, pods on one machine would share an address.
    assert "hostNetwork" not in pod()


def test_every_variable_is_a_setting_and_the_store_comes_from_a_secret() -> None:
    env = {one["name"]: one for one in container()["env"]}
    assert set(env) - {"POD_IP"} <= variables()
    assert "secretKeyRef" in env["RUNLANE_STORE"]["valueFrom"]
    assert not any(argument.startswith("--store") for argument in container()["args"])
    # Variables that Kubernetes adds for a service of this name would look like settings.
    assert pod()["enableServiceLinks"] is False


def test_every_selector_matches_the_pods() -> None:
    labels = manifest("deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    found = [
        labels_
        for name in ("deployment.yaml", "disruption.yaml", "network.yaml")
        for labels_ in selections(manifest(name))
        if "runlane-client" not in labels_ and labels_ != PROMETHEUS
    ]
    assert len(found) == 7
    assert all(wanted.items() <= labels.items() for wanted in found)
    service = manifest("service.yaml")["spec"]
    assert service["selector"].items() <= labels.items()
    assert service["clusterIP"] == "None"


def test_the_pod_has_no_privileges_that_the_server_does_not_need() -> None:
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["automountServiceAccountToken"] is False
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    volumes = {one["name"] for one in pod()["volumes"]}
    assert {one["name"] for one in container()["volumeMounts"]} == volumes


def started_flags(folder: Path) -> list[str]:
    """The flags of the manifest, with a free port."""
    (access,) = [one for one in container()["volumeMounts"] if one["name"] == "access"]
    ours = [flag.replace(access["mountPath"], str(folder)) for flag in flags("127.0.0.1")]
    assert f"--access={folder}/access.toml" in ours
    return [*ours, "--listen=127.0.0.1:0", "--metrics-listen=0"]


def token_in(folder: Path) -> str:
    """A token in the access file that the manifest names."""
    return editing.add(folder / "access.toml", "backend", tenant="acme", role=Role.RUN)


async def test_every_probe_names_a_service_that_the_server_has(tmp_path: Path) -> None:
    env = {"RUNLANE_STORE": "memory:"}
    token_in(tmp_path)
    async with serving(
        tmp_path, *started_flags(tmp_path), env=env, base=clean_environment(), listen=None
    ) as server:
        for probe in PROBES:
            service = container()[probe]["grpc"].get("service", "")
            assert await health(server.address, service) == SERVING
        server.send(signal.SIGTERM)
        assert await server.wait() == 0


async def test_a_draining_node_is_not_ready(tmp_path: Path) -> None:
    service = container()["readinessProbe"]["grpc"]["service"]
    token = token_in(tmp_path)
    scripted = [
        "--agent=scripted" if flag.startswith("--agent=") else flag
        for flag in started_flags(tmp_path)
    ]
    env = {"RUNLANE_STORE": "memory:"}
    async with (
        serving(tmp_path, *scripted, env=env, base=clean_environment(), listen=None) as server,
        Client(server.address, token=token) as client,
    ):
        handle = await Wire(client).start_blocked("s", "gate")
        draining = asyncio.create_task(wait_for_health(server.address, service, NOT_SERVING))
        server.send(signal.SIGTERM)
        await draining
        assert await health(server.address, service) == NOT_SERVING
        await handle.cancel()
        assert await server.wait() == 0
