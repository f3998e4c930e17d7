#!/usr/bin/env python3
"""Builds one program per language with the packages of `make packages`, and runs it.

python tests/packages/run.py PACKAGES [LANGUAGE...]

Each program is copied to a folder outside the repository, gets nothing from it but the package, and
runs against the server of the packed wheel: one run to its end, and one that it cancels. Exits with
1 if a program prints anything else. In languages with a testing helper, tests of the program start
servers of their own before that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from deploy.distribution import clean_environment, install, serving  # noqa: E402 - a script's neighbour

MODULE = "runlane.example/gen/go"
BUILD_SECONDS = 900.0
RUN_SECONDS = 120.0
PROMPTS = (
    json.dumps([{"text": "Hello"}]),
    json.dumps([{"text": "begun"}, {"wait": "never-opened"}]),
)
EXPECTED = "Hello\nRUN_STATE_COMPLETED\nbegun\nRUN_STATE_CANCELLED\n"


@dataclass(frozen=True, slots=True)
class Place:
    """The surroundings of a program: its own folder, the packages, and the wheel's environment."""

    folder: Path
    packages: Path
    commands: Path

    def sh(self, *words: str | Path) -> None:
        """Runs a command in the folder. Exits with its output if it fails."""
        env = clean_environment() | {
            "CARGO_TARGET_DIR": str(ROOT / ".cache" / "cargo"),
            "RUNLANE_SERVER_COMMAND": str(self.commands / "runlane-server"),
        }
        ended = subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        if ended.returncode != 0:
            sys.exit(f"{' '.join(map(str, words))}:\n{ended.stdout}")

    def package(self, pattern: str) -> Path:
        """The only package whose name matches."""
        (found,) = self.packages.glob(pattern)
        return found


def build_python(place: Place) -> tuple[str, ...]:
    """The wheel is installed already."""
    return (str(place.commands / "python"), "main.py")


def build_go(place: Place) -> tuple[str, ...]:
    """The module in a folder of its own, as a proxy would unpack it."""
    shutil.copytree(place.packages / "go", place.folder / "module")
    place.sh("go", "mod", "init", "user")
    place.sh("go", "mod", "edit", f"-replace={MODULE}=./module")
    place.sh("go", "mod", "tidy")
    place.sh("go", "vet", ".", f"{MODULE}/runlanetest")
    place.sh("go", "test", ".")
    place.sh("go", "build", "-o", "program", ".")
    return ("./program",)


def build_typescript(place: Place) -> tuple[str, ...]:
    """The packed package, with its types checked too."""
    quiet = ("--no-fund", "--no-audit", "--no-package-lock")
    place.sh("npm", "install", *quiet, place.package("runlane-*.tgz"))
    place.sh("npx", "tsc")
    place.sh("node", "--test", "dist/")
    return ("node", "dist/main.js")


def build_java(place: Place) -> tuple[str, ...]:
    """The artifact from a repository that is a folder."""
    version = place.package("runlane-*.whl").name.split("-")[1]
    options = (f"-Dpackages={place.packages / 'maven'}", f"-Drunlane.version={version}")
    goals = ("compile", "dependency:build-classpath", "-Dmdep.outputFile=classpath")
    place.sh("mvn", "--quiet", "--batch-mode", *options, *goals)
    classpath = (place.folder / "classpath").read_text()
    java = ("java", "-cp", os.pathsep.join(("target/classes", classpath)))
    place.sh(*java, "user.OwnServer")
    return (*java, "user.Main")


def build_rust(place: Place) -> tuple[str, ...]:
    """The packed crate, unpacked."""
    with tarfile.open(place.package("runlane-*.crate")) as crate:
        crate.extractall(place.folder, filter="data")
    (unpacked,) = place.folder.glob("runlane-*")
    unpacked.rename(place.folder / "runlane")
    place.sh("cargo", "build", "--quiet")
    return (str(ROOT / ".cache" / "cargo" / "debug" / "user"),)


BUILDS: dict[str, Callable[[Place], tuple[str, ...]]] = {
    "python": build_python,
    "go": build_go,
    "typescript": build_typescript,
    "java": build_java,
    "rust": build_rust,
}


def run(program: tuple[str, ...], folder: Path, server: str) -> str:
    """Runs a program; returns what it printed."""
    ended = subprocess.run(
        [*program, server, *PROMPTS],
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    return ended.stdout if ended.returncode == 0 else f"{ended.stdout}exit {ended.returncode}"


def main() -> None:
    """Checks the packages of the languages that are named, or of all."""
    parser = argparse.ArgumentParser(description="Uses the packages outside the repository.")
    parser.add_argument("packages", type=Path)
    parser.add_argument("languages", nargs="*", help=f"of {', '.join(BUILDS)}; default: all")
    chosen = parser.parse_args()
    languages: list[str] = chosen.languages or [*BUILDS]
    packages = chosen.packages.resolve()
    with tempfile.TemporaryDirectory() as name:
        outside = Path(name)
        (wheel,) = packages.glob("*.whl")
        commands = install(f"{wheel}[server]", outside)
        with serving(outside, commands / "runlane-server", "--agent", "scripted") as server:
            passed = [
                is_usable(one, Place(outside / one, packages, commands), server)
                for one in languages
            ]
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    sys.exit(0 if all(passed) else 1)


def is_usable(language: str, place: Place, server: str) -> bool:
    """Builds and runs the program of a language; prints how that went."""
    begun = time.monotonic()
    shutil.copytree(ROOT / "tests" / "packages" / language, place.folder)
    printed = run(BUILDS[language](place), place.folder, server)
    passed = printed == EXPECTED
    print(f"{language}: {'ok' if passed else 'wrong'}, {time.monotonic() - begun:.0f} s")
    if not passed:
        print(f"expected:\n{EXPECTED}\nprinted:\n{printed}")
    return passed


if __name__ == "__main__":
    main()
