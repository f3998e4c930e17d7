"""Starts a program with resource limits.

A process has to set its limits itself, between fork and exec. Python code must not run there in a
process that has threads, and limits set from outside would come after the program has begun. So a
small interpreter is started, which sets the limits and then replaces itself with the program by
exec: same process id, arguments and environment, and no shell involved. This costs about 10 ms per
run.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CPU_GRACE = 2
"""Seconds of CPU time between SIGXCPU, which a program may catch to clean up, and SIGKILL."""

CANNOT_START = 126
"""The exit code if the program cannot be executed, as in a shell."""

# The interpreter ignores two signals and, in a C locale, sets LC_CTYPE (PEP 538). The program would
# inherit both, so the script undoes them.
_SCRIPT = f"""
import os, resource, sys
from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal

_, limits, ctype, *argv = sys.argv
for number in (SIGPIPE, SIGXFSZ):
    signal(number, SIG_DFL)
os.environ.pop("LC_CTYPE", None)
if ctype:
    os.environ["LC_CTYPE"] = ctype[1:]
try:
    for limit in limits.split():
        name, soft, hard = limit.split(":")
        kind = getattr(resource, name)
        most = resource.getrlimit(kind)[1]
        most = sys.maxsize if most == resource.RLIM_INFINITY else most
        resource.setrlimit(kind, (min(int(soft), most), min(int(hard), most)))
    os.execv(argv[0], argv)
except (OSError, ValueError) as error:
    sys.stderr.write(f"cannot start {{argv[0]}}: {{error}}\\n")
    sys.exit({CANNOT_START})
"""


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


def launcher_argv(argv: Sequence[str], env: Mapping[str, str], limits: ResourceLimits) -> list[str]:
    """Returns the argv that starts a program with these limits.

    `argv` begins with the absolute path of the program; `env` is its environment.
    """
    ctype = f"={env['LC_CTYPE']}" if "LC_CTYPE" in env else ""
    return [sys.executable, "-I", "-S", "-c", _SCRIPT, _limits(limits), ctype, *argv]


def _limits(limits: ResourceLimits) -> str:
    """The input of the script: name:soft:hard of each limit, separated by spaces."""
    pairs = {
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_CPU": (limits.cpu, limits.cpu + CPU_GRACE),
        "RLIMIT_FSIZE": (limits.file_size, limits.file_size),
        "RLIMIT_NOFILE": (limits.files, limits.files),
        "RLIMIT_NPROC": (limits.processes, limits.processes),
        # Last, as setting the others needs memory.
        "RLIMIT_AS": (limits.memory, limits.memory),
    }
    return " ".join(
        f"{name}:{soft}:{hard}"
        for name, (soft, hard) in pairs.items()
        if soft or name == "RLIMIT_CORE"
    )
