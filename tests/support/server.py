"""Starts, signals and ends real server processes, as an operator would.

Every test, proof and benchmark that needs a server in a process of its own starts it here. A
server in the process of the test is `runlane_server.testing.LocalServer`, or `support.rpc_wire`
where a test needs the parts of a server.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import IO

from support.processes import wait_for_exit
from support.staging import SECONDS

PROGRAM = (sys.executable, "-m", "runlane_server")

START_SECONDS = 2 * SECONDS
"""Timeout of a start: an agent may import large libraries, on a machine that is busy."""

FREE_PORT = "127.0.0.1:0"

_LISTENING = " listening on "
_LOG = "server.log"


def clean_environment() -> dict[str, str]:
    """The environment of this process, without settings of Runlane, and with its import path."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RUNLANE_")}
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path)}


class ListeningProcess:
    """A process whose first line on stdout ends with `listening on ADDRESS`.

    Its stderr is appended to `server.log` in its folder. `env` replaces the environment of this
    process.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, *, env: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.address = ""
        self._command = command
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started last."""
        assert self._process is not None, "the process has not been started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process has been started and has ended."""
        return self._process is not None and self._process.poll() is not None

    @property
    def log(self) -> str:
        """The text of the log so far."""
        return (self.folder / _LOG).read_text(errors="replace")

    async def logs(self, text: str) -> None:
        """Waits until the log has the text. Others may notice an event before its line is there."""
        async with asyncio.timeout(SECONDS):
            while text not in self.log:
                assert not self.has_ended or text in self.log, self.log
                await asyncio.sleep(0.02)

    def command(self) -> Sequence[str]:
        """The command that starts the process."""
        return self._command

    def launch(self, *more_flags: str, stderr: int | IO[bytes] | None = None) -> None:
        """Starts the process and returns at once. `stderr` replaces the log."""
        with (self.folder / _LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [*self.command(), *more_flags],
                stdout=PIPE,
                stderr=log if stderr is None else stderr,
                cwd=self.folder,
                env=self._env,
            )

    def wait_until_listening(self, seconds: float = START_SECONDS) -> None:
        """Blocks until the process has printed its address; fails if it prints anything else."""
        stdout = self.process.stdout
        assert stdout is not None
        poller = select.poll()
        poller.register(stdout, select.POLLIN)
        line = None
        if poller.poll(seconds * 1000):
            line = stdout.readline().decode()
            if _LISTENING in line:
                self.address = line.split()[-1]
                return
        if line == "":  # It is about to exit, and may still be writing its log.
            self.process.wait(seconds)
        self.kill_now()
        raise AssertionError(f"{self.command()} did not start: {line!r}\n{self.log[-4000:]}")

    async def start(self, *more_flags: str) -> None:
        """Starts the process, and returns once it listens."""
        self.launch(*more_flags)
        await asyncio.to_thread(self.wait_until_listening)

    def send(self, number: signal.Signals) -> None:
        """Sends the process a signal."""
        self.process.send_signal(number)

    async def wait(self) -> int:
        """Waits until the process has ended; returns its exit code."""
        if self.process.poll() is None:
            await wait_for_exit(self.pid)
        return self._reap()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends the process with a signal, if it runs; returns the exit code."""
        if self._process is None:
            return 0
        self.send(number)
        return await self.wait()

    async def kill(self) -> None:
        """Ends the process as a crash would."""
        await self.stop(signal.SIGKILL)

    def kill_now(self) -> None:
        """Kills the process, if it runs, and blocks until it has ended."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def _reap(self) -> int:
        code = self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code


class ServerProcess(ListeningProcess):
    """`runlane-server` in a folder. It keeps its address across restarts.

    `env` is added to the environment `base`, by default that of this process: a server under test
    works over the store that `RUNLANE_STORE` names. `listen` None leaves `--listen` to the other
    settings. `prefix` stands before the command.
    """

    def __init__(
        self,
        folder: Path,
        *flags: str,
        env: Mapping[str, str] | None = None,
        base: Mapping[str, str] | None = None,
        listen: str | None = FREE_PORT,
        prefix: Sequence[str] = (),
    ) -> None:
        whole = {**(os.environ if base is None else base), "NO_COLOR": "1", **(env or {})}
        super().__init__((*prefix, *PROGRAM), folder, env=whole)
        self._flags = flags
        self._listen = listen

    def command(self) -> Sequence[str]:
        # Before the flags: one of them may be another `--listen`.
        listen = () if self._listen is None else ("--listen", self.address or self._listen)
        return (*self._command, *listen, *self._flags)


@asynccontextmanager
async def serving(
    folder: Path,
    *flags: str,
    env: Mapping[str, str] | None = None,
    base: Mapping[str, str] | None = None,
    listen: str | None = FREE_PORT,
) -> AsyncIterator[ServerProcess]:
    """A server that listens; it is killed at the end."""
    server = ServerProcess(folder, *flags, env=env, base=base, listen=listen)
    try:
        await server.start()
        yield server
    finally:
        await server.kill()


@contextmanager
def serving_blocking(folder: Path, *flags: str, listen: str = FREE_PORT) -> Iterator[ServerProcess]:
    """The same for a test without an event loop; settings in the environment do not apply."""
    server = ServerProcess(folder, *flags, base=clean_environment(), listen=listen)
    try:
        server.launch()
        server.wait_until_listening()
        yield server
    finally:
        server.kill_now()


def run_to_exit(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Runs `runlane-server` until it exits by itself: exit code, stdout and stderr."""
    ended = subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**clean_environment(), **(env or {})},
        timeout=SECONDS,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


def start_fails(folder: Path, *flags: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """The exit code and the stderr of a server that cannot start."""
    code, out, err = run_to_exit(folder, *flags, env=env)
    assert out == ""
    return code, err
