"""Generated parts of the documentation equal the output of their scripts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PAGES = [
    ("lane_diagram.py", "architecture.md", "queued --> folded: fold\n"),
    ("metrics_table.py", "monitoring.md", "Runs accepted (durable)."),
    ("api_reference.py", "api.md", "Waits for a run to end."),
    ("limits_table.py", "limits.md", "the agent is paused until it is stored"),
    ("settings_reference.py", "settings.md", "Time a shutdown waits for active runs."),
]
"""The script, the page that it writes, and a piece of its output."""


def _run(folder: Path, script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, folder / "docs" / script, *flags],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("script", "page", "piece"), PAGES)
def test_a_generated_page_is_up_to_date(script: str, page: str, piece: str) -> None:
    checked = _run(ROOT, script, "--check")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(("script", "page", "piece"), PAGES)
def test_a_stale_page_is_reported_and_rewritten(
    tmp_path: Path, script: str, page: str, piece: str
) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    copy = tmp_path / "docs" / page
    fresh = copy.read_text()
    assert piece in fresh
    copy.write_text(fresh.replace(piece, ""))
    checked = _run(tmp_path, script, "--check")
    assert checked.returncode == 1
    assert f"in docs/{page} is stale: run docs/{script}" in checked.stderr
    assert _run(tmp_path, script).returncode == 0
    assert copy.read_text() == fresh
