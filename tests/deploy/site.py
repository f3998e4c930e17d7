#!/usr/bin/env python3
"""Checks the built site: nothing is remote, search finds every page, the Python API is whole.

python tests/deploy/site.py SITE
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SHIM = "assets/iframe-worker.js"
OFFLINE = (SHIM, "search/search_index.js")
"""The search needs it where there is no web server."""

_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//[^\"]*\""
    r"|<link\b[^>]*\bhref=\"(?:https?:)?//[^\"]*\"[^>]*>"
)
_ANCHOR = re.compile(r'\bid="(runlane[\w.]*)"')


def remote(html: str) -> list[str]:
    """Other addresses that a page makes a browser load. A diagram of Mermaid loads its script."""
    found = [each for each in _LOADED.findall(html) if 'rel="canonical"' not in each]
    return found + re.findall(r'class="mermaid"', html)


def public_names(module: str) -> set[str]:
    """The names that a module of the client exports."""
    tree = ast.parse((ROOT / "client" / module).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise ValueError(f"{module}: has no __all__")


def main() -> None:
    """Exits with a line for each fault."""
    site = Path(sys.argv[1])
    faults: list[str] = []
    pages = {path.name: path.read_text() for path in site.glob("*.html")}
    for name, html in pages.items():
        faults += (f"{name}: loads {each}" for each in remote(html))
    index = json.loads((site / "search" / "search_index.json").read_text())
    found = {each["location"].partition("#")[0] or "index.html" for each in index["docs"]}
    faults += (f"{name}: search does not find it" for name in pages.keys() - found - {"404.html"})
    faults += (f"{name}: is missing" for name in OFFLINE if not (site / name).is_file())
    faults += (f"{name}: does not load {SHIM}" for name in pages if SHIM not in pages[name])
    anchors = {each for html in pages.values() for each in _ANCHOR.findall(html)}
    documented = {each.rpartition(".")[2] for each in anchors}
    modules = ("runlane/__init__.py", "runlane/harness/__init__.py", "runlane/worker/__init__.py")
    for module in modules:
        missing = sorted(public_names(module) - documented)
        faults += (f"{module}: {name} is not in the Python API" for name in missing)
    print(f"{len(pages)} pages, {len(anchors)} names of the Python API, {len(faults)} faults")
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
