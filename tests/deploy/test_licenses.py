"""`make licenses` fails for a package whose license is not known."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from deploy import licenses

ROOT = Path(__file__).parents[2]


def declared_by(folder: Path, *lines: str, name: str = "some") -> tuple[str, ...]:
    """The licenses of a package with these lines of metadata."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    text = "\n".join(("Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *lines))
    (info / "METADATA").write_text(f"{text}\n")
    (found,) = distributions(path=[str(folder)])
    return licenses.licenses_of(found)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("License-Expression: MIT",), ("MIT",)),
        (("License-Expression: (MIT OR Apache-2.0) AND 0BSD",), ("MIT", "Apache-2.0", "0BSD")),
        (("Classifier: License :: OSI Approved :: BSD License",), ("BSD License",)),
        (("Classifier: License :: OSI Approved", "License: MIT License"), ("MIT",)),
        (("License: Apache 2.0",), ("Apache-2.0",)),
        (("License: our own terms",), ("our own terms",)),
        ((), ()),
    ],
)
def test_the_license_is_read_from_what_the_package_declares(
    tmp_path: Path, lines: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert declared_by(tmp_path, *lines) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n    Apache License\n  Version 2.0, January 2004\n http://...", ("Apache-2.0",)),
        ("You may look at this, but not touch it.", ()),
    ],
)
def test_the_license_of_a_package_that_declares_none_is_read_from_its_text(
    tmp_path: Path, text: str, expected: tuple[str, ...]
) -> None:
    info = tmp_path / "some-1.0.dist-info"
    (info / "licenses").mkdir(parents=True)
    (info / "licenses" / "LICENSE").write_text(text)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: some\nVersion: 1.0\n")
    (info / "RECORD").write_text("some-1.0.dist-info/licenses/LICENSE,,\n")
    (found,) = distributions(path=[str(tmp_path)])
    assert licenses.licenses_of(found) == expected


def test_packages_without_a_known_license_fail_the_check(tmp_path: Path) -> None:
    declared_by(tmp_path, "License-Expression: MIT AND Unheard-1.0", name="click")
    checked = subprocess.run(
        [sys.executable, ROOT / "tests" / "deploy" / "licenses.py", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 1
    assert "click: MIT, Unheard-1.0  UNKNOWN" in checked.stdout
    assert "grpcio: none declared  UNKNOWN" in checked.stdout
