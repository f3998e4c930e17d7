"""Checks schemas and answers of forms without holding up anything else.

Cheap checks are made at once. All others are made by processes, of which there are few and which
tenants share by turns; a check that takes too long ends its process.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from runlane_server.agents import form_rules
from runlane_server.agents.form_child import CPU_SECONDS
from runlane_server.core.errors import Overloaded
from runlane_server.store.fair_queue import FairSlots

PROCESSES = 2

WALL_SECONDS = 30.0
"""Seconds after which a check is given up on a machine that is too busy to make it."""

ENDING_SECONDS = 5.0

TOO_LONG = f"takes more than {CPU_SECONDS:g} s to check"

_NO_VARIABLES: dict[str, str] = {}
"""The server's variables have secrets."""


class CheckFailed(Exception):
    """A check came to no result. The text continues a sentence about the schema."""


class _Process:
    """A process that checks, one request at a time. Its methods block."""

    def __init__(self) -> None:
        script = f"import sys; sys.path[:] = {list(filter(None, sys.path))!r}; "
        script += "from runlane_server.agents.form_child import main; main()"
        self._status: int | None = None
        # A session of its own, so that Ctrl-C on the server's terminal does not reach it.
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and script
            [sys.executable, "-I", "-X", "utf8", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_NO_VARIABLES,
            start_new_session=True,
        )

    def exchange(self, request: bytes) -> bytes:
        """The answer to a request; empty if the process ended instead."""
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = b""
        if not answer:
            # Its pipes are closed, so it is about to end: a kill must not hide why.
            with suppress(subprocess.TimeoutExpired):
                self._status = self._process.wait(ENDING_SECONDS)
        return answer

    @property
    def took_too_long(self) -> bool:
        """Whether a check ended the process."""
        return self._status == -signal.SIGVTALRM

    def kill(self) -> None:
        """Ends the process. One whose check took too long has ended itself."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()


class FormChecks:
    """The checks of a server. It may be used by several event loops, one after another."""

    def __init__(self) -> None:
        self._slots = FairSlots(PROCESSES)
        self._idle: list[_Process] = []

    async def schema_problem(self, tenant: str, schema: str) -> str:
        """The faults of a schema; empty if it has none. Raises CheckFailed, and Overloaded."""
        if form_rules.is_cheap(schema):
            return form_rules.schema_problem(schema)
        found: str = (await self._check(tenant, {"schema": schema}))["problem"]
        return found

    async def violations(self, tenant: str, schema: str, value: str) -> Sequence[tuple[str, str]]:
        """Path and description of what is wrong with an answer, which is valid JSON.

        Raises CheckFailed, and Overloaded.
        """
        if form_rules.is_cheap(schema, value):
            return form_rules.violations(schema, value)
        found = await self._check(tenant, {"schema": schema, "value": value})
        return [(path, text) for path, text in found["violations"]]

    async def _check(self, tenant: str, request: Mapping[str, str]) -> Any:
        line = json.dumps(request).encode() + b"\n"
        await self._slots.acquire(tenant)
        try:
            async with asyncio.timeout(WALL_SECONDS):
                answer = await self._exchange(line)
        except TimeoutError:
            raise Overloaded("this node is too busy to check a form") from None
        except OSError as error:
            raise Overloaded(f"the process that checks forms cannot start: {error}") from error
        finally:
            self._slots.release()
        found = json.loads(answer)
        if "broken" in found:
            raise CheckFailed(f"cannot be checked: {found['broken']}")
        return found

    async def _exchange(self, line: bytes) -> bytes:
        process = self._idle.pop() if self._idle else await asyncio.to_thread(_Process)
        answer = b""
        try:
            answer = await asyncio.to_thread(process.exchange, line)
        finally:
            if answer:
                self._idle.append(process)
            else:
                process.kill()
        if answer:
            return answer
        if process.took_too_long:
            raise CheckFailed(TOO_LONG)
        raise Overloaded("the process that checks forms has ended; try again")

    def close(self) -> None:
        """Ends the processes."""
        while self._idle:
            self._idle.pop().kill()


FORMS = FormChecks()
atexit.register(FORMS.close)
