"""A real server in a thread of its own, for tests without an event loop, or with one of their own.

    with RunningServer() as server, server.sync_client() as client:
        handle = client.run_accepted("s", "Hello", allow_missing=True)
        assert handle.completed().text == "Hello"

It is the server of `testing.server`, on an event loop that nobody else uses: it goes on
while a test waits, whatever becomes of the loop of the test. With pytest the fixture
`runlane_server` makes one for each test.
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
from runlane_server.harness.clock import MovableLoop
from runlane_server.testing.server import AgentLike, LocalServer

T = TypeVar("T")

Work: TypeAlias = Callable[[], Coroutine[Any, Any, T]]
"""What makes a coroutine, on the event loop that is to run it."""

STEP_SECONDS = 30.0
"""How long a start or a stop may take, beyond the times that the settings allow for."""

END_SECONDS = 2.0
"""How long the thread has to end. One that an agent holds up is left behind."""

GATE_SECONDS = 10.0
"""How long a test waits for a run to come to a gate, unless it says otherwise."""


class RunningServer:
    """A server of this process, for any thread but its own. Its calls wait until they are done.

    Args:
        agent: What runs, as `LocalServer` takes it: what `--agent` takes, or an agent of your own.
        store: As `--store` takes it.
        config: All other settings; None: those of `LocalServer`. One of your own waits at each stop
            for the runs that are active, up to its `drain_timeout`.
        harness: Whether to serve `runlane.harness.v1` too, see `runlane.harness`. It holds runs at
            gates and moves the clock; the process is not the server's own, and does not crash.

    It serves from when it is entered, once, until it is left. Entering it raises StartError if it
    cannot start.
    """

    def __init__(
        self,
        agent: AgentLike = "echo",
        *,
        store: str = "memory:",
        config: Config | None = None,
        harness: bool = False,
    ) -> None:
        config = config or Config(drain_timeout=0.0)
        self._server = LocalServer(agent, store=store, config=config, harness=harness)
        self._limit = STEP_SECONDS + config.drain_timeout + config.limits.cancel_grace
        self._thread = LoopThread("runlane-server")
        self._gates = Gatekeeper(self._server.gates, self._thread) if agent == "scripted" else None
        self._address: str | None = None

    @property
    def address(self) -> str:
        """Where it serves, as `host:port`; it keeps that while it is stopped, and when it is
        started again. Raises RuntimeError before it is entered."""
        if self._address is None:
            raise RuntimeError("the server has no address yet: enter it first")
        return self._address

    @property
    def gates(self) -> Gatekeeper:
        """The gates of the scripted agent. Raises RuntimeError if another agent runs."""
        if self._gates is None:
            raise RuntimeError("the server has no gates: its agent is not 'scripted'")
        return self._gates

    def client(self, **options: Any) -> Client:
        """A client for the event loop that uses it first, to be closed by the caller.

        `options` are those of `runlane.Client`.
        """
        return Client(self.address, **options)

    def sync_client(self, **options: Any) -> SyncClient:
        """A client for threads without an event loop, to be closed by the caller.

        `options` are those of `runlane.sync.Client`.
        """
        return SyncClient(self.address, **options)

    def start(self) -> None:
        """Serves again, at the same address. Raises StartError, or RuntimeError if it serves."""
        self.run(self._server.start)
        self._address = self._server.address

    def stop(self) -> None:
        """Goes down in good order; does nothing if it is down.

        What waits is left in the store, which is gone if it is in memory. Raises TimeoutError if it
        does not come to rest.
        """
        self.run(self._server.stop)

    def restart(self) -> None:
        """Stops, and serves again at the same address. Raises what these two raise."""
        self.stop()
        self.start()

    def run(self, work: Work[T]) -> T:
        """What a coroutine returns or raises that runs on the event loop of the server.

        Raises TimeoutError where that takes longer than a stop may, and RuntimeError in the thread
        of the server.
        """
        return self._thread.run(work, self._limit)

    def __enter__(self) -> Self:
        self._thread.begin()
        try:
            self.start()
        except BaseException:
            self._thread.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # Nobody is there any more to open the gates, and the thread shall end.
            self._thread.soon(self._server.gates.heed_cancels)
            self.stop()
        finally:
            self._thread.end()


class Gatekeeper:
    """Opens the gates at which scripted runs wait, and tells who has come to them.

    For any thread but that of the server. A gate is closed until it is opened, and then stays open,
    over a restart too.
    """

    def __init__(self, latches: Latches, thread: LoopThread) -> None:
        self._latches = latches
        self._thread = thread

    @staticmethod
    def script(*steps: Mapping[str, Any]) -> str:
        """A prompt of these steps; `runlane_server.agents.scripted.agent` lists them.

        Raises BadScript for what the agent could not read.
        """
        text = json.dumps(steps)
        parse_script(text)
        return text

    def open(self, gate: str) -> None:
        """Lets through all that wait at the gate, and all that will.

        It is open for whatever the server is asked for from now on.
        """
        self._thread.soon(partial(self._latches.open, gate))

    async def reached(self, gate: str, timeout: float = GATE_SECONDS) -> None:
        """Returns when some run has come to the gate. Raises TimeoutError after so many seconds."""
        await self._awaited(self._coming(gate), timeout)

    def wait_reached(self, gate: str, timeout: float = GATE_SECONDS) -> None:
        """The same, for a test without an event loop."""
        self._waited(self._coming(gate), timeout)

    async def cancel_ignored(self, gate: str, timeout: float = GATE_SECONDS) -> None:
        """Returns when some run was cancelled at the gate, and went on waiting.

        Raises TimeoutError after so many seconds.
        """
        await self._awaited(self._ignoring(gate), timeout)

    def wait_cancel_ignored(self, gate: str, timeout: float = GATE_SECONDS) -> None:
        """The same, for a test without an event loop."""
        self._waited(self._ignoring(gate), timeout)

    def _coming(self, gate: str) -> _Awaited:
        return _Awaited(partial(self._latches.reached, gate), f"no run came to gate {gate!r}")

    def _ignoring(self, gate: str) -> _Awaited:
        what = f"no run ignored a cancel at gate {gate!r}"
        return _Awaited(partial(self._latches.cancel_ignored, gate), what)

    async def _awaited(self, one: _Awaited, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await asyncio.wrap_future(self._thread.submit(one.work))
        except TimeoutError:
            raise TimeoutError(f"{one.missed} within {timeout:g} s") from None

    def _waited(self, one: _Awaited, timeout: float) -> None:
        try:
            self._thread.run(one.work, timeout)
        except TimeoutError:
            raise TimeoutError(f"{one.missed} within {timeout:g} s") from None


@dataclass(frozen=True, slots=True)
class _Awaited:
    """What a test waits for, and what to say where it does not come."""

    work: Work[None]
    missed: str


class LoopThread:
    """An event loop in a thread of its own, which does not keep the process alive."""

    def __init__(self, name: str) -> None:
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._begun: Future[asyncio.AbstractEventLoop] = Future()
        self._end = asyncio.Event()
        self._ended = False

    def begin(self) -> None:
        """Starts the thread. Raises RuntimeError the second time."""
        self._thread.start()

    def end(self) -> None:
        """Cancels what is left on the loop, and ends the thread."""
        with suppress(RuntimeError):  # it has ended by itself
            self.soon(self._end.set)
        self._ended = True
        self._thread.join(END_SECONDS)

    def run(self, work: Work[T], timeout: float) -> T:
        """What a coroutine of the loop returns or raises.

        Raises TimeoutError after so many seconds, and RuntimeError where there is no use in waiting
        for it.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"{self._thread.name} cannot wait for itself")
        future = self.submit(work)
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.done():
                raise  # its own
            raise TimeoutError(
                f"{self._thread.name} did not get done within {timeout:g} s: "
                "does an agent hold up its event loop?"
            ) from None
        finally:
            # Nothing happens to one that is done.
            future.cancel()

    def submit(self, work: Work[T]) -> Future[T]:
        """Has a coroutine run; to cancel the future is to cancel that."""
        loop = self._loop()
        return asyncio.run_coroutine_threadsafe(work(), loop)

    def soon(self, do: Callable[[], object]) -> None:
        """Has something done, before all that is asked for later."""
        self._loop().call_soon_threadsafe(do)

    def _loop(self) -> asyncio.AbstractEventLoop:
        if self._ended or not self._thread.is_alive():
            raise RuntimeError(f"{self._thread.name} does not run")
        return self._begun.result()

    def _serve(self) -> None:
        try:
            # The loop is nobody else's, so a harness may move its clock.
            with asyncio.Runner(loop_factory=MovableLoop) as runner:
                runner.run(self._until_ended())
        except Exception as error:
            if self._begun.done():
                raise
            self._begun.set_exception(error)

    async def _until_ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_without_noise)
        self._begun.set_result(loop)
        await self._end.wait()


def _without_noise(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Leaves out what grpc stumbles over where a process has several event loops, and does no harm.

    Each of them is woken for the events of all. Old versions fail where another one was quicker
    (BlockingIOError); all do for an event of a loop that is closed, as that of a test which left a
    call behind (RuntimeError).
    """
    of_grpc = "PollerCompletionQueue" in context["message"]
    if not (of_grpc and isinstance(context.get("exception"), BlockingIOError | RuntimeError)):
        loop.default_exception_handler(context)
