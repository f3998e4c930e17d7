"""The versions of the site, as the selector of its pages lists them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.settings import DEPLOY

PROGRAM = DEPLOY.parent / "docs" / "site_versions.py"


def listed(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    for name in names:
        (folder / name).mkdir()
    command = (sys.executable, str(PROGRAM), str(folder))
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("names", "ordered", "latest"),
    [
        (("0.9.0", "0.10.0", "0.2.1"), ["0.10.0", "0.9.0", "0.2.1"], "0.10.0"),
        (("1.0.0rc1", "0.9.0"), ["1.0.0rc1", "0.9.0"], "0.9.0"),
        (("1.0.0", "1.0.0rc1", "1.0.0b2"), ["1.0.0", "1.0.0rc1", "1.0.0b2"], "1.0.0"),
        (("0.1.0a1",), ["0.1.0a1"], "0.1.0a1"),
    ],
)
def test_versions_are_listed_newest_first_and_the_root_redirects_to_the_latest(
    tmp_path: Path, names: tuple[str, ...], ordered: list[str], latest: str
) -> None:
    assert listed(tmp_path, *names).returncode == 0
    found = json.loads((tmp_path / "versions.json").read_text())
    assert [each["version"] for each in found] == ordered
    assert [each["version"] for each in found if "latest" in each["aliases"]] == [latest]
    assert f"url={latest}/index.html" in (tmp_path / "index.html").read_text()


def test_a_folder_that_is_no_version_is_an_error(tmp_path: Path) -> None:
    ended = listed(tmp_path, "main")
    assert ended.returncode == 1
    assert "'main' is not a version such as 0.2.0" in ended.stderr
    assert not (tmp_path / "versions.json").exists()
