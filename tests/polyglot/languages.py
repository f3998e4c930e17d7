"""The languages of the polyglot tests, and the tools that each requires."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that a build requires: the command that prints its version, the oldest version."""

    argv: tuple[str, ...]
    oldest: tuple[int, ...]

    def missing(self) -> str:
        """Returns why the tool cannot be used; empty if it can."""
        name = self.argv[0]
        if shutil.which(name, path=environment()["PATH"]) is None:
            return f"{name} is not installed"
        printed = subprocess.run(
            self.argv, capture_output=True, text=True, env=environment(), timeout=60, check=False
        )
        found = re.search(r"(\d+(?:\.\d+)+)", printed.stdout + printed.stderr)
        version = tuple(map(int, found[1].split("."))) if found else ()
        if version < self.oldest:
            return f"{name} is {'.'.join(map(str, version))}, not {'.'.join(map(str, self.oldest))}"
        return ""


@dataclass(frozen=True, slots=True)
class Language:
    """A language and the tools that its programs are built with."""

    name: str
    tools: tuple[Tool, ...]

    def missing(self) -> str:
        """Returns why programs of this language cannot be built here; empty if they can."""
        return "; ".join(reason for tool in self.tools if (reason := tool.missing()))


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of this process, without Runlane's settings, our Python first."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RUNLANE_")}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**kept, "PATH": path, **(more or {})}


LANGUAGES = {
    language.name: language
    for language in (
        Language("go", (Tool(("go", "version"), (1, 23)),)),
        Language("typescript", (Tool(("node", "--version"), (20, 10)), Tool(("npm", "-v"), (9,)))),
        Language("java", (Tool(("javac", "-version"), (17,)), Tool(("mvn", "-version"), (3, 8)))),
        Language("rust", (Tool(("cargo", "--version"), (1, 85)),)),
        Language("python", (Tool(("python", "--version"), (3, 11)),)),
    )
}
"""By name."""
