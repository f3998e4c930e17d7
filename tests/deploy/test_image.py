"""The image: what it is made of is there, and it runs what the manifests expect."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import yaml

from deploy.settings import DEPLOY, settings

ROOT = DEPLOY.parent
TEXT = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
URL = re.compile(r"\b[a-z]+://[^\s`)]*")


def said(instruction: str) -> list[str]:
    """What follows an instruction, each time it is given."""
    return re.findall(rf"^{instruction} +(.*)$", TEXT, re.MULTILINE)


def one(instruction: str) -> str:
    """What follows an instruction that is given once."""
    (found,) = said(instruction)
    return found


def test_the_server_is_started_without_a_shell_and_with_flags_that_exist() -> None:
    entrypoint, flags = json.loads(one("ENTRYPOINT")), json.loads(one("CMD"))
    assert entrypoint[-1] == "/opt/runlane/bin/runlane-server"
    assert str(settings(flags).listen.port) == one("EXPOSE")


def test_it_is_the_user_of_the_manifests() -> None:
    deployment = yaml.safe_load((DEPLOY / "kubernetes" / "deployment.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    context = pod["securityContext"]
    assert one("USER") == f"{context['runAsUser']}:{context['runAsGroup']}"
    (container,) = pod["containers"]
    assert str(container["ports"][0]["containerPort"]) == one("EXPOSE")
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert said("WORKDIR")[-1] in mounts


def test_what_is_copied_is_there_and_is_let_in() -> None:
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert allowed[0] == "*"
    copied = [
        name for line in said("COPY") if not line.startswith("--from") for name in line.split()[:-1]
    ]
    assert "constraints.txt" in copied
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed


def test_it_has_the_extras_of_a_node_at_the_versions_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(one("ARG").removeprefix("EXTRAS=").split(","))
    assert {"server", "postgres", "metrics"} <= extras <= set(project["optional-dependencies"])
    assert "--constraint constraints.txt" in TEXT
    wanted = {
        re.split(r"[<>=\[; ]", need)[0]
        for extra in extras
        for need in project["optional-dependencies"][extra]
    }
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert wanted <= pinned
    assert len({line.split()[0] for line in said("FROM")}) == 1


def test_nothing_is_fetched_from_a_place_by_name() -> None:
    for path in DEPLOY.rglob("*.*"):
        places = [found for found in URL.findall(path.read_text()) if not _is_ours(found)]
        assert places == [], path.name
    images = [line.split()[0] for line in said("FROM")]
    assert all(re.fullmatch(r"[a-z]+:[\w.-]+", image) for image in images)


def _is_ours(url: str) -> bool:
    return url.partition("://")[0] in {"postgresql", "sqlite", "dns"}


def test_all_of_it_is_looked_at() -> None:
    files = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()}
    assert {Path(name).parts[0] for name in files} == {
        "Dockerfile",
        "Dockerfile.dockerignore",
        "grafana",
        "kubernetes",
        "prometheus",
        "systemd",
    }
