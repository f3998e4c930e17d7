#!/usr/bin/env python3
"""Prepares a release in the working tree: version, changelog, and the names it is published under.

python gen/release.py VERSION [--module PATH] [--group ID]

--module sets the path of the Go module, --group the group id of the Maven artifact. Both are needed
once: the repository has placeholders, because it does not know where it is published. `make proto`
writes the generated code again afterwards. docs/releasing.md has the other steps.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import versions

ROOT = Path(__file__).parents[1]

_VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")
_MODULE = re.compile(r"[a-z0-9.-]+\.[a-z]+(/[\w.~-]+)+")
_GROUP = re.compile(r"[a-z][\w-]*(\.[a-z][\w-]*)+")
_UNRELEASED = "## Unreleased\n"
_GENERATED = re.compile(r"gen/go/runlane/|.*_pb2(_grpc)?\.pyi?$")
"""Files that `make proto` writes: they contain lengths of names, so a replacement breaks them."""


def with_release(changelog: str, version: str, day: str) -> str:
    """The changelog with all unreleased changes under the version. Raises ValueError."""
    if f"\n## {version} " in changelog:
        raise ValueError(f"CHANGELOG.md: has a section {version} already")
    before, heading, after = changelog.partition(_UNRELEASED)
    changes = after.partition("\n## ")[0]
    if not heading or "\n- " not in changes:
        raise ValueError("CHANGELOG.md: has no changes under '## Unreleased'; add them")
    return f"{before}{_UNRELEASED}\n## {version} - {day}\n{after}"


def module_path() -> str:
    """The path of the Go module."""
    return (ROOT / "gen/go/go.mod").read_text().splitlines()[0].removeprefix("module ")


def group_id() -> str:
    """The group id of the Maven artifact: the first in its manifest."""
    found = re.search(r"<groupId>([^<]+)</groupId>", (ROOT / "gen/java/pom.xml").read_text())
    assert found is not None  # noqa: S101 - a manifest of Maven has one
    return found[1]


def replace_everywhere(before: str, after: str) -> int:
    """Replaces a name in all files under version control; returns the number of changed files."""
    listed = subprocess.run(
        ["git", "grep", "--files-with-matches", "--fixed-strings", "-z", before],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = [name for name in listed.stdout.split("\0") if name and not _GENERATED.match(name)]
    for name in names:
        path = ROOT / name
        path.write_text(path.read_text().replace(before, after))
    return len(names)


def main() -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Prepares a release in the working tree.")
    parser.add_argument("version")
    parser.add_argument("--module", default="", help="path of the Go module")
    parser.add_argument("--group", default="", help="group id of the Maven artifact")
    chosen = parser.parse_args()
    for flag, value, form in (
        ("VERSION", chosen.version, _VERSION),
        ("--module", chosen.module, _MODULE),
        ("--group", chosen.group, _GROUP),
    ):
        if (value or flag == "VERSION") and form.fullmatch(value) is None:
            parser.error(f"{flag}: {value!r} is not of the form {form.pattern}")
    try:
        changelog = with_release(
            (ROOT / "CHANGELOG.md").read_text(), chosen.version, f"{datetime.now(UTC):%Y-%m-%d}"
        )
    except ValueError as error:
        parser.error(str(error))
    (ROOT / "CHANGELOG.md").write_text(changelog)
    project = ROOT / "pyproject.toml"
    pattern = r'^version = "([^"]+)"'
    project.write_text(versions.with_version(project.read_text(), pattern, chosen.version))
    versions.write(chosen.version)
    for before, after in ((module_path(), chosen.module), (group_id(), chosen.group)):
        if after and after != before:
            print(f"{before} is now {after} in {replace_everywhere(before, after)} files")
    print(f"version {chosen.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
