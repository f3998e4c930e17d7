"""Starts a program with limits of its own on what it may use.

Limits are set by a process for itself, between fork and exec. Code of ours cannot run there in a
process that has threads, and limits that are set from outside come after the program has begun. So
a small interpreter of its own is started, which sets the limits and then becomes the program: it
has the same process id, arguments and environment, and no shell is in between. That costs a run
some 10 ms.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CPU_GRACE = 2
"""Seconds of CPU time between SIGXCPU, which a program may catch to tidy up, and SIGKILL."""

CANNOT_START = 126
"""The exit code where the program cannot become one, as with a shell."""

# An interpreter changes what a program would inherit: it ignores two signals, and in a C locale it
# sets LC_CTYPE (PEP 538). Both are undone.
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
    """What a program, and each process that it starts, may use. 0 leaves what the server has.

    None can be raised above what the server itself is bound to. `cpu` in seconds, `memory` (address
    space) and `file_size` (of each file it writes) in bytes, `files` open at a time. `processes`
    counts otherwise: all processes and threads of the user that the server runs as, its own among
    them, and the kernel does not bind root by it. There is never a core dump: it would hold what a
    prompt said.
    """

    cpu: int = 0
    memory: int = 0
    files: int = 0
    processes: int = 0
    file_size: int = 0

    def describe_signal(self, number: int) -> str | None:
        """The limit that a signal tells of, for people; None where it tells of none.

        Of the others no signal tells: a program that gets no memory, file or process ends as it
        likes.
        """
        if number == signal.SIGXCPU and self.cpu:
            return f"its limit of {self.cpu} s of CPU time (--command-cpu)"
        if number == signal.SIGXFSZ and self.file_size:
            return f"its limit of {self.file_size} bytes in a file (--command-file-size)"
        return None


def launcher_argv(argv: Sequence[str], env: Mapping[str, str], limits: ResourceLimits) -> list[str]:
    """The argv that starts a program with these limits. `argv` begins with its absolute path, and
    `env` is the environment that it is started with."""
    ctype = f"={env['LC_CTYPE']}" if "LC_CTYPE" in env else ""
    return [sys.executable, "-I", "-S", "-c", _SCRIPT, _limits(limits), ctype, *argv]


def _limits(limits: ResourceLimits) -> str:
    """What the script reads: the name, the soft and the hard limit of each."""
    pairs = {
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_CPU": (limits.cpu, limits.cpu + CPU_GRACE),
        "RLIMIT_FSIZE": (limits.file_size, limits.file_size),
        "RLIMIT_NOFILE": (limits.files, limits.files),
        "RLIMIT_NPROC": (limits.processes, limits.processes),
        # Behind all that needs some.
        "RLIMIT_AS": (limits.memory, limits.memory),
    }
    return " ".join(
        f"{name}:{soft}:{hard}"
        for name, (soft, hard) in pairs.items()
        if soft or name == "RLIMIT_CORE"
    )
