"""The state diagram in the documentation is drawn from the table that decides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _check(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )


def test_the_diagram_is_fresh() -> None:
    checked = _check(ROOT / "docs" / "lane_diagram.py")
    assert checked.returncode == 0, checked.stderr


def test_a_stale_diagram_is_told_and_drawn_anew(tmp_path: Path) -> None:
    for name in ("lane_diagram.py", "architecture.md"):
        (tmp_path / name).write_text((ROOT / "docs" / name).read_text())
    page, script = tmp_path / "architecture.md", tmp_path / "lane_diagram.py"
    fresh = page.read_text()
    page.write_text(fresh.replace("queued --> folded: fold\n", ""))
    checked = _check(script)
    assert checked.returncode == 1
    assert "stale" in checked.stderr
    subprocess.run([sys.executable, script], check=True)
    assert page.read_text() == fresh
