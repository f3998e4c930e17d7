"""The provenance of a release: what it says, and what it refuses to say."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = (
    "gen/provenance.py",
    "pyproject.toml",
    "constraints.txt",
    "deploy/requirements.txt",
    "deploy/build-requirements.txt",
)

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A repository with a tagged version, and its packages outside of git."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    packages = tmp_path / "dist" / "packages"
    (packages / "go").mkdir(parents=True)
    (packages / "go" / "go.mod").write_text("module x\n")
    (packages / "runlane.whl").write_text("a wheel")
    sums = [
        f"{hashlib.sha256((packages / name).read_bytes()).hexdigest()}  ./{name}\n"
        for name in ("go/go.mod", "runlane.whl")
    ]
    (packages / "SHA256SUMS").write_text("".join(sums))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", *FILES)
    git(tmp_path, "commit", "--quiet", "--message", "release")
    git(tmp_path, "tag", f"v{version(tmp_path)}")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ("git", *who, *words), cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def version(folder: Path) -> str:
    lines = (folder / "pyproject.toml").read_text().splitlines()
    (line,) = (each for each in lines if each.startswith("version = "))
    return line.split('"')[1]


def provenance(release: Path) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "gen/provenance.py", "dist/packages")
    return subprocess.run(command, cwd=release, capture_output=True, text=True, check=False)


def test_it_names_the_commit_the_packages_and_the_pins(release: Path) -> None:
    done = provenance(release)
    assert done.returncode == 0, done.stderr
    statement = json.loads((release / "dist/packages/provenance.json").read_text())
    subjects = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    assert subjects.keys() == {"go/go.mod", "runlane.whl"}
    assert subjects["runlane.whl"] == hashlib.sha256(b"a wheel").hexdigest()
    built = statement["predicate"]["buildDefinition"]
    assert built["externalParameters"]["version"] == version(release)
    digests = {each["name"]: each["digest"] for each in built["resolvedDependencies"]}
    assert digests["repository"] == {"gitCommit": git(release, "rev-parse", "HEAD")}
    pins = hashlib.sha256((release / "constraints.txt").read_bytes()).hexdigest()
    assert digests["constraints.txt"] == {"sha256": pins}


def test_it_is_not_written_for_what_is_not_the_tagged_commit(release: Path) -> None:
    package = release / "dist/packages/runlane.whl"
    package.write_text("another wheel")
    assert "runlane.whl: differs from SHA256SUMS" in provenance(release).stderr
    package.write_text("a wheel")
    (release / "constraints.txt").write_text("grpcio==1\n")
    assert "has changes; commit and tag them first" in provenance(release).stderr
    git(release, "commit", "--all", "--quiet", "--message", "more")
    assert f"has no tag v{version(release)}" in provenance(release).stderr
    assert not (release / "dist/packages/provenance.json").exists()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_its_signature_is_verified_as_the_page_says(release: Path) -> None:
    provenance(release)
    packages = release / "dist/packages"
    key = release / "key"
    generate = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    subprocess.run(generate, check=True)
    public = key.with_suffix(".pub").read_text()
    signer = "release@example.org"
    (packages / "allowed_signers").write_text(f'{signer} namespaces="runlane-release" {public}')
    sign = ("ssh-keygen", "-Y", "sign", "-f", str(key), "-n", "runlane-release", "provenance.json")
    subprocess.run(sign, cwd=packages, check=True, capture_output=True)
    verify = [
        *("ssh-keygen", "-Y", "verify", "-f", "allowed_signers", "-I", signer),
        *("-n", "runlane-release", "-s", "provenance.json.sig"),
    ]
    statement = (packages / "provenance.json").read_bytes()
    for text, accepted in ((statement, True), (statement + b" ", False)):
        ended = subprocess.run(verify, cwd=packages, input=text, check=False, capture_output=True)
        assert (ended.returncode == 0) is accepted
    page = (ROOT / "docs" / "releasing.md").read_text()
    assert " ".join(verify) in page
    assert (
        " ".join(sign)
        .replace(str(key), "~/.ssh/release")
        .replace("provenance.json", "dist/packages/provenance.json")
        in page
    )
