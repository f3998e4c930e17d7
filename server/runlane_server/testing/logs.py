"""The server's log as records of `logging`, for tests: shown where one fails, and for `caplog`."""

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
    """Leads what the server logs into `logging` meanwhile, by the names of its modules.

    Whatever else is logged by structlog stays as it is, and so does how that was set up: one
    processor comes first in the list that is in force, and leaves it at the end. Where somebody
    sets up structlog anew in between, the server follows that from then on.
    """
    processors = structlog.get_config()["processors"]
    if not isinstance(processors, list):
        yield
        return
    processors.insert(0, _divert)
    try:
        yield
    finally:
        with suppress(ValueError):  # somebody else cleared the list
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
        raised = _exc_info(line.pop("exc_info", method == "exception"))
        code, at = caller.f_code, caller.f_lineno
        logger.handle(
            logger.makeRecord(
                name, level, code.co_filename, at, _text(line), (), raised, code.co_name
            )
        )
    raise structlog.DropEvent


def _caller() -> FrameType | None:
    """Who logs: the first frame beyond this module and structlog."""
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


def _exc_info(said: Any) -> _ExcInfo:
    """What `logging` takes for what structlog takes: an exception, its parts, or whether."""
    if isinstance(said, BaseException):
        return type(said), said, said.__traceback__
    if isinstance(said, tuple):
        return said
    return sys.exc_info() if said else None
