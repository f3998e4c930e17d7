"""Control groups of Linux (cgroup v2): a process and all that it starts, to be ended at once.

A group is named by its directory. The launcher imports this, so it imports little.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress


def join_cgroup(group: str) -> None:
    """Moves this process into a group, if it is there and permitted."""
    _write(f"{group}/cgroup.procs", "0")


def kill_cgroup(group: str) -> None:
    """Sends SIGKILL to all processes of a group and of the groups below it, regardless of their
    user and parent."""
    _write(f"{group}/cgroup.kill", "1")


def remove_cgroup(group: str) -> bool:
    """Removes a group with all below it; returns whether it is gone. One with processes stays."""
    try:
        os.rmdir(group)  # noqa: PTH106
    except OSError as exc:
        return exc.errno == errno.ENOENT or (exc.errno == errno.EBUSY and _remove_tree(group))
    return True


def _remove_tree(group: str) -> bool:
    try:
        for below in _below(group):
            os.rmdir(below)  # noqa: PTH106
        os.rmdir(group)  # noqa: PTH106
    except OSError:
        return False
    return True


def _below(group: str) -> Iterator[str]:
    """The groups below a group, the lowest first. A program may have created them."""
    for folder, names, _ in os.walk(group, topdown=False):
        for name in names:
            yield os.path.join(folder, name)  # noqa: PTH118 - as `os.walk` names them


def _write(file: str, text: str) -> None:
    with suppress(OSError):
        handle = os.open(file, os.O_WRONLY)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)
