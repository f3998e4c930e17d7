"""Reports code that holds the event loop, such as a blocking call of an agent.

While the loop is held, no other run, call or subscription makes progress, and the loop itself
cannot say so. A thread therefore asks the loop to call it back. If the loop is late, the thread
logs where the loop's thread stands. It never touches anything that belongs to the loop.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import structlog

from runlane_server.engine.agent_code import code_at_work

log = structlog.get_logger()

LIMIT = 0.2
"""Seconds for which code may hold the event loop before it is reported."""

INTERVAL = 0.05
"""Seconds between two questions. They cost about 0.3% of a core."""

FRAMES = 12
"""Number of frames that are logged, the innermost ones."""

_WAITING = frozenset({"select", "run_forever", "run_until_complete", "run"})
"""Functions at the top of a stack whose loop waits for events: nobody holds it, but the process got
no CPU time."""


@contextmanager
def watching(on_blocked: Callable[[], None]) -> Iterator[None]:
    """Watches the running event loop. `on_blocked` is called on it once per report."""
    watchdog = _Watchdog(asyncio.get_running_loop(), threading.get_ident(), on_blocked)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()


class _Watchdog:
    def __init__(
        self, loop: asyncio.AbstractEventLoop, thread_id: int, on_blocked: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._thread_id = thread_id
        self._on_blocked = on_blocked
        self._answered = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._answered.set()

    def _watch(self) -> None:
        while not self._stopping.wait(INTERVAL):
            self._answered.clear()
            asked = time.monotonic()
            try:
                self._loop.call_soon_threadsafe(self._answered.set)
                if not self._answered.wait(LIMIT) and self._report():
                    self._answered.wait()
                    seconds = round(time.monotonic() - asked, 3)
                    log.warning("event loop continues", blocked_s=seconds)
                    self._loop.call_soon_threadsafe(self._on_blocked)
            except RuntimeError:
                return  # the loop is closed

    def _report(self) -> bool:
        """Logs who holds the loop; returns whether anybody does."""
        frame = sys._current_frames().get(self._thread_id)  # noqa: SLF001 - the only way
        if self._stopping.is_set() or frame is None or frame.f_code.co_name in _WAITING:
            return False
        code = code_at_work(self._loop, frame)
        log.warning(
            "event loop blocked: no other run or call makes progress",
            longer_than_s=LIMIT,
            **({} if code is None else code.fields),
            stack=_stack(frame),
        )
        return True


def _stack(frame: FrameType) -> str:
    frames = traceback.extract_stack(frame)[-FRAMES:]
    return "".join(traceback.format_list(frames)).rstrip()
