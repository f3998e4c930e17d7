"""A release has one version in all languages, and a section in the changelog."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NAMES = (
    "gen",
    "examples/go",
    "examples/java-worker",
    "tests/polyglot/odd/java",
    "proto",
    "pyproject.toml",
    "deploy",
    "docs/deploy.md",
)
CHANGELOG = "# Changelog\n\n## Unreleased\n\n### Added\n\n- A lane.\n"
MANIFESTS = (
    *(
        "gen/ts/package.json",
        "gen/rust/Cargo.toml",
        "gen/java/pom.xml",
        "examples/java-worker/pom.xml",
        "tests/polyglot/odd/java/pom.xml",
    ),
    *("deploy/helm/Chart.yaml", "deploy/compose.yaml", "deploy/kubernetes/kustomization.yaml"),
    "docs/deploy.md",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The changes of a release, in a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *NAMES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    project = tmp_path / "pyproject.toml"
    project.write_text(re.sub(r'(?m)^version = ".*"', 'version = "0.1.0"', project.read_text()))
    assert run(tmp_path, "versions.py").returncode == 0
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "--all"], cwd=tmp_path, check=True)
    return tmp_path


def run(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, folder / "gen" / script, *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_packages_have_the_version_of_the_project() -> None:
    checked = run(ROOT, "versions.py", "--check")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_package_with_another_version_is_reported(checkout: Path, name: str) -> None:
    manifest = checkout / name
    text = manifest.read_text()
    manifest.write_text(text.replace("0.1.0", "0.0.9", 1))
    checked = run(checkout, "versions.py", "--check")
    assert checked.returncode == 1
    assert checked.stderr.startswith(f"{name}: ")
    assert run(checkout, "versions.py").returncode == 0
    assert manifest.read_text() == text


def test_a_release_sets_every_version_and_closes_the_section(checkout: Path) -> None:
    released = run(checkout, "release.py", "7.8.9rc1")
    assert released.returncode == 0, released.stderr
    assert 'version = "7.8.9rc1"' in (checkout / "pyproject.toml").read_text()
    for name in MANIFESTS:
        assert "7.8.9-rc.1" in (checkout / name).read_text()
    changelog = (checkout / "CHANGELOG.md").read_text()
    assert "## Unreleased\n\n## 7.8.9rc1 - 2" in changelog
    again = run(checkout, "release.py", "7.8.9rc1")
    assert again.returncode == 2
    assert "CHANGELOG.md: has a section 7.8.9rc1 already" in again.stderr


def test_a_release_without_changes_is_refused_and_changes_nothing(checkout: Path) -> None:
    assert run(checkout, "release.py", "7.8.9").returncode == 0
    refused = run(checkout, "release.py", "7.8.10")
    assert refused.returncode == 2
    assert "no changes under '## Unreleased'" in refused.stderr
    assert 'version = "7.8.9"' in (checkout / "pyproject.toml").read_text()


def test_the_names_to_publish_under_replace_the_placeholders(checkout: Path) -> None:
    flags = ("--module", "git.test/team/runlane/gen/go", "--group", "test.git.team")
    released = run(checkout, "release.py", "1.0.0", *flags)
    assert released.returncode == 0, released.stderr
    assert "runlane.example/" not in (checkout / "examples/go/main.go").read_text()
    assert (
        '"git.test/team/runlane/gen/go/runlane/v1"'
        in (checkout / "examples/go/main.go").read_text()
    )
    proto = (checkout / "proto/runlane/v1/run.proto").read_text()
    assert 'go_package = "git.test/team/runlane/gen/go/runlane/v1;runlanev1"' in proto
    assert "<groupId>test.git.team</groupId>" in (checkout / "gen/java/pom.xml").read_text()


@pytest.mark.parametrize("version", ["1", "v1.0.0", "1.0.0-rc.1", ""])
def test_a_malformed_version_is_refused(checkout: Path, version: str) -> None:
    refused = run(checkout, "release.py", version)
    assert refused.returncode == 2
    assert "VERSION" in refused.stderr
