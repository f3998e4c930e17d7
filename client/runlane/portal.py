"""Where the coroutines behind the synchronous client run: one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from typing import Any, Generic, ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
ItemT = TypeVar("ItemT")

NOTICE_SECONDS = 0.5
"""After how long a thread that waits sees an interrupt at the latest."""

STOPPING_SECONDS = 1.0
"""For how long the end of the process waits for the loop to come to rest."""


class _Thread:
    """The event loop of this process, in a daemon thread that is started by its first use."""

    def __init__(self, *, spoilt: bool = False) -> None:
        # Guards the start. Nothing is awaited or called back under it.
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.spoilt = spoilt
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def started(self) -> bool:
        """Whether it was used."""
        return self._loop is not None

    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, which runs."""
        with self._starting:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=loop.run_forever, name="runlane-client", daemon=True
                )
                self._thread.start()
                self._loop = loop
            return self._loop

    def spawn(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Has a coroutine made and run by the loop, if there is one; waits for nothing.

        Takes no lock: a finalizer calls it, which may interrupt anything.
        """
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._begin, make)

    def stop(self) -> None:
        """Stops the loop, so that it does not run into the interpreter's end.

        Only daemon threads can be waiting then; they wait until they are gone.
        """
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOPPING_SECONDS)

    def _begin(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.get_running_loop().create_task(make())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


_shared = _Thread()


def _after_fork() -> None:
    global _shared  # noqa: PLW0603 - the thread is of this process, and another one has none
    _shared = _Thread(spoilt=_shared.started or _shared.spoilt)


def _at_exit() -> None:
    _shared.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


class Portal:
    """Runs coroutines for threads that wait for them. Any number of threads may use one."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def call(
        self, make: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What the coroutine returns or raises.

        An exception in the waiting thread, such as KeyboardInterrupt, cancels the coroutine. The
        end of an iteration is raised as StopIteration.

        Raises RuntimeError in a thread whose event loop runs, which it would hold up, and in
        another process than the one that it was made in.
        """
        self._check()
        loop = _shared.loop()
        errand = _Errand(partial(make, *args, **kwargs))
        try:
            loop.call_soon_threadsafe(errand.begin)
            return errand.wait()
        except StopAsyncIteration:
            raise StopIteration from None
        finally:
            if not errand.outcome.done():
                loop.call_soon_threadsafe(errand.call_off)

    def iterate(self, items: AsyncIterator[ItemT], owner: object) -> Pulled[ItemT]:
        """Iterates over the items; `owner` lives as long as that."""
        return Pulled(self, items, owner)

    def drop(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Has something closed that nobody uses any more, without waiting for it."""
        if self._pid == os.getpid():
            _shared.spawn(close)

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise RuntimeError("made before a fork: make a new Client in this process")
        if _shared.spoilt:
            # The threads of gRPC are not there after a fork, and what it waits for never comes.
            raise RuntimeError(
                "a runlane.sync client was used before this process was forked, which gRPC does "
                "not outlive: make clients after the fork, or start processes by spawn"
            )
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        raise RuntimeError(
            "runlane.sync would hold up the event loop of this thread: use runlane.Client there"
        )


class _Errand(Generic[T]):
    """A coroutine for a thread that waits for its outcome.

    The thread may be interrupted at any instant, also when the coroutine is under way and it has
    not heard so yet: `asyncio.run_coroutine_threadsafe` would leave nothing in its hand to cancel.
    """

    def __init__(self, make: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self.outcome: Future[T] = Future()
        self._make = make
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Begins it, on the loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def wait(self) -> T:
        """What it returns or raises, to the thread that waits for it."""
        while not self.outcome.done():
            # An interrupt that comes just before the thread begins to wait, or to another thread,
            # does not end the wait: Python notices it when the thread runs again.
            with suppress(TimeoutError, CancelledError):
                self.outcome.exception(NOTICE_SECONDS)
        return self.outcome.result()

    def call_off(self) -> None:
        """Cancels it, on the loop, where it was begun and is not done."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            self.outcome.set_result(await self._make())
        except asyncio.CancelledError:
            self.outcome.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - it is the waiting thread's
            self.outcome.set_exception(error)


class Pulled(Generic[ItemT]):
    """An iterator that pulls one item at a time out of an asynchronous one."""

    def __init__(self, portal: Portal, items: AsyncIterator[ItemT], owner: object) -> None:
        self._portal = portal
        self._items = items
        self._owner = owner

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ItemT:
        return self._portal.call(self._step)

    async def _step(self) -> ItemT:
        return await anext(self._items)
