#!/usr/bin/env python3
"""Writes the provenance of a release: which commit, with which dependencies, gave which packages.

python gen/provenance.py PACKAGES

Reads SHA256SUMS of the packages, checks it against them, and writes provenance.json beside it: an
in-toto statement (https://in-toto.io/Statement/v1) with a SLSA provenance
(https://slsa.dev/spec/v1.0/provenance). Exits with a reason unless the working tree is the commit
of the version's tag, so that everyone can build again what the statement names. A person signs it,
as docs/releasing.md says.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = ("constraints.txt", "deploy/requirements.txt", "deploy/build-requirements.txt")
BUILD_TYPE = "urn:runlane:make-release:1"
BUILDER = "urn:runlane:maintainer"


def main() -> None:
    """Writes the statement."""
    packages = Path(sys.argv[1])
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    subjects = checked_sums(packages)
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": sum_}} for name, sum_ in subjects.items()],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"command": "make release", "version": version},
                "resolvedDependencies": [
                    {"name": "repository", "digest": {"gitCommit": tagged_commit(version)}},
                    *({"name": each, "digest": {"sha256": sha256(ROOT / each)}} for each in PINS),
                ],
            },
            "runDetails": {"builder": {"id": BUILDER}},
        },
    }
    written = packages / "provenance.json"
    written.write_text(json.dumps(statement, indent=2) + "\n")
    print(f"{written}: {len(subjects)} files; sign it as docs/releasing.md says")


def checked_sums(packages: Path) -> dict[str, str]:
    """The checksums of the packages by name. Exits if one is not that of its file."""
    lines = (packages / "SHA256SUMS").read_text().splitlines()
    sums = {
        name.removeprefix("./"): found for found, name in (line.split("  ", 1) for line in lines)
    }
    for name, expected in sums.items():
        if sha256(packages / name) != expected:
            sys.exit(f"{name}: differs from SHA256SUMS; run make release again")
    return sums


def sha256(path: Path) -> str:
    """The checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tagged_commit(version: str) -> str:
    """The commit of the version's tag. Exits unless the working tree is that commit, unchanged."""
    if changed := _git("status", "--porcelain", "--untracked-files=no"):
        sys.exit(f"the working tree has changes; commit and tag them first:\n{changed}")
    commit = _git("rev-parse", "HEAD")
    if f"v{version}" not in _git("tag", "--points-at", "HEAD").split():
        sys.exit(f"commit {commit[:12]} has no tag v{version}; tag it first")
    return commit


def _git(*words: str) -> str:
    done = subprocess.run(("git", *words), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
