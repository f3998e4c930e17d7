"""The server's own log: one event a line on stderr, JSON unless a person reads along."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger


class _Lossy:
    """A stream that drops what it cannot write.

    Whoever read the log may be gone, and the disk it is on may be full. The work goes on: nearly
    everything tells the log about itself, and would fail with it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class _ProcessNumber:
    """Adds to a line the number of the process, of several on one port."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, _: WrappedLogger, __: str, line: EventDict) -> EventDict:
        line["process"] = self._number
        return line


_Raised = tuple[type[BaseException], BaseException, TracebackType | None]


def _without_messages(exc_info: _Raised) -> str:
    """Where an exception came from, and what led to it. What they say is left out: it may have been
    made of a prompt, or of what an agent was told."""
    parts: list[str] = []
    error: BaseException | None = exc_info[1]
    while error is not None:
        frames = "".join(traceback.format_tb(error.__traceback__))
        parts.insert(0, f"{frames}{type(error).__module__}.{type(error).__qualname__}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n\n".join(parts)


def _with_messages(exc_info: _Raised) -> str:
    return "".join(traceback.format_exception(*exc_info)).rstrip()


def configure(
    log_format: str = "auto",
    level: str = "info",
    *,
    process: int | None = None,
    content: bool = False,
) -> None:
    """Sets up structlog, and leads the log of grpc and asyncio into it.

    `auto` means `console` where stderr is a terminal and `json` where it is not. Each line of a
    `process` has its number. Only with `content` the log has what unexpected exceptions say.
    """
    # It is None where the process was started with stderr closed.
    output = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    console = log_format == "console" or (log_format == "auto" and output.isatty())
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if process is not None:
        # Not a variable of the context: threads and callbacks of grpc have contexts of their own.
        shared.append(_ProcessNumber(process))
    finishing: list[Processor] = [
        structlog.processors.ExceptionRenderer(_with_messages if content else _without_messages),
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(),
    ]
    stream = cast("TextIO", _Lossy(output))
    structlog.configure(
        processors=[*shared, *finishing],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *finishing],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.INFO), force=True)
