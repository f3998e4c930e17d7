"""The manifests and the chart before a real API server of Kubernetes: it takes every object.

`make test-kubernetes` builds the API server, etcd and kubectl, and runs this. There are no nodes,
so no pod starts; `tests/deploy/test_kubernetes.py` starts the server with the flags of the pod.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from deploy.settings import DEPLOY

CHART = DEPLOY / "helm"
SECONDS = 60.0
ETCD = "http://127.0.0.1:23790"
PEER = "http://127.0.0.1:23800"
API = "https://127.0.0.1:16443"

ALL = (
    *("--set=autoscaling.enabled=true", "--set=tlsSecret=runlane-tls"),
    *("--set=agents={echo,fast=echo}", "--set=flags={--max-active-runs=7}"),
)


@dataclass(frozen=True)
class Cluster:
    """An API server, and the file that says how to reach it."""

    kubeconfig: Path

    def run(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs kubectl or helm to its end."""
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
        return subprocess.run(
            command, env=env, input=stdin, capture_output=True, text=True, check=False
        )

    def done(self, *command: str, stdin: str = "") -> str:
        """The same, of a command that must succeed; returns what it printed."""
        ended = self.run(*command, stdin=stdin)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout


@contextmanager
def process(folder: Path, name: str, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed in the end; its output is in a file."""
    with (folder / f"{name}.log").open("wb") as log:
        started = subprocess.Popen((name, *flags), cwd=folder, stdout=log, stderr=log)
        try:
            yield started
        finally:
            started.kill()
            started.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    token = secrets.token_urlsafe(32)
    (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
    key = ("openssl", "genrsa", "-out", str(folder / "key"), "2048")
    subprocess.run(key, check=True, capture_output=True)
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [
                    {"name": "c", "cluster": {"server": API, "insecure-skip-tls-verify": True}}
                ],
                "users": [{"name": "u", "user": {"token": token}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    with ExitStack() as stack:
        stack.enter_context(
            process(
                folder,
                "etcd",
                *("--data-dir", "etcd", "--listen-client-urls", ETCD),
                *("--advertise-client-urls", ETCD, "--listen-peer-urls", PEER),
                *("--initial-advertise-peer-urls", PEER, "--initial-cluster", f"default={PEER}"),
            )
        )
        api = stack.enter_context(
            process(
                folder,
                "kube-apiserver",
                *("--etcd-servers", ETCD, "--bind-address", "127.0.0.1"),
                *("--secure-port", API.rpartition(":")[2], "--cert-dir", "certs"),
                *("--token-auth-file", "tokens.csv", "--authorization-mode", "RBAC"),
                *("--service-account-issuer", "https://kubernetes.default.svc"),
                *("--service-account-key-file", "key", "--service-account-signing-key-file", "key"),
                *("--service-cluster-ip-range", "10.99.0.0/24"),
                *("--disable-admission-plugins", "ServiceAccount"),
            )
        )
        found = Cluster(kubeconfig)
        deadline = time.monotonic() + SECONDS
        while found.run("kubectl", "get", "--raw", "/readyz").stdout != "ok":
            assert api.poll() is None, (folder / "kube-apiserver.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the API server is not ready"
            time.sleep(0.5)
        yield found


def names(printed: str) -> set[str]:
    """The kinds of the objects that kubectl printed."""
    return {line.split("/")[0].partition(".")[0] for line in printed.splitlines()}


KINDS = {"deployment", "service", "poddisruptionbudget", "networkpolicy"}


def test_the_api_server_takes_the_manifests(cluster: Cluster) -> None:
    strict = ("--dry-run=server", "--validate=strict")
    printed = cluster.done("kubectl", "apply", *strict, "-k", str(DEPLOY / "kubernetes"))
    assert names(printed) == KINDS


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (("readOnlyRootFilesystem", "readOnlyRootFile"), "unknown field"),
        (("runAsUser: 10001", "runAsUser: -5"), "must be between 0 and"),
        (
            ("image: runlane-server", "image: x\n          imagePullPolicy: X"),
            "Unsupported value",
        ),
    ],
)
def test_the_api_server_refuses_manifests_with_a_mistake(
    cluster: Cluster, wrong: tuple[str, str], problem: str
) -> None:
    text = (DEPLOY / "kubernetes" / "deployment.yaml").read_text()
    assert wrong[0] in text
    command = ("kubectl", "apply", "--dry-run=server", "--validate=strict", "-f", "-")
    ended = cluster.run(*command, stdin=text.replace(*wrong))
    assert ended.returncode != 0
    assert problem in ended.stderr


@pytest.mark.parametrize("options", [(), ALL], ids=["defaults", "all"])
def test_helm_installs_upgrades_and_removes_the_chart(
    cluster: Cluster, options: Sequence[str]
) -> None:
    assert shutil.which("helm") is not None
    cluster.done("helm", "install", "runlane", str(CHART))
    try:
        cluster.done("helm", "upgrade", "runlane", str(CHART), *options)
        rendered = cluster.done("helm", "get", "manifest", "runlane")
        kinds = {one["kind"].lower() for one in yaml.safe_load_all(rendered) if one}
        assert kinds == KINDS | ({"horizontalpodautoscaler"} if options else set())
        stored = json.loads(cluster.done("kubectl", "get", "deployment", "runlane", "-ojson"))
        (container,) = stored["spec"]["template"]["spec"]["containers"]
        assert ("--max-active-runs=7" in container["args"]) == bool(options)
        # Nothing that the chart renders is unknown to the API server.
        strict = ("--dry-run=server", "--validate=strict", "-f", "-")
        cluster.done("kubectl", "apply", *strict, stdin=rendered)
    finally:
        cluster.done("helm", "uninstall", "runlane")
    assert cluster.done("kubectl", "get", "deployment", "-oname") == ""
