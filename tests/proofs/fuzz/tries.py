"""The results of tried inputs: their number, the crashes, and the slowest time."""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TOO_SLOW = 5.0
"""Maximum seconds for one input; a slower one could be used to overload a server."""


class Broken(Exception):
    """An invariant that an input broke."""


@dataclass
class Tries:
    """The figures of a target. `folder` gets one crashing input of each kind."""

    name: str
    folder: Path
    inputs: int = 0
    slowest: float = 0.0
    crashes: dict[str, str] = field(default_factory=dict)

    def take(self, call: Callable[[bytes], object], data: bytes) -> None:
        """Tries one input. Any exception is a crash."""
        self.inputs += 1
        began = time.perf_counter()
        try:
            call(data)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            self.crashed(data, error)
        seconds = time.perf_counter() - began
        self.slowest = max(self.slowest, seconds)
        if seconds > TOO_SLOW:
            self.crashed(data, Broken(f"took {seconds:.0f} s"))

    def crashed(self, data: bytes, error: BaseException) -> None:
        """Saves an input, and its traceback in a file beside it."""
        frames = traceback.extract_tb(error.__traceback__)
        # Only lines of our code: those of a library differ with the depth of its recursion.
        ours = [
            f"{Path(at.filename).name}:{at.lineno}" for at in frames if "runlane" in at.filename
        ]
        place = ours[-1] if ours else str(error)[:80]
        kind = f"{type(error).__name__} at {place}"
        if kind in self.crashes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}-{hashlib.sha256(data).hexdigest()[:16]}"
        path.write_bytes(data)
        text = "".join(traceback.format_exception(error, limit=-12))
        path.with_suffix(".txt").write_text(text, encoding="utf-8", errors="backslashreplace")
        self.crashes[kind] = str(path)

    def save(self, path: Path) -> None:
        """Writes the figures for another process, atomically."""
        figures = {"inputs": self.inputs, "slowest": self.slowest, "crashes": self.crashes}
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(figures))
        fresh.replace(path)

    def load(self, path: Path) -> None:
        """Reads the figures that `save` wrote."""
        figures = json.loads(path.read_text())
        self.inputs += figures["inputs"]
        self.slowest = max(self.slowest, figures["slowest"])
        self.crashes.update(figures["crashes"])
