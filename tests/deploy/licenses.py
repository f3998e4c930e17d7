#!/usr/bin/env python3
"""Lists the license of every Python package in constraints.txt.

python tests/deploy/licenses.py FOLDER    exits with 1 if a license is unknown

`make licenses` installs the packages into FOLDER and runs this. It reads what they declare: the
license expression, else the classifiers, else the text of the license field, else the beginning of
their license file. A license is known if `KNOWN` has it: add one after you have read it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]

KNOWN = {
    "0BSD",
    "Apache Software License",
    "Apache-2.0",
    "BSD License",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "ISC License (ISCL)",
    "MIT",
    "MIT License",
    "MIT-0",
    "MIT-CMU",
    "MPL-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)",
    "PSF-2.0",
    "PostgreSQL",
    "Python Software Foundation License",
    "Unlicense",
    "Zlib",
}
"""Licenses under which a dependency may be used and named in a requirement."""

TEXTS = {
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "MIT License": "MIT",
    "BSD": "BSD License",
    "3-Clause BSD License": "BSD-3-Clause",
}
"""Spellings that packages write into the license field, and the license it names."""

BEGINNINGS = {"Apache License Version 2.0, January 2004": "Apache-2.0"}
"""Beginnings of license files, each with the license whose text begins so."""

_LABELS = {"License :: OSI Approved", "License :: DFSG approved"}
"""Classifiers that name no license."""

_OPERATOR = re.compile(r"\s+(?:AND|OR|WITH)\s+|[()]")


def licenses_of(found: Distribution) -> tuple[str, ...]:
    """The licenses that a package declares; empty if it declares none."""
    metadata = found.metadata
    if "License-Expression" in metadata:
        expression = metadata["License-Expression"]
        return tuple(filter(None, (part.strip() for part in _OPERATOR.split(expression))))
    prefix = "License :: "
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier") or ()
        if line.startswith(prefix) and line not in _LABELS
    ]
    if classifiers:
        return tuple(classifiers)
    text = metadata["License"].strip().splitlines() if "License" in metadata else []
    return (TEXTS.get(text[0], text[0]),) if text else _by_its_text(found)


def _by_its_text(found: Distribution) -> tuple[str, ...]:
    """The license whose text a package has; empty if it has none that is known."""
    files = [file for file in found.files or () if file.name.upper().startswith("LICENSE")]
    texts = [" ".join(file.read_text().split()) for file in files]
    named = {name for each, name in BEGINNINGS.items() for text in texts if text.startswith(each)}
    return tuple(sorted(named))


def names(constraints: Path) -> Iterator[str]:
    """The normalized names of the packages of a constraints file."""
    for line in constraints.read_text().splitlines():
        name, equals, _ = line.partition("==")
        if equals and not name.startswith("#"):
            yield normalized(name)


def normalized(name: str) -> str:
    """The name of a package as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def main() -> int:
    """Runs the command; returns the exit code."""
    folder = sys.argv[1]
    declared = {
        normalized(found.metadata["Name"]): licenses_of(found)
        for found in distributions(path=[folder])
    }
    unknown = 0
    for name in names(ROOT / "constraints.txt"):
        licenses = declared.get(name, ())
        is_known = bool(licenses) and KNOWN.issuperset(licenses)
        unknown += not is_known
        print(f"{name}: {', '.join(licenses) or 'none declared'}{'' if is_known else '  UNKNOWN'}")
    print(f"{unknown} unknown", file=sys.stderr)
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
