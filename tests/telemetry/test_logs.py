"""The log on a terminal: texts of callers cannot steer it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

PROGRAM = """
import structlog
from runlane_server.telemetry import logs
logs.configure("console")
structlog.get_logger().info("run ended", session_id="a\\x1b]0;x\\u202eb\\n2026 forged\\u200b é")
"""


def test_the_console_log_escapes_what_steers_a_terminal() -> None:
    done = subprocess.run(
        (sys.executable, "-c", PROGRAM), capture_output=True, encoding="utf-8", check=True
    )
    (line,) = done.stderr.splitlines()
    for unsafe in ("\x1b]", "\u202e", "\u200b"):
        assert unsafe not in line
    for shown in (r"\x1b]0;x", r"\u202eb", r"\n2026 forged", "é"):
        assert shown in line


@pytest.mark.parametrize(("variable", "colored"), [("", True), ("1", False)])
def test_the_console_log_has_colors_on_a_terminal_only(variable: str, *, colored: bool) -> None:
    in_file = subprocess.run((sys.executable, "-c", PROGRAM), capture_output=True, check=True)
    assert b"\x1b[" not in in_file.stderr
    ours, theirs = pty.openpty()
    env = {**os.environ, "NO_COLOR": variable}
    subprocess.run((sys.executable, "-c", PROGRAM), stderr=theirs, check=True, env=env)
    os.close(theirs)
    shown = os.read(ours, 4096)
    os.close(ours)
    assert b"run ended" in shown
    assert (b"\x1b[" in shown) is colored
