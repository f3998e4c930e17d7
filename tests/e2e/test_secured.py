"""What the README and docs/security.md say about production is what happens."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.test_readme import block
from runlane_server.access.caller import Caller, Role
from runlane_server.access.entries import parse
from support import rpc_process as process

SECURITY = (Path(__file__).parents[2] / "docs" / "security.md").read_text()

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not there")


def done(folder: Path, commands: str) -> str:
    """What a script prints that has to succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RUNLANE_")}
    ended = subprocess.run(
        ["bash", "-ec", commands],
        cwd=folder,
        env={**kept, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@needs_openssl
def test_the_commands_for_production(tmp_path: Path) -> None:
    prepare, start = block("sh", "openssl req").split("\nrunlane-server ")
    done(tmp_path, prepare)
    assert (tmp_path / "token").stat().st_mode & 0o077 == 0
    flags = shlex.split(start.replace("\\\n", " "))
    assert flags[:2] == ["--listen", "0.0.0.0:50051"]
    call = block("sh", "--token-file token")
    more = _blocks("openssl x509")
    done(tmp_path, more)
    with process.server(tmp_path, "--store", "memory:", *flags[2:], listen="0.0.0.0:0") as server:
        port = server.address.rpartition(":")[2]
        assert "Who is there?\n" in done(tmp_path, call.replace("50051", port))
    flags += ["--tls-client-ca", "callers.pem"]
    with process.server(tmp_path, "--store", "memory:", *flags[2:], listen="127.0.0.1:0") as server:
        shown = "--tls-ca server.pem --tls-cert job.pem --tls-key job.key"
        assert f"runlane {shown}" in SECURITY.replace("\n`", "\n").replace("`", "")
        call = f"runlane -S {server.address} {shown} --token-file token sessions"
        done(tmp_path, call)


def test_the_access_file_that_is_shown_is_one() -> None:
    found = parse(_blocks('subject = "spiffe'))
    assert [token.caller for token in found.tokens] == [Caller("acme", Role.RUN, "ci")]
    assert found.certificates["spiffe://acme/job"].role is Role.READ
    assert found.jwt is not None
    assert found.jwt.roles == {"runlane-admins": Role.ADMIN, "developers": Role.RUN}


def _blocks(containing: str) -> str:
    (found,) = (each for each in SECURITY.split("```")[1::2] if containing in each)
    return found.partition("\n")[2]
