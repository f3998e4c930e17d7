"""The languages of the examples: what each needs, how it is built, and how it is run.

How to build and to run is written in one place, the README of each example: the driver executes
the first `sh` block below `## Build`, and takes the program from the first line of the one below
`## Run`: the words before `run`. So a README that does not work fails the tests.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLIENTS = Path(__file__).parent / "clients"
LOCKS = ROOT / ".cache" / "polyglot"

BUILD_SECONDS = 900.0
"""How long a build may take; the first one fetches its libraries."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that a build needs: how it tells its version, and the oldest one that will do."""

    argv: tuple[str, ...]
    oldest: tuple[int, ...]

    def missing(self) -> str:
        """Why it cannot be used; empty where it can."""
        name = self.argv[0]
        if shutil.which(name, path=environment()["PATH"]) is None:
            return f"{name} is not installed"
        told = subprocess.run(
            self.argv, capture_output=True, text=True, env=environment(), timeout=60, check=False
        )
        found = re.search(r"(\d+(?:\.\d+)+)", told.stdout + told.stderr)
        version = tuple(map(int, found[1].split("."))) if found else ()
        if version < self.oldest:
            return f"{name} is {'.'.join(map(str, version))}, not {'.'.join(map(str, self.oldest))}"
        return ""


@dataclass(frozen=True, slots=True)
class Language:
    """An example: its name, which is its folder in `clients/`, and the tools that it needs."""

    name: str
    tools: tuple[Tool, ...]

    @property
    def folder(self) -> Path:
        """Where it is built and run."""
        return CLIENTS / self.name

    def missing(self) -> str:
        """Why it cannot be built here; empty where it can."""
        return "; ".join(reason for tool in self.tools if (reason := tool.missing()))

    def commands(self) -> str:
        """What builds it, as its README has it."""
        return self._block("Build")

    def argv(self) -> tuple[str, ...]:
        """The program, as its README has it: run with the folder as its working directory."""
        words = shlex.split(self._block("Run").splitlines()[0])
        return tuple(words[: words.index("run")])

    def _block(self, heading: str) -> str:
        readme = (self.folder / "README.md").read_text()
        section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", readme, re.DOTALL | re.MULTILINE)
        assert section is not None, f"no heading {heading!r} in the README of {self.name}"
        block = re.search(r"^```sh\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)
        assert block is not None, f"no sh block below {heading!r} in the README of {self.name}"
        return block[1]

    def build(self, session: str) -> None:
        """Builds it, once in a `session` of tests, whoever of its processes comes first.

        Raises AssertionError with what the build said.
        """
        with _locked(self.name):
            done = LOCKS / f"{self.name}.built"
            if done.exists() and done.read_text() == session:
                return
            # A file and not a pipe: a build may leave a daemon behind that keeps its output open.
            with tempfile.TemporaryFile() as said:
                code = subprocess.run(
                    ["sh", "-euc", self.commands()],
                    cwd=self.folder,
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    timeout=BUILD_SECONDS,
                    check=False,
                ).returncode
                said.seek(0)
                text = said.read().decode(errors="replace")
            assert code == 0, f"the build of {self.name} failed:\n{text}"
            done.write_text(session)


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """That of this process, without settings of Runlane, and with our Python and buf in front."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RUNLANE_")}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**kept, "PATH": path, **(more or {})}


@contextmanager
def _locked(name: str) -> Iterator[None]:
    LOCKS.mkdir(parents=True, exist_ok=True)
    with (LOCKS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


BUF = Tool(("buf", "--version"), (1, 50))

LANGUAGES = {
    language.name: language
    for language in (
        Language("go", (Tool(("go", "version"), (1, 23)), BUF)),
        Language("typescript", (Tool(("node", "--version"), (20, 10)), Tool(("npm", "-v"), (9,)))),
        Language("java", (Tool(("javac", "-version"), (17,)), Tool(("mvn", "-version"), (3, 8)))),
        Language("rust", (Tool(("cargo", "--version"), (1, 85)),)),
        Language("python", (Tool(("python", "--version"), (3, 11)),)),
    )
}
"""By name."""
