"""The server's log as records of `logging`: pytest shows them for a failed test, and `caplog` has
them."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, TypeAlias

import structlog
from structlog.typing import EventDict, WrappedLogger

_ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None] | None
)


@contextmanager
def redirect_to_logging() -> Iterator[None]:
    """Redirects the server's log to `logging` while the context is open, one logger per module.

    Other users of structlog and its configuration are not affected: one processor is put first in
    the current list, and removed at the end. If structlog is configured again meanwhile, the new
    configuration applies to the server too.
    """
    processors = structlog.get_config()["processors"]
    if not isinstance(processors, list):
        yield
        return
    processors.insert(0, _divert)
    try:
        yield
    finally:
        with suppress(ValueError):  # other code cleared the list
            processors.remove(_divert)


def _divert(_: WrappedLogger, method: str, line: EventDict) -> EventDict:
    caller = _caller()
    name = caller.f_globals.get("__name__", "") if caller is not None else ""
    if caller is None or name.partition(".")[0] != "runlane_server":
        return line
    logger = logging.getLogger(name)
    level = logging.getLevelNamesMapping().get(method.upper(), logging.ERROR)
    if logger.isEnabledFor(level):
        line = structlog.contextvars.merge_contextvars(_, method, dict(line))
        exc_info = _exc_info(line.pop("exc_info", method == "exception"))
        code, at = caller.f_code, caller.f_lineno
        logger.handle(
            logger.makeRecord(
                name, level, code.co_filename, at, _text(line), (), exc_info, code.co_name
            )
        )
    raise structlog.DropEvent


def _caller() -> FrameType | None:
    """The frame that logs: the first one outside this module and structlog."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and name.partition(".")[0] != "structlog":
            break
        frame = frame.f_back
    return frame


def _text(line: EventDict) -> str:
    event = line.pop("event", "")
    return " ".join([str(event), *(f"{key}={value!r}" for key, value in line.items())])


def _exc_info(value: Any) -> _ExcInfo:
    """Converts structlog's `exc_info` (an exception, a tuple or a flag) to that of `logging`."""
    if isinstance(value, BaseException):
        return type(value), value, value.__traceback__
    if isinstance(value, tuple):
        return value
    return sys.exc_info() if value else None
