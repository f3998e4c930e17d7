#!/usr/bin/env python3
"""Lists the versions of the site, for the selector of its pages; the root redirects to the latest.

python docs/site_versions.py FOLDER

Each folder in FOLDER that is named for a version is one site. The pages read `versions.json`, in
the format of mike.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)((?:a|b|rc)\d+)?")

REDIRECT = """\
<!doctype html>
<meta charset="utf-8">
<title>Runlane</title>
<meta http-equiv="refresh" content="0; url={version}/index.html">
<a href="{version}/index.html">Runlane {version}</a>
"""


def sort_key(name: str) -> tuple[int, int, int, bool, str]:
    """Orders versions; a pre-release comes before its release. Raises ValueError."""
    found = _VERSION.fullmatch(name)
    if found is None:
        raise ValueError(f"VERSION: {name!r} is not a version such as 0.2.0 or 0.2.0rc1")
    major, minor, patch, pre = found.groups()
    return int(major), int(minor), int(patch), pre is None, pre or ""


def list_versions(names: list[str]) -> list[dict[str, object]]:
    """The entries of `versions.json`, newest first; the latest is a release, if there is one."""
    ordered = sorted(names, key=sort_key, reverse=True)
    latest = next((name for name in ordered if sort_key(name)[3]), ordered[0])
    return [
        {"version": name, "title": name, "aliases": ["latest"] if name == latest else []}
        for name in ordered
    ]


def main() -> None:
    """Writes `versions.json` and the page of the root."""
    folder = Path(sys.argv[1])
    try:
        listed = list_versions([path.name for path in folder.iterdir() if path.is_dir()])
    except ValueError as error:
        sys.exit(str(error))
    (folder / "versions.json").write_text(json.dumps(listed, indent=2) + "\n")
    latest = next(each["version"] for each in listed if each["aliases"])
    (folder / "index.html").write_text(REDIRECT.format(version=latest))


if __name__ == "__main__":
    main()
