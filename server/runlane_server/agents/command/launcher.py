"""The process that starts one program and stays until everything that the program started is gone.

The guardian forks one for each run. It is a process of its own because only a parent can adopt the
orphans of a program, and because it survives the server: it ends the program when the server is
gone. Like the guardian it has one thread, so it may run Python between fork and exec.

The control socket to the server carries lines to the server,

    launcher PID        the launcher runs
    started PID         the program runs
    failed ERRNO        the program could not be started
    exited CODE         the program has exited; others that it started may still run
    gone                no process of the run is left

and single bytes from it (`TERMINATE`, `KILL`). Its end means that the server is gone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from runlane_server.agents.command.cgroup import join_cgroup, kill_cgroup, remove_cgroup
from runlane_server.agents.command.limits import Rlimit, apply_rlimits
from runlane_server.agents.command.prctl import adopt_orphans
from runlane_server.agents.command.process_tree import has_children, reap, signal_descendants

TERMINATE = b"t"
"""Order to send SIGTERM to every process of the run."""

KILL = b"k"
"""Order to send SIGKILL to every process of the run until none is left."""

REMNANT_GRACE = 0.5
"""Seconds that other processes of the run have after SIGTERM once the program itself has exited."""

KILL_INTERVAL = 0.005
"""Seconds between two rounds of SIGKILL."""

KILL_TIMEOUT = 5.0
"""Seconds after which the launcher gives up on processes that it cannot kill."""

_DEFAULT_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    *(signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ),
)
"""The signals that the launcher or its interpreter handles or ignores."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program to start. `grace` is the time in seconds between SIGTERM and SIGKILL if the server
    is gone. `cgroup` is the directory of the control group for it, if there is one."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    grace: float
    limits: Sequence[Rlimit] = ()
    cgroup: str = ""

    def to_json(self) -> bytes:
        """The command as bytes. Words keep their bytes, also if they are not UTF-8."""
        fields = {
            "argv": [_to_text(word) for word in self.argv],
            "env": {_to_text(name): _to_text(value) for name, value in self.env.items()},
            "cwd": _to_text(self.cwd),
            "grace": self.grace,
            "limits": self.limits,
            "cgroup": _to_text(self.cgroup),
        }
        return json.dumps(fields).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Command:
        """The command that `to_json` was called on."""
        fields = json.loads(data)
        return cls(
            argv=[_to_word(text) for text in fields["argv"]],
            env={_to_word(name): _to_word(text) for name, text in fields["env"].items()},
            cwd=_to_word(fields["cwd"]),
            grace=fields["grace"],
            limits=[(name, soft, hard) for name, soft, hard in fields["limits"]],
            cgroup=_to_word(fields["cgroup"]),
        )


def _to_text(word: str) -> str:
    """The bytes of a word, one character each."""
    return os.fsencode(word).decode("latin-1")


def _to_word(text: str) -> str:
    return os.fsdecode(text.encode("latin-1"))


def run_launcher(control: socket.socket, command_file: int, stdio: Sequence[int]) -> None:
    """Runs a program to its end. Must be called in a new process.

    `command_file` is a file with a `Command` as JSON, `stdio` the program's three standard streams.
    """
    _report(control, f"launcher {os.getpid()}")
    adopt_orphans()
    wakeups = _wake_on_exits()
    try:
        with open(command_file, "rb") as file:
            command = Command.from_json(file.read())
        program = _start(command, stdio)
    except OSError as exc:
        _report(control, f"failed {exc.errno or errno.EIO}")
        return
    for stream in stdio:
        os.close(stream)
    _report(control, f"started {program}")
    _Launcher(control, wakeups, program, command).run()
    if command.cgroup and not remove_cgroup(command.cgroup):
        kill_cgroup(command.cgroup)


class _Launcher:
    """Watches the processes of a run that has started."""

    def __init__(
        self, control: socket.socket, wakeups: int, program: int, command: Command
    ) -> None:
        self._control = control
        self._wakeups = wakeups
        self._program = program
        self._grace = command.grace
        self._cgroup = command.cgroup
        self._exited = False
        self._orphaned = False
        self._kill_at = float("inf")

    def run(self) -> None:
        """Returns when no process is left, or none that it can kill."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wakeups, select.POLLIN)
        while self._are_left():
            for file, _ in poll.poll(self._timeout_ms()):
                if file == self._wakeups:
                    os.read(self._wakeups, 4096)
                elif not self._obey():
                    poll.unregister(self._control)
            now = time.monotonic()
            if now >= self._kill_at + KILL_TIMEOUT:
                return
            if now >= self._kill_at:
                if self._cgroup:
                    kill_cgroup(self._cgroup)
                signal_descendants(signal.SIGKILL)

    def _are_left(self) -> bool:
        """Reaps and reports; returns whether processes are left."""
        lines = []
        for pid, code in reap():
            if pid == self._program and not self._exited:
                self._exited = True
                lines.append(f"exited {code}")
                if self._orphaned:
                    self._kill_at = min(self._kill_at, time.monotonic() + REMNANT_GRACE)
        left = has_children()
        if not left:
            lines.append("gone")
        if lines:
            _report(self._control, *lines)
        return left

    def _timeout_ms(self) -> float | None:
        if self._kill_at == float("inf"):
            return None
        return max(self._kill_at - time.monotonic(), KILL_INTERVAL) * 1000

    def _obey(self) -> bool:
        """Reads and follows orders; returns whether more may come."""
        try:
            orders = self._control.recv(64)
        except OSError:
            orders = b""
        if KILL in orders:
            self._kill_at = min(self._kill_at, time.monotonic())
        elif TERMINATE in orders:
            signal_descendants(signal.SIGTERM)
        elif not orders:
            self._end_without_server()
        return bool(orders)

    def _end_without_server(self) -> None:
        signal_descendants(signal.SIGTERM)
        self._orphaned = True
        grace = REMNANT_GRACE if self._exited else self._grace
        self._kill_at = min(self._kill_at, time.monotonic() + grace)


def _wake_on_exits() -> int:
    """Returns a file that becomes readable when a child exits."""
    wakeups, writer = os.pipe()
    os.set_blocking(wakeups, False)
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return wakeups


def _report(control: socket.socket, *lines: str) -> None:
    with contextlib.suppress(OSError):  # the server is gone
        control.sendall("".join(f"{line}\n" for line in lines).encode())


def _start(command: Command, stdio: Sequence[int]) -> int:
    """Starts the program; returns its process id. Raises OSError."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become_program(command, stdio, writer)
    os.close(writer)
    # Closed by the exec: no data means that the program runs.
    number = os.read(reader, 16)
    os.close(reader)
    if number:
        os.waitpid(pid, 0)
        raise OSError(int(number), os.strerror(int(number)))
    return pid


def _become_program(command: Command, stdio: Sequence[int], failure: int) -> NoReturn:
    """Replaces this process, a new one, by the program."""
    number = errno.EINVAL
    try:
        os.setsid()
        if command.cgroup:
            join_cgroup(command.cgroup)
        signal.set_wakeup_fd(-1)
        for one in _DEFAULT_SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        for target, stream in enumerate(stdio):
            os.dup2(stream, target)
        os.chdir(command.cwd)
        apply_rlimits(command.limits)
        os.execve(command.argv[0], list(command.argv), command.env)  # noqa: S606 - no shell is what we want
    except OSError as exc:
        number = exc.errno or number
    finally:
        os.write(failure, str(number).encode())
        os._exit(1)
