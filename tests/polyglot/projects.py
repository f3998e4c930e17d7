"""The programs under test, one of each kind per language: how each is built and run.

The commands come from the README that documents the program, so a README that is wrong fails the
tests.
"""

from __future__ import annotations

import fcntl
import re
import shlex
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from polyglot.languages import ROOT, Language, environment

CLIENTS = Path(__file__).parent / "clients"
ODD = Path(__file__).parent / "odd"
EXAMPLES = ROOT / "examples"
LOCKS = ROOT / ".cache" / "polyglot"

CARGO = LOCKS / "cargo"
CARGO_ENVIRONMENT = {
    "CARGO_TARGET_DIR": str(CARGO),
    "CARGO_INCREMENTAL": "0",
    "CARGO_PROFILE_DEV_DEBUG": "0",
}
"""The programs in Rust share the libraries that cargo has compiled: each takes a minute to compile
them."""

BUILD_SECONDS = 900.0
"""Timeout of a build; the first one downloads libraries."""


@dataclass(frozen=True, slots=True)
class Project(ABC):
    """A program in one language."""

    language: Language

    @property
    @abstractmethod
    def name(self) -> str:
        """A unique name."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The working directory of builds and runs."""

    @abstractmethod
    def build_commands(self) -> str:
        """A shell script that builds the program."""

    @abstractmethod
    def argv(self) -> tuple[str, ...]:
        """The command that runs the program, without its arguments."""

    def command(self) -> tuple[str, ...]:
        """The same, with the program where the build has put it."""
        first, *rest = self.argv()
        return (re.sub("^target/", f"{CARGO}/", first), *rest)

    def build(self, session: str) -> None:
        """Builds the program once per `session` of tests, in the first process that asks.

        Raises AssertionError with the output of a failed build.
        """
        with _locked(self.name):
            done = LOCKS / f"{self.name}.built"
            if done.exists() and done.read_text() == session:
                return
            # A file and not a pipe: a build may leave a daemon behind that keeps its output open.
            with tempfile.TemporaryFile() as output:
                code = subprocess.run(
                    ["sh", "-euc", self.build_commands()],
                    cwd=self.folder,
                    env=environment(CARGO_ENVIRONMENT),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    timeout=BUILD_SECONDS,
                    check=False,
                ).returncode
                output.seek(0)
                text = output.read().decode(errors="replace")
            assert code == 0, f"the build of {self.name} failed:\n{text}"
            done.write_text(session)


class ConformanceClient(Project):
    """A program in `clients/` that implements all rules of docs/clients.md.

    Its README has the build under `## Build`. The first line under `## Run` names the program: the
    words before `run`.
    """

    @property
    def name(self) -> str:
        """For example `client-go`."""
        return f"client-{self.language.name}"

    @property
    def folder(self) -> Path:
        """Its folder in `clients/`."""
        return CLIENTS / self.language.name

    def build_commands(self) -> str:
        """The first `sh` block under `## Build`."""
        return first_block(self.folder / "README.md", "Build")

    def argv(self) -> tuple[str, ...]:
        """The words before `run` under `## Run`."""
        words = shlex.split(first_block(self.folder / "README.md", "Run").splitlines()[0])
        return tuple(words[: words.index("run")])


TITLES = {
    "go": "Go",
    "typescript": "TypeScript",
    "java": "Java",
    "rust": "Rust",
    "python": "Python",
}
"""The headings of the languages in examples/README.md."""


class Quickstart(Project):
    """A program in `examples/`.

    The `sh` block under its heading enters its folder, builds it, and runs it in the last line.
    """

    @property
    def name(self) -> str:
        """For example `quickstart-go`."""
        return f"quickstart-{self.language.name}"

    @property
    def folder(self) -> Path:
        """Its folder in `examples/`."""
        return EXAMPLES / self.language.name

    def build_commands(self) -> str:
        """The lines between the first and the last."""
        return "\n".join(self._lines()[1:-1])

    def argv(self) -> tuple[str, ...]:
        """The last line without the session and the prompt."""
        return tuple(shlex.split(self._lines()[-1]))[:-2]

    def arguments(self) -> tuple[str, ...]:
        """The session and the prompt in the last line."""
        return tuple(shlex.split(self._lines()[-1]))[-2:]

    def _lines(self) -> list[str]:
        block = first_block(EXAMPLES / "README.md", TITLES[self.language.name])
        entered, *rest = block.splitlines()
        assert entered == f"cd {self.language.name}"
        return [entered, *rest]


class WorkerExample(Project):
    """A worker in `examples/`, whose agent says the words of the prompt in capitals, 20 ms apart.

    The `sh` block under its heading enters its folder, builds it, and runs it in the last line.
    """

    @property
    def name(self) -> str:
        """For example `worker-go`."""
        return f"worker-{self.language.name}"

    @property
    def folder(self) -> Path:
        """Its folder in `examples/`."""
        return EXAMPLES / f"{self.language.name}-worker"

    def build_commands(self) -> str:
        """The lines between the first and the last."""
        return "\n".join(self._lines()[1:-1])

    def argv(self) -> tuple[str, ...]:
        """The last line."""
        return tuple(shlex.split(self._lines()[-1]))

    def _lines(self) -> list[str]:
        heading = f"Worker in {TITLES[self.language.name]}"
        entered, *rest = first_block(EXAMPLES / "README.md", heading).splitlines()
        assert entered == f"cd {self.language.name}-worker"
        return [entered, *rest]


class OddWorker(WorkerExample):
    """A worker with one slot in `odd/`, whose agents go wrong; built and run as the example is."""

    @property
    def name(self) -> str:
        """For example `odd-go`."""
        return f"odd-{self.language.name}"

    @property
    def folder(self) -> Path:
        """Its folder in `odd/`."""
        return ODD / self.language.name

    def build_commands(self) -> str:
        """Those of the example, from its own folder."""
        commands = super().build_commands().replace("../../", "../../../../")
        return commands.replace("-o worker", "-o odd")

    def argv(self) -> tuple[str, ...]:
        """That of the example, with its own name."""
        first, *rest = super().argv()
        return (re.sub(r"worker$", "odd", first), *(re.sub("worker", "odd", one) for one in rest))


def first_block(readme: Path, heading: str, kind: str = "sh") -> str:
    """Returns the first code block of a kind under a heading of level 1 or 2."""
    section = re.search(
        rf"^##? {heading}$(.*?)(?=^## |\Z)", readme.read_text(), re.DOTALL | re.MULTILINE
    )
    assert section is not None, f"no heading {heading!r} in {readme}"
    block = re.search(rf"^```{kind}\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)
    assert block is not None, f"no {kind} block below {heading!r} in {readme}"
    return block[1]


@contextmanager
def _locked(name: str) -> Iterator[None]:
    LOCKS.mkdir(parents=True, exist_ok=True)
    with (LOCKS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
