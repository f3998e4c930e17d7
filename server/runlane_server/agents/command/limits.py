"""The resource limits of a program.

A process has to set its limits itself, between fork and exec: limits set from outside would come
after the program has begun. So the launcher sets them (`launcher.py`).
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

CPU_GRACE = 2
"""Seconds of CPU time between SIGXCPU, which a program may catch to clean up, and SIGKILL."""

Rlimit: TypeAlias = tuple[str, int, int]
"""The name of a limit in the module `resource`, its soft and its hard value."""


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """Limits of a program and of each process that it starts. 0 keeps the server's own limit.

    No limit can exceed the server's. `cpu` is in seconds; `memory` (address space) and `file_size`
    (of each file it writes) are in bytes; `files` is the number of open files. `processes` counts
    all processes and threads of the server's user, the server's own included, and does not apply to
    root. Core dumps are always off: one would contain the prompt.
    """

    cpu: int = 0
    memory: int = 0
    files: int = 0
    processes: int = 0
    file_size: int = 0

    def describe_signal(self, number: int) -> str | None:
        """Describes the limit that a signal reports; None if it reports none.

        The other limits have no signal: a program that gets no memory, file or process handles
        that itself.
        """
        if number == signal.SIGXCPU and self.cpu:
            return f"its limit of {self.cpu} s of CPU time (--command-cpu)"
        if number == signal.SIGXFSZ and self.file_size:
            return f"its limit of {self.file_size} bytes in a file (--command-file-size)"
        return None

    def rlimits(self) -> list[Rlimit]:
        """The limits that are set, in the order in which to apply them."""
        every = [
            ("RLIMIT_CPU", self.cpu, self.cpu + CPU_GRACE),
            ("RLIMIT_FSIZE", self.file_size, self.file_size),
            ("RLIMIT_NOFILE", self.files, self.files),
            ("RLIMIT_NPROC", self.processes, self.processes),
            # Last, as setting the others needs memory.
            ("RLIMIT_AS", self.memory, self.memory),
        ]
        return [("RLIMIT_CORE", 0, 0), *(limit for limit in every if limit[1])]


def apply_rlimits(limits: Iterable[Rlimit]) -> None:
    """Limits this process. Raises OSError or ValueError."""
    for name, soft, hard in limits:
        kind = getattr(resource, name)
        most = resource.getrlimit(kind)[1]
        most = sys.maxsize if most == resource.RLIM_INFINITY else most
        resource.setrlimit(kind, (min(soft, most), min(hard, most)))
