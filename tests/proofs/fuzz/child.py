"""One parser under atheris: `python -m proofs.fuzz.child NAME FIGURES CRASHES CORPUS` and flags."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

with atheris.instrument_imports(include=["runlane", "runlane_server"]):
    from proofs.fuzz.targets import BY_NAME
from proofs.fuzz.tries import Tries

SAVED_EVERY = 0.25
"""Seconds between two saves: libFuzzer ends the process without notice to Python."""


def main() -> None:
    """Tries inputs until libFuzzer stops; saves crashing inputs and continues."""
    name, figures, crashes, *flags = sys.argv[1:]
    target, tries = BY_NAME[name], Tries(name, Path(crashes))
    saved = 0.0

    def one(data: bytes) -> None:
        nonlocal saved
        tries.take(target, data)
        if time.monotonic() - saved > SAVED_EVERY:
            saved = time.monotonic()
            tries.save(Path(figures))

    atheris.Setup([sys.argv[0], *flags], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
