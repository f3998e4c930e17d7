"""Finds and signals everything that descends from this process.

A process that calls `adopt_orphans` remains the ancestor of all that its children start, even if
they create process groups and sessions or fork many times: an orphan becomes its child.
Out of reach are processes that another process started on request, such as those of systemd, cron
or a container engine, and those that may not be signalled, such as a setuid program of root.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator

HAS_CHILDREN_FILES = os.path.exists(f"/proc/self/task/{os.getpid()}/children")  # noqa: PTH110
"""Whether the kernel lists the children of a process (CONFIG_PROC_CHILDREN)."""


def children_of(pid: int) -> list[int]:
    """The children of a process that are not yet reaped."""
    return _listed_children(pid) if HAS_CHILDREN_FILES else _scanned_children(pid)


def signal_descendants(number: int, *, spare: Collection[int] = ()) -> None:
    """Signals all descendants of this process but the children in `spare` and theirs.

    One that starts meanwhile may be missed: to end them all, repeat it until no child is left.
    """
    root = os.getpid()
    seen = set(spare)
    found = [(child, root) for child in children_of(root)]
    while found:
        pid, parent = found.pop()
        if pid not in seen:
            seen.add(pid)
            # Listed before the signal, which may end the process and hand its children over.
            found += [(child, pid) for child in children_of(pid)]
            _signal(pid, number, {parent, root})


def reap() -> Iterator[tuple[int, int]]:
    """Yields the id and exit code of each child that has ended; the negative number of the signal
    if one ended it."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, os.waitstatus_to_exitcode(status)


def has_children() -> bool:
    """Whether any child is left, running or not reaped."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _signal(pid: int, number: int, parents: Collection[int]) -> None:
    """Signals a process if one of these is its parent: the id may already belong to another."""
    pidfd = None
    try:
        pidfd = os.pidfd_open(pid)
        if _parent_of(pid) in parents:
            signal.pidfd_send_signal(pidfd, number)
    except OSError:
        pass  # it has ended, or belongs to another user
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _listed_children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:  # noqa: PTH123
                found += map(int, file.read().split())
    except OSError:
        pass  # it has ended
    return found


def _scanned_children(pid: int) -> list[int]:
    every = [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208
    return [one for one in every if _parent_of(one) == pid]


def _parent_of(pid: int) -> int:
    """The parent's id; 0 if the process has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            # The name of the program, in brackets, may contain anything.
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0
