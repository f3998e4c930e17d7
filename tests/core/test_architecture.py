"""Imports point downwards only, and the core stays pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server" / "runlane_server"
CLIENT = ROOT / "client" / "runlane"

SHELL, TOP = 2, 4
HEIGHT = {
    "core": 0,
    "metrics": 0,
    "release": 0,
    "store": 1,
    "agents": 1,
    "rpc": 3,
    "command_options": TOP,
    "config": TOP,
    "app": TOP,
    "cli": TOP,
    "entrance": TOP,
    "entrance_options": TOP,
    "token_commands": TOP,
    "tracing": TOP,
    "monitor": TOP,
    "node": TOP,
    "node_address": TOP,
    "option_types": TOP,
    "pytest_plugin": TOP,
    "shared_port": TOP,
    "testing": TOP,
    "testing_thread": TOP,
    "worker": TOP,
    "workers": TOP,
    "__main__": TOP,
}
"""How high a module or package stands; the others, `coordinator` among them, stand at `SHELL`."""

PURE = {
    "__future__",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "itertools",
    "re",
    "runlane_server",
    "types",
    "typing",
}
"""All that the core imports: no clock, no ids, no randomness, no I/O, no protobuf."""


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if "v1" not in path.parts]


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from package import module` names a module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _part(path: Path) -> str:
    """The package of the server that a file is of, or its module."""
    return path.relative_to(SERVER).with_suffix("").parts[0]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _upward(part: str, tree: ast.AST) -> list[str]:
    """The imports of a part of the server that do not point downwards."""
    height = HEIGHT.get(part, SHELL)
    found: list[str] = []
    for name in _imports(tree):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top == "runlane_server" and other not in {part, ""}:
            theirs = HEIGHT.get(other, SHELL)
            # Modules of one height know one another; packages do not.
            if theirs > height or (theirs == height and height not in {SHELL, TOP}):
                found.append(name)
        if top == "runlane" and height < SHELL:
            found.append(name)
    return found


@pytest.mark.parametrize("path", _files(SERVER), ids=_name)
def test_imports_point_downwards(path: Path) -> None:
    assert not _upward(_part(path), ast.parse(path.read_text()))


@pytest.mark.parametrize("path", _files(CLIENT), ids=_name)
def test_the_client_does_not_know_the_server(path: Path) -> None:
    names = _imports(ast.parse(path.read_text()))
    assert not [name for name in names if name.partition(".")[0] == "runlane_server"]


@pytest.mark.parametrize("path", _files(SERVER / "core"), ids=_name)
def test_the_core_is_pure(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert {name.partition(".")[0] for name in _imports(tree)} <= PURE
    asynchronous = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert not [node for node in ast.walk(tree) if isinstance(node, asynchronous)]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input", "exec", "eval"}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("core", "from runlane_server.store.base import Store"),
        ("core", "from runlane_server import coordinator"),
        ("core", "import runlane.v1.run_pb2"),
        ("store", "import runlane_server.agents.base"),
        ("agents", "from runlane_server.store.base import Store"),
        ("coordinator", "def f():\n    from runlane_server.rpc import convert"),
        ("rpc", "from runlane_server.app import serve"),
    ],
)
def test_an_import_that_points_upwards_is_found(part: str, source: str) -> None:
    assert _upward(part, ast.parse(source))
