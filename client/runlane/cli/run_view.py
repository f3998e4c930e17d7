"""What is seen of a run: the text on stdout; on a terminal what else happens on stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

import click
from rich.markup import escape
from rich.status import Status
from rich.text import Text

from runlane.cli.base import describe
from runlane.cli.output import for_terminal, json_line, on_terminal, one_line, stderr_console
from runlane.errors import RunlaneError
from runlane.types import (
    Folded,
    ReasoningDelta,
    RunComplete,
    RunEvent,
    RunState,
    Started,
    TextDelta,
    ToolCall,
    ToolResult,
)


class RunView:
    """Shows one run. A context manager, as it may have to give the terminal back."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._err = stderr_console()
        # Beside the text only where people see both.
        self._chatty = self._err.is_terminal and not as_json
        self._clean = on_terminal()
        self._spinner: Status | None = None
        self._interrupted = False
        self._open_line: str | None = None
        self._wrote_text = False
        self._lost = False

    def __enter__(self) -> Self:
        if self._chatty:
            self._spinner = Status("sending", console=self._err, spinner="dots")
            self._spinner.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._calm()
        if exc is not None and not isinstance(exc, BrokenPipeError):
            self._end_line()

    @property
    def spinning(self) -> bool:
        """Whether there is a spinner; it goes when the first output comes."""
        return self._spinner is not None

    def place(self, text: str) -> None:
        """Says where the run is, unless there is something more important to say."""
        if self._spinner is not None and not self._interrupted and not self._lost:
            self._spinner.update(escape(text))

    def waiting(self, text: str) -> None:
        """Says that the run is being cancelled."""
        self._interrupted = True
        if self._spinner is not None:
            self._spinner.update(escape(text))
        else:
            self.note(text)

    def note(self, text: str) -> None:
        """A line on stderr."""
        # Only where both are on one screen does the text have to make room.
        if self._clean or self._open_line == "aside":
            self._end_line()
        if self._err.is_terminal:
            self._err.print(Text(for_terminal(text), style="dim"))
        else:
            click.echo(text, err=True)

    def lost(self, error: RunlaneError) -> None:
        """Says that the connection is lost; once, however often it takes."""
        if not self._lost:
            self._lost = True
            self.note(f"reconnecting: {describe(error)}")

    def show(self, event: RunEvent) -> None:
        """Shows an event."""
        if self._lost:
            self._lost = False
            self.note("connected again")
        if self._as_json:
            click.echo(json_line(event))
            return
        match event.body:
            case TextDelta(text=text):
                self._text(text)
            case ReasoningDelta(text=text):
                self._aside(text)
            case ToolCall(name=name, arguments_json=arguments):
                self._step(f"{name} {one_line(arguments)}")
            case ToolResult(name=name, content=content, is_error=is_error):
                self._step(f"{name} {'failed' if is_error else 'answered'}: {one_line(content)}")
            case Started(attempt=attempt) if attempt > 1:
                self._again(attempt)
            case Folded(run_id=run_id, into_run_id=into_run_id):
                self._step(f"run {run_id} joined the turn of {into_run_id}")
            case RunComplete():
                self._end(event.body)
            case _:
                pass

    def _text(self, text: str) -> None:
        self._calm()
        if self._open_line == "aside":
            self._end_line()
        click.echo(for_terminal(text) if self._clean else text, nl=False)
        if text:
            self._wrote_text = True
            self._open_line = None if text.endswith("\n") else "text"

    def _aside(self, text: str) -> None:
        if not self._chatty or not text:
            return
        self._calm()
        if self._open_line == "text":
            self._end_line()
        self._err.print(Text(for_terminal(text), style="dim"), end="")
        self._open_line = None if text.endswith("\n") else "aside"

    def _step(self, text: str) -> None:
        if self._chatty:
            self._calm()
            self.note(f"· {text}")

    def _again(self, attempt: int) -> None:
        # What was printed cannot be taken back, not from a pipe.
        if self._wrote_text:
            self._calm()
            self.note(f"the run starts over (attempt {attempt}); the text above does not count")
        self._wrote_text = False

    def _end(self, complete: RunComplete) -> None:
        self._calm()
        # The deltas of a folded run went to the run whose turn it joined.
        if not self._wrote_text and complete.text:
            self._text(complete.text)
            if complete.text_truncated:
                self.note(f"cut off; whole in: runlane messages {complete.session_id}")
        self._end_line()
        if (line := ending(complete)) is not None:
            self.note(line)

    def _calm(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def _end_line(self) -> None:
        """Ends the line at hand on the stream that it was begun on."""
        if self._open_line is not None:
            click.echo(err=self._open_line == "aside")
            self._open_line = None
        if sys.stdout is not None:
            sys.stdout.flush()


def ending(complete: RunComplete) -> str | None:
    """How a run ended, in a line; None where it ended well."""
    if complete.state is RunState.COMPLETED:
        return None
    if complete.cancelled:
        return f"cancelled: {complete.cancel_reason}" if complete.cancel_reason else "cancelled"
    if complete.error is None:
        return str(complete.state)
    return f"{complete.state}: {complete.error.reason}: {one_line(complete.error.message, 500)}"
