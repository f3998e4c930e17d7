"""The log on a terminal: texts of callers cannot steer it."""

from __future__ import annotations

import subprocess
import sys

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
