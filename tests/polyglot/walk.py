"""Walks through a page as its reader does: types its commands and compares the output."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from polyglot.languages import environment
from polyglot.pages import (
    Commands,
    Expected,
    File,
    Prose,
    Samples,
    Step,
    found_in_order,
    steps_of,
)
from polyglot.program import Output, Program

BLOCK_SECONDS = 400.0
"""Limit for the commands of a block; the first time they fetch libraries."""

SECONDS = 60.0
"""Limit for each wait; a server may drain for half of it."""

PAGE_PORT = "50051"
"""The port on the pages."""

SERVER = re.compile(
    r"make run(?: AGENT=\S+)?"
    r"|(?:\.venv/bin/)?runlane-server --(?!help|version)(?:\\\n|[^|&\n])*"
)
"""Commands that start a server, which runs until Ctrl-C."""

WATCHER = re.compile(
    r"python subscriber\.py \S+|python receiver\.py|grpcurl .*/SubscribeRunComplete"
    r"|runlane (?:watch|worker) .*|\./worker"
)
"""Commands that print until Ctrl-C."""

OF_WATCHER = re.compile(r"[Tt]he (?:subscriber|receiver) says|[Ww]atch the subscriber|Both say")
"""In the prose before an output: it belongs to a running program, not to the commands above."""

_SHELL = """
if [ -e "$STATE" ]; then . "$STATE"; fi
cd "$1"
if [ "$3" = ends ]; then
    trap 'code=$?; export -p > "$STATE"; pwd > "$STATE.folder"; exit $code' EXIT
fi
set -e
. "$2"
"""
"""A terminal: each block starts with the folder and the environment that the previous one left. A
program that runs until Ctrl-C has its own terminal, and leaves nothing."""


COLUMNS = "110"
"""The width of the screen on the pages."""

_ON_A_SCREEN = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
"""Runs a program on a pseudo-terminal, and copies to stdout what it writes there."""

_CONTROL = re.compile(r"(\r\n|\n|\r|\x1b\[1A|\x1b\[2K|\x1b\[[0-9;?]*[A-Za-z])")


def on_screen(written: str) -> str:
    """The text that remains visible on a terminal after this output."""
    lines = [""]
    for piece in _CONTROL.split(written):
        match piece:
            case "\n" | "\r\n":
                lines.append("")
            case "\x1b[1A":
                lines = lines[: max(1, len(lines) - 1)]
            case "\r" | "\x1b[2K":
                # A program that returns to the start of a line rewrites all of it.
                lines[-1] = ""
            case _ if not piece.startswith("\x1b"):
                lines[-1] += piece
    shown = "\n".join(lines).rstrip()
    return f"{shown}\n" if shown else ""


class Terminal(Program):
    """A program in a terminal; signals reach all processes that it has started."""

    seen = 0
    """The number of lines that the walk has already compared."""

    async def interrupt(self) -> None:
        """Presses Ctrl-C; returns when all of them have ended."""
        await self._end(signal.SIGINT)

    async def kill(self) -> None:
        """Kills it and all processes that it has started."""
        await self._end(signal.SIGKILL)

    async def _end(self, number: signal.Signals) -> None:
        # After the end of all, another group may have this number.
        if self.process.returncode is None or not all(reader.done() for reader in self.readers):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        async with asyncio.timeout(SECONDS):
            await self.process.wait()
            await asyncio.gather(*self.readers)


@dataclass(frozen=True, slots=True)
class Done:
    """Commands that have ended."""

    command: str
    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Their whole output, for a message."""
        return f"$ {self.command}\nexit {self.code}\n--- stdout\n{self.out}--- stderr\n{self.err}"


class Walk:
    """A reader of one page, with a checkout in the folder `runlane`, and a port.

    With `screen` commands run on a terminal, and the page has what appears there, stderr included.
    """

    def __init__(
        self, page: str, folder: Path, port: int, env: Mapping[str, str], *, screen: bool = False
    ) -> None:
        self.steps = list(steps_of(page.replace(PAGE_PORT, str(port))))
        self.folder = folder
        self.checkout = folder / "runlane"
        self.place = self.checkout
        self._screen = screen
        self._samples = Samples()
        self._server: Terminal | None = None
        self._watchers: list[Terminal] = []
        self._started: list[Terminal] = []
        self._done: Done | None = None
        self._last = ""
        address = f"127.0.0.1:{port}"
        settings = {"RUNLANE_LISTEN": address, "RUNLANE_SERVER": address, "NO_COLOR": "1"}
        if screen:
            settings |= {"COLUMNS": COLUMNS, "TERM": "xterm"}
        self._env = _outside({**env, **settings, "STATE": str(folder / "terminal")})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for program in self._started:
            await program.kill()

    async def walk(self) -> None:
        """Takes all steps; raises AssertionError if the page is wrong."""
        aside = False
        for step in self.steps:
            if not isinstance(step, Expected):
                self._went_well(step)
            match step:
                case Prose(text):
                    aside = OF_WATCHER.search(text) is not None
                    await self._follow(text)
                case File(path, text):
                    (self.place / path).parent.mkdir(parents=True, exist_ok=True)
                    (self.place / path).write_text(text)
                case Commands(text):
                    aside = False
                    await self._typed(self._samples.exchanged(text).strip())
                case Expected():
                    await self._seen(step, aside=aside)
        self._went_well(None)

    # --- Instructions in the prose ----------------------------------------------------------------

    async def _follow(self, text: str) -> None:
        """Follows the instructions of a paragraph, in their order."""
        orders: Mapping[str, Callable[[], Awaitable[None]]] = {
            "in the folder that `runlane` is in": self._go_outside,
            "stop the server with ctrl-c": self._end_server,
            "stop the subscriber with ctrl-c": self._end_watcher,
            "stop the watch with ctrl-c": self._end_watcher,
            "start it again with `make run`": self._start_again,
            "run the program again": self._repeat,
        }
        text = text.lower()
        for order in sorted((one for one in orders if one in text), key=text.index):
            await orders[order]()

    async def _go_outside(self) -> None:
        self.place = self.folder

    async def _end_server(self) -> None:
        assert self._server is not None
        await self._server.interrupt()

    async def _end_watcher(self) -> None:
        await self._watchers.pop().interrupt()

    async def _start_again(self) -> None:
        await self._serve("make run")

    async def _repeat(self) -> None:
        self._went_well(None)
        await self._run(self._last.splitlines()[-1])

    # --- Commands ---------------------------------------------------------------------------------

    async def _typed(self, command: str) -> None:
        if SERVER.fullmatch(command):
            await self._serve(command)
        elif WATCHER.fullmatch(command):
            watcher = await self._start(command, self.place)
            self._watchers.append(watcher)
            # A reader continues only after something has appeared.
            await self._shows(watcher, lambda out: bool(out.lines), "a line")
        else:
            await self._run(command)

    async def _serve(self, command: str) -> None:
        """Starts a server in its own terminal."""
        self._server = await self._start(command, self.checkout)
        await self._shows(
            self._server, lambda out: "runlane-server listening on " in out.text, "a server"
        )

    async def _run(self, command: str) -> None:
        """Runs commands to their end."""
        program = await self._start(command, self.place, "ends")
        try:
            async with asyncio.timeout(BLOCK_SECONDS):
                code = await program.process.wait()
                await asyncio.gather(*program.readers)
        except TimeoutError:
            raise AssertionError(f"$ {command}\ndoes not end{program.said}") from None
        self.place = Path((self.folder / "terminal.folder").read_text().strip())
        self._last = command
        out = on_screen(program.out.text) if self._screen else program.out.text
        self._done = Done(command, code, out, program.err.text)

    async def _start(self, command: str, place: Path, until: str = "ctrl-c") -> Terminal:
        script = self.folder / f"block-{len(self._started)}.sh"
        script.write_text(f"{command}\n")
        wrapped = self._screen and until == "ends"
        process = await asyncio.create_subprocess_exec(
            *((sys.executable, "-c", _ON_A_SCREEN) if wrapped else ()),
            *("bash", "-c", _SHELL, "bash", str(place), str(script), until),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            env=self._env,
            start_new_session=True,
        )
        program = Terminal(process)
        self._started.append(program)
        return program

    # --- Output -----------------------------------------------------------------------------------

    async def _seen(self, expected: Expected, *, aside: bool) -> None:
        if aside or self._done is None:
            assert self._watchers, f"nothing is there to show this:\n{expected.text}"
            for watcher in self._watchers:
                await self._seen_in(watcher, expected)
            return
        done, self._done = self._done, None
        if expected.of_failure:
            lines = (done.out + done.err).splitlines()
            well = done.code != 0 and found_in_order(expected.lines, lines, self._samples)
        else:
            well = done.code == 0 and self._samples.learn(expected.lines, done.out.splitlines())
        assert well, f"{done.said}--- the page has\n{expected.text}"

    async def _seen_in(self, watcher: Terminal, expected: Expected) -> None:
        """Waits until a running program prints it, after the lines compared before."""

        def found(output: Output) -> int | None:
            return found_in_order(expected.lines, output.lines[watcher.seen :], self._samples)

        await self._shows(watcher, lambda out: found(out) is not None, expected.text)
        watcher.seen += found(watcher.out) or 0

    async def _shows(self, program: Terminal, holds: Callable[[Output], bool], what: str) -> None:
        try:
            await program.out.until(holds, SECONDS)
        except TimeoutError:
            raise AssertionError(f"there is not\n{what}{program.said}") from None
        assert holds(program.out), f"it ended without\n{what}{program.said}"

    def _went_well(self, following: Step | None) -> None:
        """Checks that the last commands succeeded, unless the page shows their failure."""
        if self._done is not None and not isinstance(following, Prose):
            assert self._done.code == 0, self._done.said
            self._done = None


def _outside(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a terminal without the virtual environment of this process."""
    env = environment(more)
    own = {str(Path(sys.executable).parent), str(Path(sys.prefix) / "bin")}
    folders = [each for each in env["PATH"].split(os.pathsep) if each not in own]
    env["PATH"] = os.pathsep.join(folders)
    return {key: value for key, value in env.items() if key not in {"VIRTUAL_ENV", "PYTHONPATH"}}
