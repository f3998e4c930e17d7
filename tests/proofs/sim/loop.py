"""An event loop without time, threads or sockets, whose order of execution depends on a seed.

The next ready callback is drawn at random; if none is ready, the clock jumps to the next timer.
Callbacks of a paused node wait until it continues, as those of a process that is stopped.
Everything that a set may hold here hashes by number, so that no order depends on addresses.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Coroutine
from contextvars import Context, ContextVar
from typing import Any

NODE: ContextVar[int] = ContextVar("node", default=0)
"""The node that a task belongs to; 0 for none."""


class Stuck(Exception):
    """The world is deadlocked or does not end."""


class SimFuture(asyncio.Future[Any]):
    """A future that hashes by its number."""

    def __init__(self, loop: SimLoop, number: int) -> None:
        self.number = number
        self.node = NODE.get()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number


class SimTask(asyncio.Task[Any]):
    """A task that hashes by its number, and knows its node."""

    def __init__(
        self, coro: Coroutine[Any, Any, Any], loop: SimLoop, number: int, context: Context | None
    ) -> None:
        self.number = number
        self.node = NODE.get() if context is None else context.get(NODE, 0)
        super().__init__(coro, loop=loop, context=context)

    def __hash__(self) -> int:
        return self.number


class SimLoop(asyncio.BaseEventLoop):
    """The loop. `failure`, once set, ends the run; `dead` are the nodes that crashed."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, seed: int, *, horizon: float, max_steps: int) -> None:
        super().__init__()
        self.steps = 0
        self.failure: Exception | None = None
        self.complaints: list[str] = []
        self.dead: set[int] = set()
        self._held: dict[int, list[asyncio.Handle]] = {}
        self._random = random.Random(seed)  # noqa: S311 - to be repeatable is the point
        self._now = 0.0
        self._numbers = itertools.count(1)
        self._horizon = horizon
        self._max_steps = max_steps
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._complain)

    def time(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def pause(self, node: int) -> None:
        """Runs nothing of a node any more."""
        self._held.setdefault(node, [])

    def resume(self, node: int) -> None:
        """Runs what became ready while a node was paused."""
        self._ready.extend(self._held.pop(node, ()))

    def create_future(self) -> asyncio.Future[Any]:
        """A future with a number."""
        return SimFuture(self, next(self._numbers))

    def tasks_of(self, node: int) -> list[SimTask]:
        """The tasks of a node that are not done."""
        every = [task for task in asyncio.all_tasks(self) if isinstance(task, SimTask)]
        return sorted((task for task in every if task.node == node), key=lambda task: task.number)

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coro: Any,
        context: Context | None = None,
    ) -> asyncio.Task[Any]:
        return SimTask(coro, self, next(self._numbers), context)

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # Errors of the tasks of a crashed node do not count.
        if getattr(context.get("future"), "node", 0) in self.dead:
            return
        self.complaints.append(f"{context['message']}: {context.get('exception')!r}")

    def _write_to_self(self) -> None:
        """Does nothing: there is only one thread."""

    def _run_once(self) -> None:
        if not self._ready:
            self._jump()
        self._take_due()
        handle = self._draw()
        if handle._cancelled:
            return
        if self._held and (held := self._held.get(_node_of(handle))) is not None:
            held.append(handle)
            return
        self.steps += 1
        handle._run()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if self.steps > self._max_steps:
            self._max_steps *= 2
            raise Stuck(f"more than {self.steps} steps")

    def _draw(self) -> asyncio.Handle:
        ready = self._ready
        if len(ready) == 1:
            return ready.popleft()
        at = int(self._random.random() * len(ready))
        handle = ready[at]
        del ready[at]
        return handle

    def _jump(self) -> None:
        scheduled = self._scheduled
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False  # type: ignore[attr-defined]
        if not scheduled:
            raise Stuck("nothing is ready, and nothing is awaited but what never comes")
        self._now = max(self._now, scheduled[0].when())
        if self._now > self._horizon:
            self._horizon *= 2
            raise Stuck(f"not over after {self._now:.0f} s")

    def _take_due(self) -> None:
        scheduled = self._scheduled
        while scheduled and scheduled[0].when() <= self._now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False  # type: ignore[attr-defined]
            self._ready.append(handle)


def _node_of(handle: asyncio.Handle) -> int:
    context: Context = handle._context  # type: ignore[attr-defined]
    return context.get(NODE, 0)
