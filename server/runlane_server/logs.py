"""The server's own log: one event a line on stderr, JSON unless a person reads along."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

FORMATS = ("auto", "json", "console")
LEVELS = ("debug", "info", "warning", "error")


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


class _Worker:
    """Adds to a line which worker it is of."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, _: WrappedLogger, __: str, line: EventDict) -> EventDict:
        line["worker"] = self._number
        return line


def configure(log_format: str = "auto", level: str = "info", *, worker: int | None = None) -> None:
    """Sets up structlog, and leads the log of grpc and asyncio into it.

    `auto` means `console` where stderr is a terminal and `json` where it is not. Each line of a
    `worker` has its number.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if worker is not None:
        # Not a variable of the context: threads and callbacks of grpc have contexts of their own.
        shared.append(_Worker(worker))
    finishing: list[Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    stream = cast("TextIO", _Lossy(sys.stderr))
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
