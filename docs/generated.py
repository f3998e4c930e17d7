"""Shared by the scripts that write parts of the documentation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def between(page: str, name: str, text: str) -> str:
    """The page with that text between the markers of that name. Raises ValueError without them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"there is no {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(page: Path, write: Callable[[str], str], what: str) -> None:
    """Rewrites a page; with `--check` exits with an error if that would change it."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--check", action="store_true", help="exit with 1 if out of date")
    options = parser.parse_args()
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    fresh = write(before)
    if not options.check:
        page.write_text(fresh, encoding="utf-8")
    elif before != fresh:
        sys.exit(f"{what} in docs/{page.name} is stale: run docs/{Path(sys.argv[0]).name}")
