"""A program of the examples as a process, and what it says as it says it."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from pathlib import Path
from typing import Self

from polyglot.languages import Language, environment

SECONDS = 30.0
"""How long a test waits for what has to happen, before it says that it did not."""


class Output:
    """What came from a pipe so far."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self._bytes = b""
        self._news = asyncio.Condition()
        self._ended = False

    @property
    def text(self) -> str:
        """All of it; a character of which not all bytes are there yet is left out."""
        return self._bytes.decode(errors="ignore")

    @property
    def lines(self) -> list[str]:
        """Its whole lines."""
        return self.text.split("\n")[:-1]

    async def read(self) -> None:
        """Reads to the end."""
        while data := await self._stream.read(1 << 16):
            async with self._news:
                self._bytes += data
                self._news.notify_all()
        async with self._news:
            self._ended = True
            self._news.notify_all()

    async def until(self, holds: Callable[[Output], bool], seconds: float) -> None:
        """Waits for something to hold, or for its end."""
        async with asyncio.timeout(seconds), self._news:
            await self._news.wait_for(lambda: holds(self) or self._ended)


class Program:
    """A process that was started. What is wrong is told with all that it said."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self.out = Output(process.stdout)
        self.err = Output(process.stderr)
        self.readers = [asyncio.create_task(each.read()) for each in (self.out, self.err)]

    @property
    def said(self) -> str:
        """All that it said, for a message."""
        return f"\n--- stdout\n{self.out.text[-4000:]}\n--- stderr\n{self.err.text[-4000:]}"

    async def shows(self, text: str, seconds: float = SECONDS) -> None:
        """Waits for a text on stdout."""
        await self._until(self.out, lambda output: text in output.text, repr(text), seconds)

    async def tells(self, prefix: str, seconds: float = SECONDS, *, times: int = 1) -> str:
        """Waits for a line on stderr that begins like this; returns the last such line."""

        def found(output: Output) -> list[str]:
            return [line for line in output.lines if line.startswith(prefix)]

        enough = f"{times} x {prefix!r} on stderr"
        await self._until(self.err, lambda output: len(found(output)) >= times, enough, seconds)
        return found(self.err)[-1]

    async def ends(self, code: int, seconds: float = SECONDS) -> None:
        """Waits for its end, which has to be with this exit code."""
        try:
            async with asyncio.timeout(seconds):
                await self.process.wait()
                await asyncio.gather(*self.readers)
        except TimeoutError:
            raise AssertionError(f"it did not end within {seconds:g} s{self.said}") from None
        assert self.process.returncode == code, f"exit {self.process.returncode}{self.said}"

    async def kill(self) -> None:
        """Ends it as a crash would."""
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
        assert holds(output), f"it ended without {what}{self.said}"


class Programs:
    """Starts programs of a language, and ends them with itself."""

    def __init__(self, language: Language, folder: Path) -> None:
        self.folder = folder
        self._language = language
        self._started: list[Program] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for program in self._started:
            await program.kill()

    async def start(self, *words: str, target: str, token: str = "") -> Program:
        """Starts the program with these words, towards a server, with a token if there is one."""
        process = await asyncio.create_subprocess_exec(
            *self._language.argv(),
            *words,
            *("--target", target),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            cwd=self._language.folder,
            env=environment({"RUNLANE_TOKEN": token} if token else {}),
        )
        program = Program(process)
        self._started.append(program)
        return program
