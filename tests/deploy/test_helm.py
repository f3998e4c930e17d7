"""The Helm chart makes what deploy/kubernetes has, and its options make what they say."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest
import yaml

from deploy.settings import DEPLOY, longest_stop, settings
from deploy.test_kubernetes import PROBES, container, manifest, pod

CHART = DEPLOY / "helm"
ALL = (
    *("--set=autoscaling.enabled=true", "--set=metrics.podMonitor=true"),
    *("--set=tlsSecret=runlane-tls", "--set=agents={echo,fast=echo}"),
    *("--set=image.tag=9.9.9", "--set=flags={--max-active-runs=7}"),
    "--set=metrics.prometheusNamespaceLabels.team=monitoring",
)


def rendered(*options: str) -> dict[str, Any]:
    """The objects of the chart, by kind."""
    if (helm := shutil.which("helm")) is None:
        pytest.skip("helm is not installed")
    _run(helm, "lint", "--strict", str(CHART), *options)
    objects = list(
        yaml.safe_load_all(
            _run(helm, "template", "--kube-version", "1.30.0", "runlane", str(CHART), *options)
        )
    )
    found = {it["kind"]: it for it in objects}
    assert len(found) == len(objects)
    return found


def _run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def pod_of(objects: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return found


def flags_of(objects: dict[str, Any]) -> list[str]:
    (server,) = pod_of(objects)["containers"]
    return [argument.replace("$(POD_IP)", "10.0.0.1") for argument in server["args"]]


def test_default_chart_makes_the_pod_of_the_manifests() -> None:
    objects = rendered()
    assert sorted(objects) == ["Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service"]
    made, ours = pod_of(objects), pod()
    for key in ("securityContext", "automountServiceAccountToken", "enableServiceLinks", "volumes"):
        assert made[key] == ours[key], key
    assert made["terminationGracePeriodSeconds"] == ours["terminationGracePeriodSeconds"]
    (server,) = made["containers"]
    for key in ("args", "env", "ports", "resources", "securityContext", "lifecycle"):
        listed = sorted(server[key]) if key == "args" else server[key]
        assert listed == (sorted(container()[key]) if key == "args" else container()[key]), key
    for probe in PROBES:
        assert server[probe]["grpc"] == container()[probe]["grpc"]
    assert server["volumeMounts"] == container()["volumeMounts"]
    assert objects["Service"]["spec"]["ports"] == manifest("service.yaml")["spec"]["ports"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert server["image"] == f"runlane-server:{chart['appVersion']}"


def test_every_selector_of_the_chart_matches_its_pods() -> None:
    objects = rendered(*ALL)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        objects["PodMonitor"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)


def test_options_reach_the_server_and_the_objects() -> None:
    objects = rendered(*ALL)
    config = settings(flags_of(objects))
    assert config.limits.max_active_runs == 7
    assert config.tls_cert is not None
    assert [it.rpartition("=")[2] for it in flags_of(objects) if it.startswith("--agent=")] == [
        "echo"
    ] * 2
    assert pod_of(objects)["terminationGracePeriodSeconds"] > longest_stop(config) + 5
    (server,) = pod_of(objects)["containers"]
    assert server["image"] == "runlane-server:9.9.9"
    for probe in PROBES:
        *_, command = server[probe]["exec"]["command"]
        assert command.startswith("exec runlane-server health --tls-ca /etc/runlane-tls/ca.crt")
        assert command.endswith('"$POD_IP:50051"')
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert "replicas" not in objects["Deployment"]["spec"]
    (metric,) = scaler["metrics"]
    assert metric["external"]["metric"]["name"] == "runlane_runs_waiting"
    (endpoint,) = objects["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in server["ports"]}
    scraping = objects["NetworkPolicy"]["spec"]["ingress"][1]
    assert scraping["from"][0]["namespaceSelector"] == {"matchLabels": {"team": "monitoring"}}


def test_parts_can_be_left_out() -> None:
    objects = rendered(
        "--set=metrics.enabled=false",
        "--set=networkPolicy.enabled=false",
        "--set=disruptionBudget.enabled=false",
    )
    assert sorted(objects) == ["Deployment", "Service"]
    assert settings(flags_of(objects)).metrics_listen is None
