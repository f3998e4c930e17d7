"""Code of agents that is loaded again when its files change, for development."""

from __future__ import annotations

import importlib
import logging
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runlane.worker.events import AgentError

log = logging.getLogger(__name__)

KEPT = frozenset({"runlane", "runlane_server", "runlane_web", "runlane_a2a", "__main__"})
"""Packages that are never loaded again: their classes are in use."""


INSTALLED = frozenset({"site-packages", "dist-packages"})
"""Folders of installed packages."""

_STANDARD = [Path(sysconfig.get_path(one)).resolve() for one in ("stdlib", "platstdlib")]


class Code:
    """`MODULE:ATTRIBUTE`: the module, and the modules of its folder that it imports."""

    def __init__(self, module: str, attribute: str) -> None:
        self.name = f"{module}:{attribute}"
        self._module = module
        self._attribute = attribute
        self._stamps: dict[Path, tuple[int, int]] = {}
        # A cached file is taken for fresh if the source changes within a second.
        sys.dont_write_bytecode = True

    def load(self) -> Any:
        """Imports the module; returns the attribute. Raises what the module raises."""
        for name, _ in list(self._modules()):
            del sys.modules[name]
        importlib.invalidate_caches()
        self._stamps.clear()
        found: Any = importlib.import_module(self._module)
        for part in self._attribute.split("."):
            found = getattr(found, part)
        self._stamps = {path: _stamp(path) for _, path in self._modules()}
        return found

    @property
    def has_changed(self) -> bool:
        """Whether a file has changed since it was loaded, or the module could not be loaded."""
        return not self._stamps or any(
            _stamp(path) != stamp for path, stamp in self._stamps.items()
        )

    def _modules(self) -> Iterator[tuple[str, Path]]:
        """The module and those of its folder, as far as they are loaded."""
        top = self._module.partition(".")[0]
        file = _file(top)
        if file is None or top in KEPT:
            return
        folder = file.parents[1] if file.name == "__init__.py" else file.parent
        for name in list(sys.modules):
            path = _file(name)
            package = name.partition(".")[0]
            if path is not None and package not in KEPT:
                is_beside = path.is_relative_to(folder) and not _is_installed(path)
                if package == top or is_beside:
                    yield name, path


class ReloadingFunction:
    """A function whose code is loaded again before a run if its files have changed. Runs under way
    go on with the code that they have."""

    def __init__(self, code: Code) -> None:
        self._code = code
        self._function: Any = code.load()

    def current(self) -> Any:
        """The function. Raises AgentError if it cannot be loaded."""
        if self._code.has_changed:
            try:
                self._function = self._code.load()
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise AgentError(f"cannot import {self._code.name}: {what}") from error
            log.info("loaded %s again", self._code.name)
        return self._function

    def __call__(self, turn: Any) -> Any:
        """Calls the function."""
        return self.current()(turn)


def _file(name: str) -> Path | None:
    found = getattr(sys.modules.get(name), "__file__", None)
    return Path(found).resolve() if isinstance(found, str) else None


def _is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    return any(path.is_relative_to(one) for one in _STANDARD) or not INSTALLED.isdisjoint(
        path.parts
    )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size
