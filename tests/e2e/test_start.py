"""The start of a server, and the one line that it prints when it cannot start."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from runlane import Client, PromptTooLarge, RunState
from support.server import ServerProcess, serving, start_fails
from support.staging import SECONDS

PREFIX = "runlane-server: error: "


async def fails(folder: Path, *flags: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """The exit code of a server that cannot start, and the one line that it prints to stderr."""
    start = partial(start_fails, folder, *flags, env=env)
    code, line = await asyncio.to_thread(start)
    assert line.startswith(PREFIX), line
    assert line.endswith("\n")
    assert line.count("\n") == 1, line
    return code, line


# --- Failures -----------------------------------------------------------------------------------


def a_folder(path: Path) -> None:
    path.mkdir()


def unreadable(path: Path) -> None:
    """Makes a file unreadable, also for root: a symbolic link to itself."""
    path.symlink_to(path)


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all " * 1000)


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()


@pytest.mark.sqlite("a file")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (a_folder, "is a directory"),
        (unreadable, "Too many levels of symbolic links"),
        (garbage, "is not a database"),
        (foreign, "is a database of another program"),
    ],
)
async def test_a_foreign_file_is_refused_and_unchanged(
    tmp_path: Path, make: Callable[[Path], None], why: str
) -> None:
    path = tmp_path / "some.db"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    code, said = await fails(tmp_path, "--store", "sqlite:///some.db")
    assert code == 2
    assert "some.db" in said
    assert why in said
    assert (path.read_bytes() if path.is_file() else b"") == before


MODULES = {
    "raising": "raise RuntimeError('no luck\\nat all')\n",
    "plain": "answer = 42\n",
}


@pytest.mark.parametrize(
    ("flags", "code", "why"),
    [
        (["--store", "sqlite:////proc/self/x.db"], 2, "/proc/self/x.db"),
        (["--store", "sqlite:///no/such/folder/x.db"], 2, "no/such/folder does not exist"),
        (["--access", "no-such.toml"], 2, "no-such.toml: No such file or directory"),
        (["--access", "plain.py"], 2, "--access plain.py: "),
        (["--tls-cert", "no.pem", "--tls-key", "no.pem"], 2, "no.pem: No such file or directory"),
        (["--tls-cert", "plain.py", "--tls-key", "plain.py"], 2, "--tls-cert plain.py"),
        (
            ["--store", "memory:", "--listen", "unix:no/such/folder/socket"],
            2,
            "no such file or directory",
        ),
        (["--agent", "command:no-such-program -x"], 2, "no program 'no-such-program'"),
        (["--agent", "command:'"], 2, "No closing quotation"),
        (["--agent", "command:cat", "--command-dir", "plain.py/x"], 2, "--command-dir"),
        (["--agent", "no_such_module:answer"], 2, "No module named 'no_such_module'"),
        (["--agent", "plain:nothing"], 2, "has no attribute 'nothing'"),
        (["--agent", "raising:answer"], 1, "RuntimeError: no luck"),
        (["--agent", "plain:answer"], 2, "a int is not an agent; expected a function"),
        (["--agent", "chat:openai:small"], 2, "OPENAI_API_KEY"),
        (["--max-active-runs", "-1"], 2, "--max-active-runs"),
    ],
)
async def test_an_impossible_setting_fails_with_its_reason(
    tmp_path: Path, flags: list[str], code: int, why: str
) -> None:
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    returned, said = await fails(tmp_path, *flags)
    assert returned == code
    assert why in said


EXTRAS = [
    ("asyncpg", ["--store", "postgresql://localhost/db"], "postgres"),
    ("pydantic_ai", ["--agent", "chat:openai:small"], "chat"),
    ("prometheus_client", ["--metrics-listen", "127.0.0.1:0"], "metrics"),
    ("opentelemetry", ["--otlp-endpoint", "http://127.0.0.1:1"], "traces"),
    ("uvloop", ["--event-loop", "uvloop"], "uvloop"),
    ("jwt", ["--access", "jwt.toml"], "jwt"),
    *((module, [], "server") for module in ("click", "structlog", "aiosqlite", "grpc_health")),
    *((module, [], "server") for module in ("grpc_reflection", "uuid_utils")),
]
JWT = """
[jwt]
issuer = "i"
audience = "a"
algorithms = ["RS256"]
key = "k.pem"
role_claim = "r"
tenant_claim = "t"
"""


@pytest.mark.parametrize(("module", "flags", "extra"), EXTRAS)
def test_a_missing_extra_is_one_line_with_its_remedy(
    tmp_path: Path, module: str, flags: list[str], extra: str
) -> None:
    (tmp_path / "jwt.toml").write_text(JWT)
    (tmp_path / "k.pem").write_text("")
    program = f"import sys, runpy; sys.modules[{module!r}] = None;" + (
        "runpy.run_module('runlane_server', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--listen", "127.0.0.1:0", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    wanted = "server" if extra == "server" else f"server,{extra}"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(PREFIX)
    assert done.stderr.endswith(f" is not installed; run: pip install 'runlane[{wanted}]'\n")
    assert done.stderr.count("\n") == 1


async def test_an_error_does_not_contain_the_password(tmp_path: Path) -> None:
    url = "postgresql://me:hunter2@db/runlane"
    code, said = await fails(tmp_path, env={"RUNLANE_STORE": url})
    assert code == 1
    assert "hunter2" not in said
    for one in (url, "postgres://h/d?password=hunter2", "postgresql://a:hunter2@x,b:y@z/d"):
        code, said = await fails(tmp_path, "--store", one)
        assert code == 2
        assert "--store" in said
        assert "RUNLANE_STORE" in said
        assert "hunter2" not in said


async def test_invalid_values_of_variables_and_files_are_named(tmp_path: Path) -> None:
    code, said = await fails(tmp_path, env={"RUNLANE_MAX_WAITING_RUNS": "many"})
    assert code == 2
    assert "'many'" in said
    (tmp_path / "runlane.toml").write_text('[store]\nkind = "memory"\n')
    code, said = await fails(tmp_path, "--config", "runlane.toml")
    assert code == 2
    assert "runlane.toml: 'store' must be a string or a number" in said


@pytest.mark.sqlite("one server has the file")
async def test_a_second_server_on_the_same_store_fails_and_the_first_continues(
    tmp_path: Path,
) -> None:
    async with (
        serving(tmp_path, "--store", "sqlite:///one.db", "--agent", "scripted") as server,
        Client(server.address) as client,
    ):
        active = await client.run_accepted("s", '[{"wait": "g"}]', allow_missing=True)
        code, said = await fails(tmp_path, "--store", "sqlite:///one.db")
        assert code == 1
        assert "one.db" in said
        # Another name for the same file is refused too.
        (tmp_path / "two.db").symlink_to(tmp_path / "one.db")
        code, said = await fails(tmp_path, "--store", f"sqlite:///{tmp_path}/two.db")
        assert code == 1
        # Another store, but the same address.
        flags = ("--listen", server.address, "--store", "memory:", "--log-level", "error")
        code, said = await fails(tmp_path, *flags)
        assert code == 1
        assert "address already in use" in said
        # No attempt affected the runs of the first server.
        await client.run_accepted("t", '[{"open": "g"}]', allow_missing=True)
        assert (await active.completed(SECONDS)).state is RunState.COMPLETED


# --- Starts -------------------------------------------------------------------------------------


async def test_a_flag_overrides_a_variable_which_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "runlane.toml").write_text(
        'agent = "no such agent"\nmax-prompt-bytes = 3\nstore = "sqlite:///file.db"\n'
    )
    env = {"RUNLANE_CONFIG": "runlane.toml", "RUNLANE_AGENT": "nor this one"}
    env["RUNLANE_STORE"] = "sqlite:///environment.db"
    async with (
        serving(tmp_path, "--agent", "echo", env=env) as server,
        Client(server.address) as client,
    ):
        handle = await client.run_accepted("s", "abc", allow_missing=True)
        assert (await handle.completed(SECONDS)).text == "abc"
        with pytest.raises(PromptTooLarge, match="3 is the limit"):
            await client.run_accepted("s", "abcd")
    assert (tmp_path / "environment.db").exists()
    assert not (tmp_path / "file.db").exists()


async def test_a_unix_socket_works_again_after_a_crash(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, listen="unix:run.sock")
    # The printed path is relative to the folder of the server.
    reached = f"unix:{tmp_path}/run.sock"
    try:
        await server.start()
        assert server.address == "unix:run.sock"
        async with Client(reached) as client:
            handle = await client.run_accepted("s", "hello", allow_missing=True)
            assert (await handle.completed(SECONDS)).text == "hello"
        await server.kill()
        await server.start()
        async with Client(reached) as client:
            assert (await client.get_run(handle.run_id)).state is RunState.COMPLETED
    finally:
        await server.kill()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("module", ["runlane_server", "runlane_web"])
def test_output_that_cannot_be_written_is_one_line(module: str, unbuffered: str) -> None:
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", module, "--help"]
    name = module.replace("_", "-")
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=env, text=True, check=False
        )
    problem = "the output cannot be written: No space left on device"
    assert (ended.returncode, ended.stderr) == (1, f"{name}: error: {problem}\n")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as left:
        ended = subprocess.run(
            command, stdout=left, stderr=subprocess.PIPE, env=env, text=True, check=False
        )
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("log", ["nobody reads it", "the disk is full"])
async def test_a_server_works_with_an_unwritable_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str
) -> None:
    # With it, nothing would be left in a buffer at the end of the process.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reader, writer = os.pipe()
    os.close(reader)
    stderr = os.open("/dev/full", os.O_WRONLY) if log == "the disk is full" else os.dup(writer)
    os.close(writer)
    server = ServerProcess(tmp_path)
    server.launch(stderr=stderr)
    os.close(stderr)
    try:
        await asyncio.to_thread(server.wait_until_listening)
        async with Client(server.address) as client:
            handle = await client.run_accepted("s", "hello", allow_missing=True)
            assert (await handle.completed(SECONDS)).text == "hello"
        assert await server.stop() == 0
    finally:
        await server.kill()
