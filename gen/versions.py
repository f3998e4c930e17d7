#!/usr/bin/env python3
"""Copies the version in pyproject.toml to the packages of the other languages and to deploy/.

python gen/versions.py            writes the manifests
python gen/versions.py --check    only reports whether they agree: exit code 1 if not
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]

MANIFESTS = (
    ("gen/ts/package.json", r'^  "version": "([^"]+)"'),
    ("gen/rust/Cargo.toml", r'^version = "([^"]+)"'),
    ("gen/java/pom.xml", r"^  <version>([^<]+)</version>"),
    ("examples/java-worker/pom.xml", r"^      <version>([^<]+)</version>"),
    ("tests/polyglot/odd/java/pom.xml", r"^      <version>([^<]+)</version>"),
    ("deploy/helm/Chart.yaml", r"^version: (\S+)$"),
    ("deploy/helm/Chart.yaml", r"^appVersion: (\S+)$"),
    ("deploy/compose.yaml", r"image: &image runlane-server:(\S+)$"),
    ("deploy/kubernetes/kustomization.yaml", r"newTag: (\S+)$"),
    ("docs/deploy.md", r"-t runlane-server:(\S+) \.$"),
    ("docs/deploy.md", r"^    runlane-server:(\S+) --listen"),
)
"""The manifests, and where each states its version. A Go module has its version from a tag."""

_PRERELEASE = re.compile(r"(?<=\d)(a|b|rc)(\d+)$")
_NAMES = {"a": "alpha", "b": "beta", "rc": "rc"}


def semantic(version: str) -> str:
    """A version of Python as the other registries write it: `1.0.0rc1` is `1.0.0-rc.1`."""
    return _PRERELEASE.sub(lambda found: f"-{_NAMES[found[1]]}.{found[2]}", version)


def with_version(text: str, pattern: str, version: str) -> str:
    """The manifest with this version. Raises ValueError if it states none."""
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no line matches {pattern}")
    return text[: found.start(1)] + version + text[found.end(1) :]


def write(version: str, *, only_check: bool = False) -> list[str]:
    """Writes a version to the manifests; returns those that had another one."""
    stale = []
    for name, pattern in MANIFESTS:
        path = ROOT / name
        before = path.read_text()
        after = with_version(before, pattern, semantic(version))
        if after != before:
            if name not in stale:
                stale.append(name)
            if not only_check:
                path.write_text(after)
    return stale


def main() -> int:
    """Runs the command; returns the exit code."""
    only_check = "--check" in sys.argv[1:]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    stale = write(version, only_check=only_check)
    for name in stale if only_check else ():
        print(f"{name}: its version is not {version}; run: make docs", file=sys.stderr)
    return 1 if stale and only_check else 0


if __name__ == "__main__":
    sys.exit(main())
