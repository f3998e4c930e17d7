"""The server's log: one event per line on stderr, as JSON or, on a terminal, for people."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger


class _LossyStream:
    """A stream that drops what it cannot write.

    The reader of the log may be gone, or its disk full. That must not fail the work: nearly every
    part of the server logs.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    # No context managers: they cost time for each line.
    def write(self, text: str) -> None:
        try:  # noqa: SIM105
            self._stream.write(text)
        except OSError:
            pass

    def flush(self) -> None:
        try:  # noqa: SIM105
            self._stream.flush()
        except OSError:
            pass


class _Timestamp:
    """Adds the time in UTC. It formats the second only once, as each run logs three lines."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def __call__(self, _: WrappedLogger, __: str, line: EventDict) -> EventDict:
        second, micros = divmod(time.time_ns() // 1000, 1_000_000)
        if second != self._second:
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        line["timestamp"] = f"{self._text}.{micros:06d}Z"
        return line


_encode = json.JSONEncoder(
    default=structlog.processors._json_fallback_handler,  # noqa: SLF001
    check_circular=False,  # a line has no containers that contain themselves
).encode


def _to_json(_: WrappedLogger, __: str, line: EventDict) -> str:
    """Encodes a line. The renderer of structlog would make an encoder for each."""
    return _encode(line)


class _ProcessNumber:
    """Adds the number of the process to each line, if there are several."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, _: WrappedLogger, __: str, line: EventDict) -> EventDict:
        line["process"] = self._number
        return line


_HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "openai", "anthropic", "urllib3")
"""Libraries that log every request to a model at INFO, with its URL. The server logs the runs."""


def _escape_unprintable(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    """Escapes in each text what a terminal would execute, reorder or hide: ids come from callers.

    The JSON format does so itself.
    """
    for key, value in line.items():
        # A stack has lines of its own, and no text of callers.
        if isinstance(value, str) and key != "exception" and not value.isprintable():
            line[key] = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value)
    return line


def _for_people(output: TextIO) -> tuple[Processor, ...]:
    """Renders lines for people; with colours on a terminal, unless NO_COLOR is set."""
    colors = output.isatty() and not os.environ.get("NO_COLOR")
    return _escape_unprintable, structlog.dev.ConsoleRenderer(colors=colors)


_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def _without_messages(exc_info: _ExcInfo) -> str:
    """Formats an exception and its causes without their messages, which may quote a prompt or the
    instructions of an agent."""
    parts: list[str] = []
    error: BaseException | None = exc_info[1]
    while error is not None:
        frames = "".join(traceback.format_tb(error.__traceback__))
        parts.insert(0, f"{frames}{type(error).__module__}.{type(error).__qualname__}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n\n".join(parts)


def _with_messages(exc_info: _ExcInfo) -> str:
    return "".join(traceback.format_exception(*exc_info)).rstrip()


def configure(
    log_format: str = "auto",
    level: str = "info",
    *,
    process: int | None = None,
    content: bool = False,
) -> None:
    """Configures structlog, and redirects the logging of grpc and asyncio to it.

    `auto` means `console` if stderr is a terminal, else `json`. The number of the `process`, if
    there are several, is added to each line. Only with `content` does the log have the messages of
    unexpected exceptions.
    """
    # None if the process was started with stderr closed.
    output = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    console = log_format == "console" or (log_format == "auto" and output.isatty())
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _Timestamp(),
    ]
    if process is not None:
        # Not a context variable: threads and callbacks of grpc have their own contexts.
        shared.append(_ProcessNumber(process))
    finishing: list[Processor] = [
        structlog.processors.ExceptionRenderer(_with_messages if content else _without_messages),
        *(_for_people(output) if console else (_to_json,)),
    ]
    stream = cast("TextIO", _LossyStream(output))
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
    for name in _HTTP_CLIENTS:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))
