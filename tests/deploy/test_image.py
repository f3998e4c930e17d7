"""The image: everything that it copies exists, and it runs as the manifests expect."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import yaml

from deploy.settings import DEPLOY, settings

ROOT = DEPLOY.parent
TEXT = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
EXTRAS = ("server", "postgres", "uvloop", "metrics", "traces", "jwt", "web", "chat", "acp")
"""Every extra that a setting needs."""

URL = re.compile(r"\b[a-z]+://[^\s`)]*")


def arguments_of(instruction: str) -> list[str]:
    """The arguments of an instruction, one text for each time it occurs."""
    return re.findall(rf"^{instruction} +(.*)$", TEXT, re.MULTILINE)


def argument_of(instruction: str) -> str:
    """The argument of an instruction that occurs once."""
    (found,) = arguments_of(instruction)
    return found


def normalized(distribution: str) -> str:
    """The name of a distribution in the one spelling that compares (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_the_image_starts_the_server_without_a_shell_and_with_valid_flags() -> None:
    entrypoint, flags = json.loads(argument_of("ENTRYPOINT")), json.loads(argument_of("CMD"))
    assert entrypoint[-1] == "/opt/runlane/bin/runlane-server"
    assert str(settings(flags).listen.port) == argument_of("EXPOSE")


def test_user_port_and_folder_are_those_of_the_manifests() -> None:
    deployment = yaml.safe_load((DEPLOY / "kubernetes" / "deployment.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    context = pod["securityContext"]
    assert argument_of("USER") == f"{context['runAsUser']}:{context['runAsGroup']}"
    (container,) = pod["containers"]
    assert str(container["ports"][0]["containerPort"]) == argument_of("EXPOSE")
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert arguments_of("WORKDIR")[-1] in mounts


def test_every_copied_path_exists_and_is_in_the_build_context() -> None:
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert allowed[0] == "*"
    copied = [
        name
        for line in arguments_of("COPY")
        if not line.startswith("--from")
        for name in line.split()[:-1]
    ]
    assert "deploy/requirements.txt" in copied
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed


def pinned(file: str) -> dict[str, str]:
    """The versions in a requirements file."""
    lines = (ROOT / file).read_text().splitlines()
    pairs = (line.split()[0].split("==") for line in lines if re.match(r"[\w.-]+==", line))
    return {normalized(name): version for name, version in pairs}


def test_it_installs_the_extras_of_a_node_at_the_tested_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        normalized(re.split(r"[<>=\[; ]", need)[0])
        for extra in EXTRAS
        for need in project["optional-dependencies"][extra]
    }
    installed, tested = pinned("deploy/requirements.txt"), pinned("constraints.txt")
    assert wanted <= set(installed)
    assert installed.items() <= tested.items(), "run make image-requirements"


def test_everything_that_it_installs_is_verified_by_a_hash() -> None:
    for line in re.findall(r"pip install [^&]*", TEXT):
        assert ("--require-hashes" in line) or ("--no-index" in line and "--no-deps" in line), line
    assert "--no-build-isolation" in TEXT
    for name in ("requirements.txt", "build-requirements.txt"):
        blocks = re.split(r"\n(?=\w)", (DEPLOY / name).read_text())
        for block in blocks:
            assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), block
    # The base image is an argument, so that it can be a digest.
    assert {line.split()[0] for line in arguments_of("FROM")} == {"${BASE}"}


def test_no_file_names_an_address_to_download_from() -> None:
    for path in DEPLOY.rglob("*.*"):
        urls = [found for found in URL.findall(path.read_text()) if not _is_ours(found)]
        assert urls == [], path.name
    assert re.fullmatch(r"BASE=[a-z]+:[\w.-]+", argument_of("ARG"))


def _is_ours(url: str) -> bool:
    scheme, _, place = url.partition("://")
    # The services of the compose file.
    inside = place.startswith(("127.0.0.1:", "prometheus:", "grafana:"))
    return inside or scheme in {"postgresql", "sqlite", "dns"}


def test_every_folder_of_deploy_is_known_to_these_tests() -> None:
    files = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()}
    assert {Path(name).parts[0] for name in files} == {
        "Dockerfile",
        "Dockerfile.dockerignore",
        "build-requirements.txt",
        "compose",
        "compose.yaml",
        "grafana",
        "helm",
        "kubernetes",
        "prometheus",
        "requirements.txt",
        "systemd",
    }
