"""A real server in its own thread, for tests with or without an event loop.

    with RunningServer() as server, server.sync_client() as client:
        handle = client.run_accepted("s", "Hello", allow_missing=True)
        assert handle.completed().text == "Hello"

It is the server of `testing.server` on its own event loop: it keeps running while a test blocks,
and does not depend on the loop of the test. With pytest, the fixture `runlane_server` creates one
for each test.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from runlane import Client
from runlane.sync import Client as SyncClient
from runlane_server.agents.scripted.latches import Latches
from runlane_server.agents.scripted.script import parse_script
from runlane_server.config import Config
from runlane_server.engine.agent_code import contain_exits, contained
from runlane_server.harness.clock import MovableLoop
from runlane_server.testing.server import AgentLike, LocalServer

T = TypeVar("T")

Work: TypeAlias = Callable[[], Coroutine[Any, Any, T]]
"""Creates a coroutine; called on the event loop that runs it."""

STEP_TIMEOUT = 30.0
"""Seconds that a start or a stop may take in addition to the timeouts of the settings."""

JOIN_TIMEOUT = 2.0
"""Seconds to wait for the end of the thread. A thread that an agent blocks is abandoned."""

LATCH_TIMEOUT = 10.0
"""Default timeout in seconds of a test that waits for a run to reach a latch."""


class RunningServer:
    """A server inside this process, for use from other threads. Its methods block until done.

    Args:
        agent: A value of `--agent`, or your own agent.
        agents: Several agents by name, in place of `agent`.
        store: A value of `--store`.
        config: All other settings; None means those of `LocalServer`. With your own, each stop
            waits for active runs, up to its `drain_timeout`.
        harness: Whether to serve `runlane.harness.v1` too (see `runlane.harness`). It can hold runs
            at gates and advance the clock; it cannot end the process.

    The server runs while its context is open; it can be entered once. Entering raises StartError if
    the server cannot start.
    """

    def __init__(
        self,
        agent: AgentLike = "echo",
        *,
        agents: Mapping[str, AgentLike] | None = None,
        store: str = "memory:",
        config: Config | None = None,
        harness: bool = False,
    ) -> None:
        config = config or Config(drain_timeout=0.0)
        self._server = LocalServer(
            agent, agents=agents, store=store, config=config, harness=harness
        )
        self._limit = STEP_TIMEOUT + config.drain_timeout + config.limits.cancel_grace
        self._thread = LoopThread("runlane-server")
        self._gates = (
            Gatekeeper(self._server.gates, self._thread)
            if "scripted" in (agents or {"": agent}).values()
            else None
        )
        self._address: str | None = None

    @property
    def address(self) -> str:
        """Its address as `host:port`. A stop and a restart keep it. Raises RuntimeError before the
        context is entered."""
        if self._address is None:
            raise RuntimeError("the server has no address yet: enter it first")
        return self._address

    @property
    def gates(self) -> Gatekeeper:
        """Controls the latches of the scripted agent. Raises RuntimeError for another agent."""
        if self._gates is None:
            raise RuntimeError("gates: only the agent 'scripted' has latches")
        return self._gates

    def client(self, **options: Any) -> Client:
        """Creates a client for the event loop that uses it first, to be closed by the caller.

        `options` are those of `runlane.Client`.
        """
        return Client(self.address, **options)

    def sync_client(self, **options: Any) -> SyncClient:
        """Creates a client for threads without an event loop, to be closed by the caller.

        `options` are those of `runlane.sync.Client`.
        """
        return SyncClient(self.address, **options)

    def start(self) -> None:
        """Starts again at the same address. Raises StartError, or RuntimeError if it is running."""
        self.run(self._server.start)
        self._address = self._server.address

    def stop(self) -> None:
        """Shuts down gracefully; does nothing if it is stopped.

        Waiting runs stay in the store; a store in memory is lost. Raises TimeoutError if the
        shutdown takes too long.
        """
        self.run(self._server.stop)

    def restart(self) -> None:
        """Stops, then starts at the same address. Raises what `stop` and `start` raise."""
        self.stop()
        self.start()

    def run(self, work: Work[T]) -> T:
        """Runs a coroutine on the event loop of the server; returns or raises what it does.

        Raises TimeoutError if it takes longer than a stop may, and RuntimeError in the server's own
        thread.
        """
        return self._thread.run(work, self._limit)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.start()
        except BaseException:
            self._thread.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # No latch will be opened any more, and the thread must end.
            self._thread.call_soon(self._server.gates.heed_cancels)
            self.stop()
        finally:
            self._thread.stop()


class Gatekeeper:
    """Opens the latches at which scripted runs wait, and waits for runs to reach them.

    For use from any thread but the server's. A latch is closed until it is opened, and then stays
    open, even after a restart.
    """

    def __init__(self, latches: Latches, thread: LoopThread) -> None:
        self._latches = latches
        self._thread = thread

    @staticmethod
    def script(*steps: Mapping[str, Any]) -> str:
        """Makes a prompt of steps; `runlane_server.agents.scripted.agent` lists them.

        Raises BadScript for a script that the agent would reject.
        """
        text = json.dumps(steps, ensure_ascii=False)
        parse_script(text)
        return text

    def open(self, latch: str) -> None:
        """Opens a latch, for runs that wait at it and for later ones.

        It is open before the server handles any later request.
        """
        self._thread.call_soon(partial(self._latches.open, latch))

    async def reached(self, latch: str, timeout: float = LATCH_TIMEOUT) -> None:
        """Returns when a run has reached the latch.

        Raises UnknownLatch after a second if the name looks like a misspelling of a latch at which
        a script waits, and TimeoutError after `timeout` seconds.
        """
        await self._wait_async(self._arrival(latch), timeout)

    def wait_reached(self, latch: str, timeout: float = LATCH_TIMEOUT) -> None:
        """The blocking form, for a test without an event loop."""
        self._wait_blocking(self._arrival(latch), timeout)

    async def cancel_ignored(self, latch: str, timeout: float = LATCH_TIMEOUT) -> None:
        """Returns when a run at the latch has ignored a cancel.

        Raises TimeoutError after `timeout` seconds.
        """
        await self._wait_async(self._ignored_cancel(latch), timeout)

    def wait_cancel_ignored(self, latch: str, timeout: float = LATCH_TIMEOUT) -> None:
        """The blocking form, for a test without an event loop."""
        self._wait_blocking(self._ignored_cancel(latch), timeout)

    def _arrival(self, latch: str) -> _Condition:
        return _Condition(partial(self._latches.reached, latch), f"no run reached latch {latch!r}")

    def _ignored_cancel(self, latch: str) -> _Condition:
        what = f"no run ignored a cancel at latch {latch!r}"
        return _Condition(partial(self._latches.cancel_ignored, latch), what)

    async def _wait_async(self, condition: _Condition, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await asyncio.wrap_future(self._thread.submit(condition.work))
        except TimeoutError:
            raise self._late(condition, timeout) from None

    def _wait_blocking(self, condition: _Condition, timeout: float) -> None:
        try:
            self._thread.run(condition.work, timeout)
        except TimeoutError:
            raise self._late(condition, timeout) from None

    def _late(self, condition: _Condition, timeout: float) -> TimeoutError:
        names = ", ".join(self._latches.names) or "none"
        return TimeoutError(
            f"{condition.failure} within {timeout:g} s; the scripts so far wait at: {names}"
        )


@dataclass(frozen=True, slots=True)
class _Condition:
    """A condition that a test waits for, and the error text if it is not met in time."""

    work: Work[None]
    failure: str


class LoopThread:
    """An event loop in its own daemon thread."""

    def __init__(self, name: str) -> None:
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._loop_ready: Future[asyncio.AbstractEventLoop] = Future()
        self._stop_event = asyncio.Event()
        self._stopped = False

    def start(self) -> None:
        """Starts the thread. Raises RuntimeError if called twice."""
        self._thread.start()

    def stop(self) -> None:
        """Cancels the remaining tasks and ends the thread."""
        with suppress(RuntimeError):  # the loop has ended by itself
            self.call_soon(self._stop_event.set)
        self._stopped = True
        self._thread.join(JOIN_TIMEOUT)

    def run(self, work: Work[T], timeout: float) -> T:
        """Runs a coroutine on the loop; returns or raises what it does.

        Raises TimeoutError after `timeout` seconds, and RuntimeError in the loop's own thread or if
        the thread is not running.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"{self._thread.name} cannot wait for itself")
        future = self.submit(work)
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.done():
                raise  # the coroutine's own
            raise TimeoutError(
                f"{self._thread.name} did not finish within {timeout:g} s; "
                "an agent may block its event loop"
            ) from None
        finally:
            # No effect if it is done.
            future.cancel()

    def submit(self, work: Work[T]) -> Future[T]:
        """Starts a coroutine on the loop; cancelling the future cancels the coroutine."""
        loop = self._loop()
        return asyncio.run_coroutine_threadsafe(work(), loop)

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Calls a function on the loop, before anything that is submitted later."""
        self._loop().call_soon_threadsafe(callback)

    def _loop(self) -> asyncio.AbstractEventLoop:
        if self._stopped or not self._thread.is_alive():
            raise RuntimeError(f"{self._thread.name} is not running")
        return self._loop_ready.result()

    def _serve(self) -> None:
        try:
            # The loop belongs to this server alone, so a harness may advance its clock.
            with asyncio.Runner(loop_factory=contained(MovableLoop)) as runner:
                runner.run(self._until_stopped())
        except Exception as error:
            if self._loop_ready.done():
                raise
            self._loop_ready.set_exception(error)

    async def _until_stopped(self) -> None:
        loop = asyncio.get_running_loop()
        contain_exits(loop)  # signals never reach this thread
        loop.set_exception_handler(_ignore_grpc_noise)
        self._loop_ready.set_result(loop)
        await self._stop_event.wait()


def _ignore_grpc_noise(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Ignores harmless errors that grpc raises in a process with several event loops.

    grpc wakes each loop for the events of all. Old versions raise BlockingIOError if another loop
    was faster; all versions raise RuntimeError for an event of a closed loop, such as that of a
    test that left a call open.
    """
    of_grpc = "PollerCompletionQueue" in context["message"]
    if not (of_grpc and isinstance(context.get("exception"), BlockingIOError | RuntimeError)):
        loop.default_exception_handler(context)
