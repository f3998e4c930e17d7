"""The checkout in which a page is walked: a copy of the working tree, at a port of its own.

Its `.venv` is that of the tests, so nothing is installed twice; `make run` is the page's own.
"""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from polyglot.languages import ROOT
from polyglot.walk import PAGE_PORT

PORTS = (20_000, 32_000)
"""Below the ephemeral ports."""


def checkout(place: Path, port: int) -> None:
    """Copies what is, or would be, under version control."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    makefile = place / "Makefile"
    makefile.write_text(makefile.read_text().replace(PAGE_PORT, str(port)))
    venv = place / ".venv"
    venv.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".ready":
            (venv / entry.name).symlink_to(entry)
    # Newer than its prerequisites, so make does not set up the environment again.
    (venv / ".ready").touch()


def free_port() -> int:
    """A port that no process listens on."""
    while True:
        port = random.randrange(*PORTS)  # noqa: S311 - nothing secret about it
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
