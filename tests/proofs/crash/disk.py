"""A simulated disk: `disk.c`, and the switches of its faults."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

SOURCE = Path(__file__).with_name("disk.c")


class NoCompiler(Exception):
    """The disk needs a C compiler, and there is none."""


@cache
def library() -> Path:
    """The compiled `disk.c`; raises NoCompiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise NoCompiler("there is no C compiler (cc)")
    made = Path(mkdtemp(prefix="runlane-disk-")) / "disk.so"
    flags = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-o", str(made), str(SOURCE))
    subprocess.run([compiler, *flags, "-ldl", "-lpthread"], check=True)
    return made


class Disk:
    """The disk of one server at a time. `folder` holds what survives a power cut."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._shadow = folder / "shadow"
        self._shadow.mkdir()
        self._control = folder / "control"
        self.set()
        self.env = {
            "LD_PRELOAD": str(library()),
            "DISK_CONTROL": str(self._control),
            "DISK_SHADOW": str(self._shadow),
        }
        """Variables for the environment of the server."""

    def set(
        self,
        *,
        fail_syncs: int = -1,
        fail_writes: int = -1,
        ignore_syncs: int = 0,
        read_only: int = 0,
    ) -> None:
        """Sets the faults from now on; see `disk.c` for each."""
        faults = struct.pack("4i", fail_syncs, fail_writes, ignore_syncs, read_only)
        # In place, as the server has mapped the file.
        descriptor = os.open(self._control, os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(descriptor, faults, 0)
        os.close(descriptor)

    def cut_power(self, folder: Path) -> None:
        """Replaces the files in a server's folder by what survives. The server must have ended."""
        for path in folder.glob("*.db*"):
            if path.suffix in {".db", ".db-wal", ".db-shm"}:
                path.unlink()
        for path in self._shadow.iterdir():
            shutil.copy(path, folder)
