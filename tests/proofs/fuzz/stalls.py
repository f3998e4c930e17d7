"""The causes of a slow call: the longest times, and the state of the process meanwhile."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

SLOW = 4.0
"""Seconds after which the state of the process is kept."""

LINES, STATES = 40, 3
"""Log lines and states that are kept: the last ones."""

PRESSURE = Path("/proc/pressure")
"""The files in which Linux reports how long tasks waited for the processor and for the disk."""


class Stalls:
    """Times calls, and keeps what explains a slow one: states and warnings of the server's log,
    with those of its watchdog about a blocked event loop."""

    def __init__(self) -> None:
        self.slowest: dict[str, float] = {}
        self._states: deque[str] = deque(maxlen=STATES)
        self._lines: deque[str] = deque(maxlen=LINES)

    @contextmanager
    def call(self, name: str, slow: float = SLOW) -> Iterator[None]:
        """Times a call of the running event loop, which is slow after that many seconds."""
        began = time.monotonic()
        looking = asyncio.get_running_loop().call_later(slow, self._keep_state, name, began, slow)
        try:
            yield
        finally:
            looking.cancel()
            took = time.monotonic() - began
            self.slowest[name] = max(self.slowest.get(name, 0.0), took)

    def keep_line(self, _: Any, level: str, line: MutableMapping[str, Any]) -> str:
        """Keeps a line of the log and prints nothing, as a processor of structlog."""
        plain = ((key, value) for key, value in line.items() if type(value) in {str, int, float})
        text = " ".join(f"{key}={str(value)[:300]!r}" for key, value in plain)
        if isinstance(error := line.get("exc_info"), BaseException):
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            places = [f"{Path(at.filename).name}:{at.lineno}" for at in frames]
            text += f" {type(error).__name__} at {' > '.join(places)}"
        self._lines.append(f"{time.strftime('%X')} {level} {text}")
        raise structlog.DropEvent

    def report(self) -> str:
        """Everything that was kept."""
        slowest = sorted(self.slowest.items(), key=lambda item: -item[1])
        times = [f"{name}: at most {seconds:.2f} s" for name, seconds in slowest]
        return "\n".join([*times, *self._states, "last warnings:", *self._lines])

    def save(self, path: Path) -> None:
        """Writes the report if any call was slow, and says so."""
        if self._states:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.report(), encoding="utf-8", errors="backslashreplace")
            print(f"    slow calls: {path}", flush=True)

    def _keep_state(self, name: str, began: float, slow: float) -> None:
        took = time.monotonic() - began
        lines = [f"--- {name} not answered after {took:.1f} s, load {os.getloadavg()}"]
        # Later than asked for, by as much as the event loop was held.
        lines.append(f"the event loop came {took - slow:.1f} s late")
        lines += [f"{path.name} {path.read_text()}" for path in sorted(_pressures())]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            lines.append(f"thread {names.get(ident)}:\n{_last(traceback.format_stack(frame))}")
        for task in asyncio.all_tasks():
            lines.append(f"task {task.get_name()}: {' > '.join(_frames(task.get_coro())[-3:])}")
        self._states.append("\n".join(lines))


def _pressures() -> list[Path]:
    try:
        return [path for path in PRESSURE.iterdir() if path.read_text()]
    except OSError:
        return []  # not every kernel has it


def _frames(work: Any) -> list[str]:
    """The place where a coroutine waits, and the coroutines that it waits for."""
    frames = []
    while work is not None:
        frame = getattr(work, "cr_frame", None) or getattr(work, "ag_frame", None)
        if frame is not None:
            frames.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        work = getattr(work, "cr_await", None) or getattr(work, "ag_await", None)
    return frames


def _last(stack: list[str]) -> str:
    return "".join(stack[-4:])
