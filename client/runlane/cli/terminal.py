"""Writes to stdout and stderr: in the encoding of the stream, and nothing that steers a terminal.

Prompts, answers, titles and ids come from other people. A terminal executes the escape sequences in
them, and shows text in another order or not at all where a character says so. Everything that the
command prints passes this module.
"""

from __future__ import annotations

import errno
import io
import re
import sys
from collections.abc import Iterable
from typing import TextIO

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from runlane_commands.streams import discard

_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but newline and tab
    "\u2028\u2029"  # line separators
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of text
    # Shown as nothing (Default_Ignorable_Code_Point, without the variation selectors of emoji).
    "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200d\u2060-\u2065\u206a-\u206f"
    "\u3164\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff"
    "\ud800-\udfff"
    "]"
)


def unsafe_text(text: str) -> bool:
    """Returns True if a terminal would execute, reorder or hide a part of the text."""
    return _UNSAFE.search(text) is not None


def for_terminal(text: str) -> str:
    """Removes what a terminal would execute, reorder or hide; keeps newlines and tabs."""
    return _UNSAFE.sub("", text)


def escaped(text: str) -> str:
    """Escapes what a terminal would execute, reorder or hide, as `\\x1b` or `\\u202e`."""
    return _UNSAFE.sub(lambda match: _escape(ord(match.group())), text)


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def escaped_json(text: str) -> str:
    """Does the same in the text of JSON, in its own notation; the value stays the same."""
    return _UNSAFE.sub(lambda match: _json_escape(ord(match.group())), text)


def _json_escape(code: int) -> str:
    if code < 0x10000:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


def prepare() -> None:
    """Makes stdout and stderr escape what their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def encodes_all() -> bool:
    """Returns True if stdout can encode every character."""
    return sys.stdout is None or sys.stdout.encoding.lower().replace("-", "").startswith("utf")


def on_terminal(stream: TextIO | None = None) -> bool:
    """Returns True if the stream, by default stdout, is a terminal."""
    # sys.stdout is None if it is closed (`>&-`).
    target = stream or sys.stdout
    return target is not None and target.isatty()


class OutputError(click.ClickException):
    """The output cannot be written, for example because the disk is full."""


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Writes a text. On a terminal, it is made safe. Raises OutputError."""
    stream = sys.stderr if err else sys.stdout
    if stream is None:
        return
    line = f"{text}\n" if nl else text
    try:
        stream.write(for_terminal(line) if on_terminal(stream) else line)
        stream.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:  # `| head` has enough
            raise
        # Else the next flush would fail, and hide this error.
        discard(stream)
        raise OutputError(f"cannot write the output: {error.strerror}") from error


class SafeConsole(Console):
    """A console of rich whose text is safe and plain: no markup, no emoji codes, no highlights."""

    def __init__(self, *, stderr: bool = False, width: int | None = None, wrap: bool = True):
        super().__init__(
            stderr=stderr,
            width=width,
            soft_wrap=not wrap,
            highlight=False,
            markup=False,
            emoji=False,
        )

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yields the segments of a renderable, each of them safe."""
        for segment in super().render(renderable, options):
            if segment.control or not unsafe_text(segment.text):
                yield segment
            else:
                yield segment._replace(text=for_terminal(segment.text))
