"""Shows one run: its text on stdout and, on a terminal, its other events on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.markup import escape
from rich.status import Status
from rich.text import Text

from runlane.cli.base import describe
from runlane.cli.output import field, json_line, one_line, stderr_console
from runlane.cli.terminal import echo, encodes_all, for_terminal, on_terminal
from runlane.errors import RunlaneError
from runlane.inputs import InputRequest, InputRequested
from runlane.types import (
    Artifact,
    ArtifactKind,
    Custom,
    FinishReason,
    Folded,
    ReasoningDelta,
    RunComplete,
    RunEvent,
    RunState,
    Started,
    Step,
    TextDelta,
    ToolCall,
    ToolResult,
)


class RunView:
    """Shows one run. A context manager, which restores the terminal on exit."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._err = stderr_console()
        self._is_verbose = self._err.is_terminal and not as_json
        self._is_terminal = on_terminal()
        self._spinner: Status | None = None
        self._is_cancelling = False
        # The stream with an unfinished line: stdout or stderr.
        self._open_line: str | None = None
        self._wrote_text = False
        self._is_lost = False

    def __enter__(self) -> Self:
        if self._is_verbose:
            self._spinner = Status(
                "sending", console=self._err, spinner="dots" if encodes_all() else "line"
            )
            self._spinner.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop_spinner()
        if exc is not None and not isinstance(exc, BrokenPipeError):
            self._end_line()

    @property
    def has_spinner(self) -> bool:
        """True until the first output."""
        return self._spinner is not None

    def update_spinner(self, text: str) -> None:
        """Shows a text in the spinner, unless it shows a cancel or a lost connection."""
        if self._spinner is not None and not self._is_cancelling and not self._is_lost:
            self._spinner.update(escape(text))

    def show_cancelling(self, text: str) -> None:
        """Shows that the run is being cancelled."""
        self._is_cancelling = True
        if self._spinner is not None:
            self._spinner.update(escape(text))
        else:
            self.note(text)

    def note(self, text: str) -> None:
        """Prints a line on stderr."""
        # On a terminal, stdout and stderr share the screen, so finish the line of the other one.
        if self._is_terminal or self._open_line == "stderr":
            self._end_line()
        if self._err.is_terminal:
            self._err.print(Text(for_terminal(text), style="dim"))
        else:
            echo(text, err=True)

    def show_lost(self, error: RunlaneError) -> None:
        """Shows that the connection is lost; once until the next event."""
        if not self._is_lost:
            self._is_lost = True
            self.note(f"reconnecting: {describe(error)}")

    def show(self, event: RunEvent) -> None:  # noqa: C901, PLR0912 - one per kind
        """Shows an event."""
        if self._is_lost:
            self._is_lost = False
            self.note("connected again")
        if self._as_json:
            echo(json_line(event))
            return
        match event.body:
            case TextDelta(text=text):
                self._print_text(text)
            case ReasoningDelta(text=text):
                self._print_reasoning(text)
            case ToolCall(name=name, arguments_json=arguments):
                self._print_step(f"{name} {one_line(arguments)}")
            case ToolResult(name=name, content=content, is_error=is_error):
                self._print_step(
                    f"{name} {'failed' if is_error else 'returned'}: {one_line(content)}"
                )
            case Artifact(last=True):
                self._name_artifact(event.body)
            case Custom(type=kind, json=content):
                self._print_step(f"{field(kind)} {one_line(content)}")
            case Step(key=key, json=content):
                self._print_step(f"step {field(key)} {one_line(content)}")
            case Started(attempt=attempt) if attempt > 1:
                self._show_restart(attempt)
            case Folded(run_id=run_id, into_run_id=into_run_id):
                self._print_step(f"run {field(run_id)} joined the turn of {field(into_run_id)}")
            case InputRequested(input_request=request):
                self._stop_spinner()
                self.note(f"input required: {_question(request)}")
                self.note(f"  answer with: runlane answer {field(request.input_request_id)}")
            case RunComplete():
                self._print_end(event.body)
            case _:
                pass

    def _print_text(self, text: str) -> None:
        self._stop_spinner()
        if self._open_line == "stderr":
            self._end_line()
        echo(text, nl=False)
        if text:
            self._wrote_text = True
            self._open_line = None if text.endswith("\n") else "stdout"

    def _print_reasoning(self, text: str) -> None:
        if not self._is_verbose or not text:
            return
        self._stop_spinner()
        if self._open_line == "stdout":
            self._end_line()
        self._err.print(Text(for_terminal(text), style="dim"), end="")
        self._open_line = None if text.endswith("\n") else "stderr"

    def _print_step(self, text: str) -> None:
        if self._is_verbose:
            self._stop_spinner()
            self.note(f"· {text}")

    def _name_artifact(self, artifact: Artifact) -> None:
        self._stop_spinner()
        self.note(artifact_text(artifact))

    def _show_restart(self, attempt: int) -> None:
        # Printed text cannot be removed from a pipe.
        if self._wrote_text:
            self._stop_spinner()
            self.note(f"the run starts over (attempt {attempt}); ignore the text above")
        self._wrote_text = False

    def _print_end(self, complete: RunComplete) -> None:
        self._stop_spinner()
        # A folded run has no text deltas of its own.
        if not self._wrote_text and complete.text:
            self._print_text(complete.text)
            if complete.text_truncated:
                self.note(f"truncated; full text: runlane messages {field(complete.session_id)}")
        self._end_line()
        if (line := end_text(complete)) is not None:
            self.note(line)

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def _end_line(self) -> None:
        """Finishes the open line on its stream."""
        if self._open_line is not None:
            echo(err=self._open_line == "stderr")
            self._open_line = None
        if sys.stdout is not None:
            sys.stdout.flush()


def artifact_text(artifact: Artifact) -> str:
    """Names an artifact in one line; its content is in the transcript, or at its address."""
    name = artifact.name or artifact.artifact_id
    words = ["artifact", one_line(name)]
    if artifact.mime_type:
        words.append(f"({one_line(artifact.mime_type)})")
    if artifact.kind is ArtifactKind.URI and isinstance(artifact.content, str):
        words.append(one_line(artifact.content, 500))
    return " ".join(words)


def _question(request: InputRequest) -> str:
    about = f"{request.tool_name} {request.arguments_json}: " if request.tool_name else ""
    return field(f"{about}{request.text}")


_INCOMPLETE: Mapping[FinishReason | None, str] = {
    FinishReason.LENGTH: "the answer is incomplete: the model reached its token limit (length)",
    FinishReason.CONTENT_FILTER: (
        "the answer is incomplete: the provider's filter stopped it (content_filter)"
    ),
}


def end_text(complete: RunComplete) -> str | None:
    """Describes the end of a run in one line; None if it completed as a whole."""
    if complete.state is RunState.COMPLETED:
        return _INCOMPLETE.get(complete.finish_reason)
    if complete.cancelled:
        return (
            f"cancelled: {one_line(complete.cancel_reason, 500)}"
            if complete.cancel_reason
            else "cancelled"
        )
    if complete.error is None:
        return str(complete.state)
    return f"{complete.state}: {complete.error.reason}: {one_line(complete.error.message, 500)}"
