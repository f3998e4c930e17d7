"""Runs the coroutines of the synchronous client on one event loop in a background thread."""

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

INTERRUPT_POLL_SECONDS = 0.5
"""Maximum delay until a waiting thread notices an interrupt."""

STOP_TIMEOUT_SECONDS = 1.0
"""Maximum time that the process waits at exit for the event loop to stop."""


class _LoopThread:
    """The event loop of this process, in a daemon thread that starts on first use.

    `used_before_fork` marks the thread of a forked child whose parent already used gRPC.
    """

    def __init__(self, *, used_before_fork: bool = False) -> None:
        # Guards the start. Never await or call back while holding it.
        self._start_lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.used_before_fork = used_before_fork
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def is_started(self) -> bool:
        return self._loop is not None

    def loop(self) -> asyncio.AbstractEventLoop:
        """Returns the running loop; starts it if necessary."""
        with self._start_lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=loop.run_forever, name="runlane-client", daemon=True
                )
                self._thread.start()
                self._loop = loop
            return self._loop

    def spawn(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Schedules a coroutine on the loop, if the loop is running; returns immediately.

        Takes no lock, because finalizers call it and may interrupt any code.
        """
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._create_task, make)

    def stop(self) -> None:
        """Stops the loop before the interpreter shuts down.

        Only daemon threads can still be waiting for a result then; they never resume.
        """
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_TIMEOUT_SECONDS)

    def _create_task(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.get_running_loop().create_task(make())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


_shared = _LoopThread()


def _reset_after_fork() -> None:
    global _shared  # noqa: PLW0603 - a forked child does not inherit the thread
    _shared = _LoopThread(used_before_fork=_shared.is_started or _shared.used_before_fork)


def _stop_at_exit() -> None:
    _shared.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
atexit.register(_stop_at_exit)


class Portal:
    """Runs coroutines for threads that wait for the result. Thread-safe."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def call(
        self, make: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs a coroutine on the loop; returns its result or raises its exception.

        An exception in the waiting thread, such as KeyboardInterrupt, cancels the coroutine.
        StopAsyncIteration is raised as StopIteration.

        Raises:
            RuntimeError: The thread runs an event loop, which the call would block; or the portal
                was created in another process.
        """
        self._check_thread()
        loop = _shared.loop()
        call = _BlockingCall(partial(make, *args, **kwargs))
        try:
            loop.call_soon_threadsafe(call.start)
            return call.wait()
        except StopAsyncIteration:
            raise StopIteration from None
        finally:
            if not call.future.done():
                loop.call_soon_threadsafe(call.cancel)

    def iterate(self, items: AsyncIterator[ItemT], owner: object) -> BlockingIterator[ItemT]:
        """Returns an iterator over the items that keeps `owner` alive."""
        return BlockingIterator(self, items, owner)

    def close_soon(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Schedules the closing of an unused object; returns immediately."""
        if self._pid == os.getpid():
            _shared.spawn(close)

    def _check_thread(self) -> None:
        if self._pid != os.getpid():
            raise RuntimeError(
                "this runlane.sync client was created before a fork; create a new Client in this "
                "process"
            )
        if _shared.used_before_fork:
            # The child does not inherit gRPC's threads, so its calls would never return.
            raise RuntimeError(
                "gRPC does not work after a fork because a runlane.sync client was used before it; "
                "create clients after the fork, or start processes with spawn"
            )
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        raise RuntimeError(
            "runlane.sync would block the event loop of this thread; use runlane.Client"
        )


class _BlockingCall(Generic[T]):
    """One coroutine and the thread that waits for it.

    Unlike `asyncio.run_coroutine_threadsafe`, it can be cancelled at any instant, even if an
    interrupt reaches the thread while the loop is just starting the coroutine.
    """

    def __init__(self, make: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self.future: Future[T] = Future()
        self._make = make
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the coroutine. Called on the loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def wait(self) -> T:
        """Blocks until the coroutine is done; returns its result or raises its exception."""
        while not self.future.done():
            # An interrupt that arrives just before the wait, or in another thread, does not end
            # the wait: Python handles it only when this thread runs again.
            with suppress(TimeoutError, CancelledError):
                self.future.exception(INTERRUPT_POLL_SECONDS)
        return self.future.result()

    def cancel(self) -> None:
        """Cancels the coroutine if it is running. Called on the loop."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            self.future.set_result(await self._make())
        except asyncio.CancelledError:
            self.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - raised in the waiting thread
            self.future.set_exception(error)


class BlockingIterator(Generic[ItemT]):
    """A synchronous iterator over an asynchronous one."""

    def __init__(self, portal: Portal, items: AsyncIterator[ItemT], owner: object) -> None:
        self._portal = portal
        self._items = items
        self._owner = owner

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ItemT:
        return self._portal.call(self._next)

    async def _next(self) -> ItemT:
        return await anext(self._items)
