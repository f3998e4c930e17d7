"""A program under test as a process, and its output as it arrives."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from polyglot.languages import environment
from polyglot.projects import Project

SECONDS = 30.0
"""Timeout of everything that a test waits for, unless the test sets its own."""


class Output:
    """The output of a pipe so far."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self._bytes = b""
        self._news = asyncio.Condition()
        self._ended = False

    @property
    def text(self) -> str:
        """All text; without a last character whose bytes have not all arrived."""
        return self._bytes.decode(errors="ignore")

    @property
    def lines(self) -> list[str]:
        """All complete lines."""
        return self.text.split("\n")[:-1]

    async def read(self) -> None:
        """Reads until the pipe is closed."""
        while data := await self._stream.read(1 << 16):
            async with self._news:
                self._bytes += data
                self._news.notify_all()
        async with self._news:
            self._ended = True
            self._news.notify_all()

    async def until(self, holds: Callable[[Output], bool], seconds: float) -> None:
        """Waits for a condition, or for the end of the output."""
        async with asyncio.timeout(seconds), self._news:
            await self._news.wait_for(lambda: holds(self) or self._ended)


class Program:
    """A started process. A failed expectation shows all of its output."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self.out = Output(process.stdout)
        self.err = Output(process.stderr)
        self.readers = [asyncio.create_task(each.read()) for each in (self.out, self.err)]

    @property
    def said(self) -> str:
        """All output, for a message."""
        return f"\n--- stdout\n{self.out.text[-4000:]}\n--- stderr\n{self.err.text[-4000:]}"

    async def prints(self, text: str, seconds: float = SECONDS) -> None:
        """Waits for a text on stdout."""
        await self._until(self.out, lambda output: text in output.text, repr(text), seconds)

    async def reports(self, prefix: str, seconds: float = SECONDS, *, times: int = 1) -> str:
        """Waits for `times` lines on stderr with this prefix; returns the last one."""

        def found(output: Output) -> list[str]:
            return [line for line in output.lines if line.startswith(prefix)]

        enough = f"{times} x {prefix!r} on stderr"
        await self._until(self.err, lambda output: len(found(output)) >= times, enough, seconds)
        return found(self.err)[-1]

    async def exits(self, code: int, seconds: float = SECONDS) -> None:
        """Waits for the end of the process, and asserts its exit code."""
        await self.ends(seconds)
        assert self.process.returncode == code, f"exit {self.process.returncode}{self.said}"

    async def ends(self, seconds: float = SECONDS) -> None:
        """Waits for the end of the process, and of its output."""
        try:
            async with asyncio.timeout(seconds):
                await self.process.wait()
                await asyncio.gather(*self.readers)
        except TimeoutError:
            raise AssertionError(f"no end within {seconds:g} s{self.said}") from None

    async def kill(self) -> None:
        """Kills the process."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await asyncio.gather(*self.readers)

    async def _until(
        self, output: Output, holds: Callable[[Output], bool], what: str, seconds: float
    ) -> None:
        try:
            await output.until(holds, seconds)
        except TimeoutError:
            raise AssertionError(f"no {what} within {seconds:g} s{self.said}") from None
        assert holds(output), f"the program ended without {what}{self.said}"


class Programs:
    """Starts processes of one project, and kills them when it is closed."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.folder = folder
        self._project = project
        self._started: list[Program] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for program in self._started:
            await program.kill()

    async def start(self, *words: str, target: str, token: str = "") -> Program:
        """Starts a conformance client with the options that all of its commands take."""
        env = {"RUNLANE_TOKEN": token} if token else {}
        return await self.launch(*words, "--target", target, env=env)

    async def launch(self, *words: str, env: Mapping[str, str]) -> Program:
        """Starts the program with these arguments and additional environment variables."""
        process = await asyncio.create_subprocess_exec(
            *self._project.command(),
            *words,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            cwd=self._project.folder,
            # Unbuffered output would hide a flush that is missing. Empty is the same as unset.
            env=environment({"PYTHONUNBUFFERED": "", **env}),
        )
        program = Program(process)
        self._started.append(program)
        return program
