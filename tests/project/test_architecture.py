"""The rooms of the server: imports point downwards, private modules stay so, the core is pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server" / "runlane_server"
CLIENT = ROOT / "client" / "runlane"

ROOMS: dict[str, set[str]] = {
    "release": {"release"},
    "core": {
        "agents",
        "artifact",
        "errors",
        "fork",
        "input",
        "lane",
        "limits",
        "model",
        "observer",
        "recent",
        "retry",
        "trace",
        "transition",
        "turn",
        "update",
    },
    "extras": {"extras"},
    "private_file": {"private_file"},
    "net": {"addresses"},
    "harness": {"clock", "gates", "harness"},
    "store": {
        "vitals",
        "base",
        "batching",
        "copies",
        "corrupt",
        "fair_queue",
        "findings",
        "lane_log",
        "lookup",
        "postgres.check",
        "postgres.repair",
        "retry",
        "postgres.renew",
        "sqlite.backup",
        "sqlite.check",
        "sqlite.repair",
        "open",
        "webhooks",
        "weight",
    },
    "agents": {
        "abilities",
        "acp.policy",
        "base",
        "command.environment",
        "command.limits",
        "command.prctl",
        "command.programs",
        "custom",
        "declaration",
        "json_parts",
        "loader",
        "processes.agent",
        "processes.protocol",
        "processes.supervisor",
        "scripted.latches",
        "scripted.script",
        "state_dirs",
        "worker.agent",
        "worker.messages",
        "worker.slot",
        "worker.turn",
        "worker.workers",
        "questions",
    },
    "access": {
        "admission",
        "caller",
        "certificate",
        "control",
        "editing",
        "grants",
        "log_limit",
        "access_file",
        "permissions",
        "quotas",
        "stored_bytes",
        "file_stamp",
        "node_keys",
    },
    "config": {"", "option_types", "sample", "settings", "sources"},
    "feed": {"feed", "oldest", "sessions"},
    "cluster": {"key_refresh", "membership", "peers", "relay"},
    "engine": {
        "agent_code",
        "agent_output",
        "agent_table",
        "coordinator",
        "editing",
        "executor",
        "pulse",
        "retention",
    },
    "webhooks": {
        "attempts",
        "destination",
        "dispatcher",
        "registry",
        "secret_keys",
        "sender",
        "shares",
    },
    "rpc": {"agent_socket", "endpoint", "tls", "webhook_payload"},
    "telemetry": {"logs", "metrics_server", "trace_export", "watchdog"},
    "process": {"app", "config_check", "node", "processes"},
    "cli": {"main"},
    "__main__": set(),
    "testing": {"", "logs", "thread"},
    "pytest_plugin": set(),
}
"""The rooms from the ground up, each with the modules that rooms above it may import.

`""` is the room itself: names that its `__init__` exports.
"""

FLOOR = {room: floor for floor, room in enumerate(ROOMS)}

INNER = ("store.memory", "store.sqlite", "store.postgres")
"""Rooms within `store` that know nothing of each other."""

OF_THE_CLIENT = "agents"
"""The lowest floor that may import the client: servers and workers call functions alike."""

PURE = {
    "__future__",
    "collections",
    "dataclasses",
    "enum",
    "errno",
    "functools",
    "hashlib",
    "itertools",
    "json",
    "re",
    "runlane_server",
    "types",
    "typing",
    "typing_extensions",
}
"""Everything that the core imports: no clock, no ids, no randomness, no I/O, no protobuf."""


def _files(folder: Path) -> list[Path]:
    found = [
        path
        for path in sorted(folder.rglob("*.py"))
        if "v1" not in path.relative_to(folder).parts and path != SERVER / "__init__.py"
    ]
    assert found, "no module was found"
    return found


def _imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports, by their full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                # `from package import module` names a module, `from module import name` does not.
                full = f"{node.module}.{alias.name}"
                yield full if _is_module(full) else str(node.module)


def _is_module(name: str) -> bool:
    path = SERVER.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _module(path: Path) -> str:
    """The name of a server module below the package, such as `store.base`."""
    return ".".join(path.relative_to(SERVER).with_suffix("").parts)


def _violations(module: str, tree: ast.AST) -> list[str]:
    """The imports of a server module that the table of rooms does not allow."""
    room = module.partition(".")[0]
    found: list[str] = []
    for name in _imports(tree):
        top, _, rest = name.partition(".")
        if top == "runlane" and FLOOR[room] < FLOOR[OF_THE_CLIENT]:
            found.append(f"{name}: {room} may not import the client")
        if top != "runlane_server" or not rest:
            continue
        other, _, inner = rest.partition(".")
        if other == room:
            if _inner_room(module) and _inner_room(rest) not in {None, _inner_room(module)}:
                found.append(f"{name}: {_inner_room(module)} knows nothing of it")
        elif FLOOR[other] >= FLOOR[room]:
            found.append(f"{name}: {other} lies above {room}")
        elif (inner or ("" if (SERVER / other).is_dir() else other)) not in ROOMS[other]:
            found.append(f"{name}: is private to {other}")
    return found


def _inner_room(module: str) -> str | None:
    return next((room for room in INNER if f"{module}.".startswith(f"{room}.")), None)


@pytest.mark.parametrize("path", _files(SERVER), ids=_name)
def test_a_module_imports_only_public_modules_of_lower_rooms(path: Path) -> None:
    assert _violations(_module(path), ast.parse(path.read_text())) == []


def test_the_table_lists_every_room_and_only_modules_that_exist() -> None:
    rooms = {path.stem for path in SERVER.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__pycache__", "py"} == set(ROOMS)
    missing = [
        f"{room}.{module}"
        for room, modules in ROOMS.items()
        for module in modules
        if module not in {"", room} and not _is_module(f"runlane_server.{room}.{module}")
    ]
    assert missing == []


def test_no_public_module_goes_unused_by_other_rooms() -> None:
    used: set[str] = set()
    for path in _files(SERVER):
        room = _module(path).partition(".")[0]
        used |= {
            name.removeprefix("runlane_server.")
            for name in _imports(ast.parse(path.read_text()))
            if not name.startswith(f"runlane_server.{room}.")
        }
    named = {f"{room}.{module}" for room, modules in ROOMS.items() for module in modules if module}
    alone = {
        "release.release",
        "extras.extras",
        "private_file.private_file",
    }  # a room of a single module is its own name
    assert named - used - alone == set()


@pytest.mark.parametrize("path", _files(CLIENT), ids=_name)
def test_the_client_does_not_import_the_server(path: Path) -> None:
    names = _imports(ast.parse(path.read_text()))
    assert not [name for name in names if name.partition(".")[0] == "runlane_server"]


@pytest.mark.parametrize("path", _files(SERVER.parent / "runlane_web"), ids=_name)
def test_the_web_gateway_does_not_import_the_server(path: Path) -> None:
    names = _imports(ast.parse(path.read_text()))
    assert not [name for name in names if name.partition(".")[0] == "runlane_server"]


@pytest.mark.parametrize("path", _files(SERVER.parent / "runlane_a2a"), ids=_name)
def test_the_a2a_facade_does_not_import_the_server(path: Path) -> None:
    names = _imports(ast.parse(path.read_text()))
    # This module imports nothing of the server.
    allowed = "runlane_server.rpc.grpc_server"
    found = [name for name in names if name.partition(".")[0] == "runlane_server"]
    assert all(f"{name}.".startswith(f"{allowed}.") for name in found)


@pytest.mark.parametrize("path", _files(SERVER / "core"), ids=_name)
def test_the_core_is_pure(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert {name.partition(".")[0] for name in _imports(tree)} <= PURE
    asynchronous = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert not [node for node in ast.walk(tree) if isinstance(node, asynchronous)]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input", "exec", "eval"}


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("core.lane", "from runlane_server.store.base import Store", "store lies above core"),
        ("core.lane", "from runlane_server.engine import coordinator", "engine lies above core"),
        ("store.base", "import runlane.v1.run_pb2", "store may not import the client"),
        ("store.base", "import runlane_server.agents.base", "agents lies above store"),
        ("agents.base", "from runlane_server.engine.runner import Runner", "engine lies above"),
        (
            "engine.coordinator",
            "def f():\n    from runlane_server.rpc import convert",
            "rpc lies above engine",
        ),
        ("engine.coordinator", "from runlane_server.feed.tail import Tail", "private to feed"),
        (
            "store.sqlite.store",
            "from runlane_server.store.postgres.store import writer",
            "store.sqlite knows nothing of it",
        ),
    ],
)
def test_an_import_that_breaks_the_table_is_found(module: str, source: str, reason: str) -> None:
    (found,) = _violations(module, ast.parse(source))
    assert reason in found
