#!/usr/bin/env python3
"""Puts the pages of the site into a folder, for mkdocs.

python docs/site.py FOLDER

The pages remain readable as plain Markdown in the repository, whose folders they link to. The site
is flat and has only pages: a link to another page is rewritten, and one to a file or folder of the
repository becomes its name. A link to nothing is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]

ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security-policy.md",
    "examples/README.md": "examples.md",
    "tests/polyglot/clients/README.md": "conformance-clients.md",
}
"""The pages that stand outside docs/, and their names on the site."""

PYTHON = {
    "client": ("The client", ("client", "run_handle", "run_events", "subscription")),
    "sync": ("The client without asyncio", ("sync",)),
    "types": ("Records", ("types", "inputs", "session_stream", "webhooks", "pager", "wire")),
    "errors": ("Errors", ("errors",)),
    "harness": ("The harness", ("harness.client", "harness.sync")),
    "worker": ("Workers", ("worker.worker", "worker.turn", "worker.events", "worker.questions")),
}
"""The pages of the Python API: title, and modules of `runlane`."""

SERVER = {
    "agents": ("Agents in the server", ("agents.base", "agents.functions")),
    "testing": ("Servers in tests", ("testing.server", "testing.thread", "pytest_plugin")),
}
"""The same, of `runlane_server`."""

_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_COMMENT = re.compile(r"^<!-- .*? -->$", re.DOTALL | re.MULTILINE)


def pages() -> Mapping[str, str]:
    """The pages by their path in the repository, and their names on the site."""
    own = {f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    return own | ELSEWHERE


def page(source: str) -> str:
    """A page as the site has it. Raises ValueError for a link to nothing."""
    text = _COMMENT.sub("", (ROOT / source).read_text(encoding="utf-8"))
    # Nothing in a block of code is a link.
    fences = _FENCE.findall(text)
    prose = _LINK.sub(partial(_linked, source), _FENCE.sub("\0", text))
    blocks = iter(fences)
    return re.sub("\0", lambda _: next(blocks), prose)


def _linked(source: str, link: re.Match[str]) -> str:
    text, target = link.groups()
    if re.match(r"https?:|mailto:|#", target):
        return link[0]
    path, hash_sign, anchor = target.partition("#")
    found = os.path.normpath(Path(source).parent / path)
    if not (ROOT / found).exists():
        raise ValueError(f"{source}: links to {target}, which does not exist")
    if name := pages().get(found):
        return f"[{text}]({name}{hash_sign}{anchor})"
    if found.endswith(".png"):
        return f"[{text}]({Path(found).name})"
    return f"`{found}`" if text.strip("`") in found else f"{text} (`{found}`)"


def api_page(title: str, package: str, modules: tuple[str, ...]) -> str:
    """A page about modules of the Python API."""
    parts = [f"# {title}\n"]
    for module in modules:
        name = f"{package}.{module}"
        parts.append(f"::: {name}\n    options:\n      show_root_heading: true\n")
    return "\n".join(parts)


def main() -> None:
    """Writes all pages and pictures into a new folder."""
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for source, name in pages().items():
        (folder / name).write_text(page(source), encoding="utf-8")
    for picture in (ROOT / "docs").glob("*.png"):
        shutil.copy(picture, folder)
    (folder / "assets").mkdir()
    shutil.copy(ROOT / "docs" / "offline-search.js", folder / "assets" / "iframe-worker.js")
    for package, documented in (("runlane", PYTHON), ("runlane_server", SERVER)):
        for name, (title, modules) in documented.items():
            (folder / f"api-{name}.md").write_text(api_page(title, package, modules), "utf-8")


if __name__ == "__main__":
    main()
