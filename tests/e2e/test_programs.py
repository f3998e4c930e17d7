"""Programs of an agent on a real server: a minimal environment, and nothing outlives a run."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from agents.command.test_environment import SECRETS
from runlane import Client, RunComplete, RunState
from runlane_server.agents.command.run_dirs import PREFIX, RunDirs
from support.processes import wait_for_exit
from support.server import ListeningProcess, ServerProcess, clean_environment, serving
from support.wire import Wire, wait_for_text


async def end(server: ServerProcess, prompt: str = "x") -> RunComplete:
    """Runs a prompt to its terminal event."""
    async with Client(server.address) as client:
        wire = Wire(client)
        return await wire.end(await client.run_accepted("s", prompt, allow_missing=True))


async def test_the_environment_of_a_program_has_no_secret_of_the_server(tmp_path: Path) -> None:
    secrets = {name: value for name, value in SECRETS.items() if name != "RUNLANE_STORE"}
    env = {**secrets, "RUNLANE_DRAIN_TIMEOUT": "7s", "WANTED": "w", "TZ": "UTC"}
    # These variables, for the loader and temporary files, come from the machine.
    env |= {"LD_LIBRARY_PATH": "", "TMPDIR": tempfile.gettempdir()}
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text("# of the provider\nAPI_KEY=k=1\nGIVEN=is overridden\n")
    flags = ("--command-env", "WANTED", "--command-env", "GIVEN=a=b, c", "--store", "memory:")
    from_file = ("--command-env-file", str(keys))
    agent = ("--agent", "command:cat /proc/self/environ")
    async with serving(tmp_path, *agent, *flags, *from_file, env=env) as server:
        found = (await end(server)).text
    variables = dict(
        line.split("=", 1) for line in found.replace("\ufffd", "\0").split("\0") if line
    )
    may_be = {name for name in variables if name.startswith(("LANG", "LC_"))}
    assert set(variables) - may_be == {
        *("PATH", "TZ", "HOME", "TMPDIR", "PYTHONUNBUFFERED", "WANTED", "GIVEN", "API_KEY"),
        *("RUNLANE_TENANT", "RUNLANE_SESSION_ID", "RUNLANE_RUN_ID", "RUNLANE_ATTEMPT"),
    }
    assert (variables["WANTED"], variables["GIVEN"]) == ("w", "a=b, c")
    assert variables["API_KEY"] == "k=1"
    assert PREFIX in variables["HOME"]


async def test_a_program_killed_by_a_limit_fails_the_run(tmp_path: Path) -> None:
    agent = "command:dd if=/dev/zero of=file bs=4096 count=2 status=none"
    flags = ("--command-file-size", "4KiB", "--command-dir", "runs")
    async with serving(tmp_path, "--agent", agent, *flags) as server:
        complete = await end(server)
        assert complete.state is RunState.FAILED
        assert complete.error is not None
        assert complete.error.reason == "COMMAND_LIMIT"
        assert "its limit of 4096 bytes in a file (--command-file-size)" in complete.error.message
        (own,) = (tmp_path / "runs").iterdir()
        assert list(own.iterdir()) == []


async def test_the_next_start_removes_directories_of_a_killed_server(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    other = RunDirs(runs)  # of another, living server
    await other.start()
    kept = other.create()
    agent = "command:sh -c 'touch left; echo $$.; sleep 3600'"
    flags = ("--agent", agent, "--command-dir", str(runs))
    async with serving(tmp_path, *flags) as server, Client(server.address) as client:
        handle = await client.run_accepted("s", "x", allow_missing=True)
        pid = int((await wait_for_text(handle, ".\n")).strip(".\n"))
        (left,) = runs.glob(f"{PREFIX}*/*/left")
        await server.kill()
        await wait_for_exit(pid)
        assert left.exists()
        await server.start()
        # The server listens before its agent is ready; an active run shows that it is.
        again = await client.run_accepted("s", "x")
        await wait_for_text(again, ".\n")
        assert not left.parent.parent.exists()
        assert kept.exists()
        assert len(list(runs.iterdir())) == 2
        await again.cancel()
        await Wire(client).end(again)
        assert await server.stop() == 0
    assert list(runs.iterdir()) == [kept.parent]
    await other.close()


PROBE = """
import os
from pathlib import Path

def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

pid = os.getpid()
for _ in range(%d):
    opened = []
    for name in ("environ", "mem", "maps"):
        try:
            open(f"/proc/{pid}/{name}", "rb").close()
            opened.append(name)
        except PermissionError:
            pass
    try:
        os.readlink(f"/proc/{pid}/fd/0")
        opened.append("fd")
    except PermissionError:
        pass
    print(Path(f"/proc/{pid}/cmdline").read_text().replace("\\0", " ")[-400:][:60], opened, sep="|")
    pid = parent(pid)
"""
"""Prints what it can open in /proc of itself, its launcher, the guardian, the server and so on."""


async def test_a_program_cannot_read_the_server_and_its_helpers(
    tmp_path: Path, store_url: str
) -> None:
    processes = 2 if store_url.startswith("postgresql") else 1
    probe = tmp_path / "probe.py"
    generations = 4 if processes == 1 else 5
    probe.write_text(PROBE % generations)
    # Without capabilities root is a user like any other.
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable]
    command += ["-m", "runlane_server", "--listen", "127.0.0.1:0", "--processes", str(processes)]
    command += ["--store", store_url]
    command += ["--agent", f"command:{sys.executable} {probe}"]
    server = ListeningProcess(command, tmp_path, env=clean_environment())
    await server.start()
    try:
        async with Client(server.address) as client:
            wire = Wire(client)
            found = await wire.end(await client.run_accepted("s", "x", allow_missing=True))
    finally:
        await server.stop()
    own, *others = found.text.splitlines()
    assert own.endswith("|['environ', 'mem', 'maps', 'fd']")
    assert len(others) == generations - 1, found
    assert [line.rpartition("|")[2] for line in others] == ["[]"] * len(others), found.text
