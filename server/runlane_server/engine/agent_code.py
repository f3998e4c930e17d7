"""Knows which run a piece of code works for, and keeps its exceptions from ending the server.

A run's context has a variable that names the run. Tasks that its agent starts inherit the context,
so their tasks are known too. asyncio lets SystemExit and KeyboardInterrupt of any task or callback
leave the event loop, which would end the server: a task of an agent gets them as an AgentError
instead, and a `ContainedLoop` continues after those of a callback.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import structlog

from runlane_server.agents.base import AgentError
from runlane_server.core.model import RunKey
from runlane_server.engine.agent_output import describe

log = structlog.get_logger()

T = TypeVar("T")

AnyTask = asyncio.Task[Any]

EXITS = (SystemExit, KeyboardInterrupt)
"""The exceptions with which asyncio leaves the event loop."""


class AgentCode:
    """The code of one attempt: the agent's task, and all tasks that were started from it."""

    __slots__ = ("_tasks", "run_key", "session_id")

    def __init__(self, run_key: RunKey, session_id: str) -> None:
        self.run_key = run_key
        self.session_id = session_id
        self._tasks: set[AnyTask] = set()

    @property
    def fields(self) -> dict[str, str]:
        """The run, as fields of a log line."""
        return {"session_id": self.session_id, "run_id": self.run_key.run_id}

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts the agent's task. Its coroutine calls `enter` first, and handles exits itself: a
        wrapper would cost time at each of its steps."""
        task = asyncio.get_running_loop().create_task(coroutine)
        _agents[task] = self
        # Removed when it is done: its context refers to this object, and the garbage collector does
        # not see the contexts of tasks. Each run that fails would stay in memory.
        self.add(task)
        return task

    def enter(self) -> None:
        """Marks the calling task's context, which the tasks that it starts inherit."""
        _current.set(self)

    def working(self) -> set[AnyTask]:
        """The tasks that are not done."""
        return {task for task in self._tasks if not task.done()}

    def add(self, task: AnyTask) -> None:
        """Adds a task until it is done."""
        if task not in self._tasks:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


_current: ContextVar[AgentCode | None] = ContextVar("runlane_agent_code", default=None)

_agents: WeakKeyDictionary[AnyTask, AgentCode] = WeakKeyDictionary()
"""The agents' own tasks, which have no `_Contained` coroutine."""


def create_own_task(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a task of the engine. The caller may be an agent's code; the task is not."""
    loop = asyncio.get_running_loop()
    if _current.get() is None:
        return loop.create_task(coroutine)
    context = copy_context()
    context.run(_current.set, None)
    return loop.create_task(coroutine, context=context)


# --- Tasks ----------------------------------------------------------------------------------------


def contain_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Makes a loop recognize the tasks that agents start. Its own task factory stays in use."""
    factory = loop.get_task_factory()
    if not isinstance(factory, _TaskFactory):
        loop.set_task_factory(cast("Any", _TaskFactory(factory)))


class _TaskFactory:
    def __init__(self, inner: Callable[..., Any] | None) -> None:
        self._inner = inner

    def __call__(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any
    ) -> asyncio.Future[Any]:
        context: Context | None = options.get("context")
        code = _current.get() if context is None else context.get(_current)
        if code is not None and isinstance(coroutine, Coroutine):
            coroutine = _Contained(coroutine, code)
        task: asyncio.Future[Any]
        if self._inner is None:
            task = asyncio.Task(coroutine, loop=loop, **options)
        else:
            task = self._inner(loop, coroutine, **options)
        if code is not None and isinstance(task, asyncio.Task):
            code.add(task)
        return task


class _Contained(Coroutine[Any, Any, T]):
    """A coroutine of an agent's task, from which no exception leaves the event loop."""

    __slots__ = ("_coroutine", "code")

    def __init__(self, coroutine: Coroutine[Any, Any, T], code: AgentCode) -> None:
        self._coroutine = coroutine
        self.code = code

    def send(self, value: Any) -> Any:
        try:
            return self._coroutine.send(value)
        except EXITS as error:
            raise self._contained(error) from error

    def throw(self, *error: Any) -> Any:
        try:
            return self._coroutine.throw(*error)
        except EXITS as left:
            raise self._contained(left) from left

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._coroutine.__await__()

    def __repr__(self) -> str:
        return repr(self._coroutine)

    def __getattr__(self, name: str) -> Any:
        # Debuggers and libraries look at the frame and the name of a task's coroutine.
        return getattr(self._coroutine, name)

    def _contained(self, error: BaseException) -> AgentError:
        log.error("a task of an agent tried to end the server", exc_info=error, **self.code.fields)
        return AgentError(f"a task of the agent raised {describe(error)}")


# --- The event loop -------------------------------------------------------------------------------


class ContainedLoop(asyncio.AbstractEventLoop):
    """A base of event loops that continue after a SystemExit or KeyboardInterrupt of a callback.

    Only with `contains_exits`: until the signals have handlers, Ctrl-C is such an exception.
    """

    contains_exits = False

    def run_forever(self) -> None:
        """Runs until `stop` is called."""
        while True:
            try:
                super().run_forever()
            except EXITS as error:
                if not self.contains_exits:
                    raise
                code = _code_of_traceback(error.__traceback__)
                fields = {} if code is None else code.fields
                log.exception("a callback tried to end the server; it continues", **fields)
            else:
                return


def contained(kind: type[asyncio.AbstractEventLoop]) -> type[ContainedLoop]:
    """A kind of event loop that continues after exceptions of callbacks."""
    return type(kind.__name__, (ContainedLoop, kind), {})


def contain_exits(loop: asyncio.AbstractEventLoop) -> None:
    """Makes a contained loop continue from now on: the signals have handlers."""
    if isinstance(loop, ContainedLoop):
        loop.contains_exits = True


def _code_of_traceback(trace: TracebackType | None) -> AgentCode | None:
    """The run whose callback raised an exception, as far as the loop's frames show it."""
    for frame, _ in traceback.walk_tb(trace):
        if (code := _code_of_handle(frame)) is not None:
            return code
    return None


def _code_of_handle(frame: FrameType) -> AgentCode | None:
    handle = frame.f_locals.get("self")
    context = getattr(handle, "_context", None) if isinstance(handle, asyncio.Handle) else None
    return context.get(_current) if isinstance(context, Context) else None


def code_at_work(loop: asyncio.AbstractEventLoop, frame: FrameType | None) -> AgentCode | None:
    """The run whose code holds an event loop. `frame` is the top one of the loop's thread.

    For use from another thread.
    """
    task = asyncio.current_task(loop)
    if task is not None:
        if (code := _agents.get(task)) is not None:
            return code
        coroutine = task.get_coro()
        return coroutine.code if isinstance(coroutine, _Contained) else None
    while frame is not None:
        if (code := _code_of_handle(frame)) is not None:
            return code
        frame = frame.f_back
    return None
