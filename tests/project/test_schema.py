"""`buf breaking` finds changes of the interface that break clients."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[2] / "proto"
BUF = str(Path(sys.executable).with_name("buf"))


def breaks(changed: Path) -> str:
    """The output of `buf breaking` for a changed interface."""
    told = subprocess.run(
        [BUF, "breaking", str(changed), "--against", str(PROTO)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert bool(told.returncode) == bool(told.stdout), told.stderr
    return told.stdout


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("run_service.proto", "  bool allow_missing = 9;\n", "", 'field "9"'),
        ("run_service.proto", "string cursor = 2;", "string place = 2;", '"place"'),
        ("run_service.proto", "int32 max_attempts = 7;", "int64 max_attempts = 7;", '"int64"'),
        ("run.proto", "RUN_STATE_FOLDED", "RUN_STATE_JOINED", "RUN_STATE_JOINED"),
        ("run_service.proto", "  rpc WaitRun(WaitRunRequest)", "  // rpc", "WaitRun"),
    ],
)
def test_a_breaking_change_is_reported(
    tmp_path: Path, file: str, old: str, new: str, found: str
) -> None:
    changed = tmp_path / "proto"
    shutil.copytree(PROTO, changed)
    path = changed / "runlane" / "v1" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert found in breaks(changed)


def test_an_addition_is_not_a_breaking_change(tmp_path: Path) -> None:
    changed = tmp_path / "proto"
    shutil.copytree(PROTO, changed)
    path = changed / "runlane" / "v1" / "run_service.proto"
    added = "  bool allow_missing = 9;\n  // More.\n  bool more = 99;\n"
    path.write_text(path.read_text().replace("  bool allow_missing = 9;\n", added))
    assert breaks(changed) == ""
