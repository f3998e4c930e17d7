"""The view of a chat of a session: lines that stay, and an area above the input that changes.

Everything that others wrote is made safe here: prompt_toolkit shows control characters, but would
pass on those that hide or reorder text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from runlane.cli.base import describe
from runlane.cli.chat.transcript import Past, past_lines
from runlane.cli.late_prompts import brings
from runlane.cli.output import field, one_line
from runlane.cli.run_view import artifact_text, end_text
from runlane.cli.terminal import for_terminal
from runlane.errors import RunlaneError
from runlane.inputs import (
    InputAnswered,
    InputExpired,
    InputKind,
    InputRequest,
    InputRequested,
    InputWithdrawn,
)
from runlane.session_stream import (
    QueueChanged,
    SessionChanged,
    SessionEvent,
    SessionRunEvent,
    SessionSnapshot,
)
from runlane.types import (
    Artifact,
    Folded,
    Run,
    RunComplete,
    RunEvent,
    RunPrompt,
    Session,
    Started,
    TextDelta,
    ToolCall,
    ToolResult,
)

Fragments: TypeAlias = list[tuple[str, str]]
"""Styles and texts, as prompt_toolkit takes them."""

PrintLine: TypeAlias = Callable[[str, str], None]
"""Prints a line that stays: its text and its style."""

EXCERPT_CHARS = 256
"""The length of an excerpt; a prompt of that length may be longer."""

MAX_QUEUED_LINES = 5
OPEN_ROWS = 4
"""Rows of the line that is being written; a longer one is broken."""

CONSIDER_SECONDS = 1.0
"""A line answers an approval only this long after it became the next question: it may have been
meant as a prompt that a person was typing when the question came, or for the question before."""

_KEYS: Mapping[InputKind, str] = MappingProxyType(
    {
        InputKind.APPROVAL: "y and Enter approves, n and Enter denies",
        InputKind.CHOICE: "type the number of a choice and Enter",
        InputKind.FORM: "type a JSON object and Enter",
        InputKind.TEXT: "type the answer and Enter",
    }
)


class ChatView:
    """The state of a session as its events tell it. `sending` has the prompts that the server has
    not accepted yet, by run id."""

    def __init__(self, print_line: PrintLine, width: Callable[[], int]) -> None:
        self._print = print_line
        self._width = width
        self.session: Session | None = None
        self.active_run_id = ""
        self.sending: dict[str, str] = {}
        self.is_lost = False
        self._queue: tuple[str, ...] = ()
        self._prompts: dict[str, str] = {}
        self._unannounced = ""
        self._open_line = ""
        self._wrote_text = False
        self._questions: dict[str, InputRequest] = {}
        self._first = ""
        self._first_since = 0.0
        self._is_typing = False
        self._past: frozenset[str] = frozenset()
        self.editing: RunPrompt | None = None
        """The waiting prompt that the input replaces."""
        self.addressee: InputRequest | None = None
        """The question that was the next one when the person began to type."""

    # --- The area above the input -----------------------------------------------------------------

    @property
    def question(self) -> InputRequest | None:
        """The question to answer next."""
        return next(iter(self._questions.values()), None)

    @property
    def last_waiting(self) -> str:
        """The run that was queued last; empty if none waits."""
        return self._queue[-1] if self._queue else ""

    @property
    def is_considered(self) -> bool:
        """Whether the next question is an approval that has been shown for long enough."""
        question = self.question
        if question is None or question.kind is not InputKind.APPROVAL:
            return False
        return time.monotonic() - self._first_since >= CONSIDER_SECONDS

    def typed(self, text: str) -> None:
        """Notes a change of the input."""
        if text and not self._is_typing:
            self.addressee = self.question
        self._is_typing = bool(text)

    def area(self) -> Fragments:
        """The open line, the prompts that wait, and how to answer the question."""
        lines: Fragments = []
        if self._open_line:
            lines.append(("", for_terminal(self._open_line)))
        waiting = [("queued", self._prompts.get(run_id, run_id)) for run_id in self._queue]
        waiting += [("sending", prompt) for prompt in self.sending.values()]
        lines += [
            ("class:note", f"  {state}: {one_line(prompt, 60)}")
            for state, prompt in waiting[:MAX_QUEUED_LINES]
        ]
        if len(waiting) > MAX_QUEUED_LINES:
            lines.append(("class:note", f"  … and {len(waiting) - MAX_QUEUED_LINES} more"))
        question = self.question
        if question is not None:
            how = _KEYS.get(question.kind, "use runlane answer")
            if self._is_typing and question != self.addressee:
                how = "Enter sends what you were typing, not an answer"
            is_early = question.kind is InputKind.APPROVAL and not self.is_considered
            lines.append(("class:ask", "  …" if is_early else f"  {how}"))
        return [(style, f"{text}\n") for style, text in lines]

    def status(self) -> str:
        """The line above the input: what happens, the title, and the keys."""
        session = self.session
        if self.is_lost:
            work = "reconnecting"
        elif self.editing is not None:
            work = "editing a queued prompt: Enter saves it, Ctrl-C leaves it as it is"
        elif self.question is not None:
            work = "asks you"
        else:
            work = "working; Esc cancels" if self.active_run_id else "idle"
        title = "" if session is None or not session.title else f" · {one_line(session.title, 40)}"
        return f"[{work}{title} · Ctrl-D leaves]"

    # --- Lines that stay --------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Prints a line about the conversation."""
        self._end_line()
        self._print(for_terminal(text), "dim")

    def show_past(self, past: Past, session_id: str) -> None:
        """Prints the end of the transcript. Events of its runs that follow have been shown so."""
        self._past = past.run_ids
        for text, style in past_lines(past, session_id):
            self._print(for_terminal(text), style)

    def accepted(self, run_id: str) -> None:
        """Notes that the server has a prompt that was being sent."""
        prompt = self.sending.pop(run_id, None)
        if prompt is not None:  # else its run was shown already
            self._prompts.setdefault(run_id, prompt)

    def show_lost(self, error: RunlaneError) -> None:
        """Reports a lost connection, once until it is back."""
        if not self.is_lost:
            self.is_lost = True
            self.note(f"reconnecting: {describe(error)}")

    def learn(self, *runs: Run) -> None:
        """Notes the prompts of runs: their excerpts, but those of this chat whole."""
        for run in runs:
            own = self.sending.pop(run.run_id, None) or self._prompts.get(run.run_id, "")
            is_whole = not run.revision and own.startswith(run.prompt_excerpt)
            self._prompts[run.run_id] = own if is_whole else run.prompt_excerpt

    def lacking(self, event: SessionEvent) -> str:
        """The run whose prompt the event makes visible but is not known; empty if there is none."""
        if self._unannounced:
            return "" if brings(event, self._unannounced) else self._unannounced
        match event.body:
            case SessionRunEvent(run_id, RunEvent(body=Folded(run_id=joined))) if joined != run_id:
                is_known = joined in self._prompts or joined in self.sending
                return "" if is_known or run_id in self._past else joined
            case _:
                return ""

    def show(self, event: SessionEvent) -> None:
        """Shows an event of the session."""
        if self.is_lost:
            self.is_lost = False
            self.note("connected again")
        match event.body:
            case SessionSnapshot() as snapshot:
                self._show_snapshot(snapshot)
            case SessionRunEvent(run_id, of_run) if run_id not in self._past:
                self._show_run_event(run_id, of_run)
            case QueueChanged(run_ids, runs):
                self._queue = run_ids
                self.learn(*runs)
            case SessionChanged(session, active_run):
                self._show_change(session, active_run)
        self._consider()

    def _consider(self) -> None:
        """A question that has become the first one is considered from now on: a line may have been
        meant for the one before."""
        first = next(iter(self._questions), "")
        if first != self._first:
            self._first, self._first_since = first, time.monotonic()

    def _show_snapshot(self, snapshot: SessionSnapshot) -> None:
        self.session = snapshot.session
        self._queue = tuple(run.run_id for run in snapshot.queue)
        self.learn(*snapshot.queue, *snapshot.folded)
        self._questions.clear()
        self.active_run_id = ""
        self._open_line = ""
        if snapshot.session is None:
            self.note("a new session; it begins with your first prompt")
        if snapshot.active_run is not None:
            self.learn(snapshot.active_run)
            self._announce(snapshot.active_run.run_id)
        for event in snapshot.output:
            if snapshot.active_run is not None and not isinstance(event.body, Started):
                self._show_run_event(snapshot.active_run.run_id, event)
        for request in snapshot.input_requests:
            self._ask(request)

    def _show_change(self, session: Session | None, active_run: Run | None) -> None:
        before, self.session = self.session, session
        if active_run is not None:
            self.learn(active_run)
        self._announce_late()
        self.active_run_id = "" if active_run is None else active_run.run_id
        if session is None:
            self._queue = ()
            self._questions.clear()
            self.note("the session was deleted")
        elif before is not None and before.title != session.title:
            self.note(f"title: {one_line(session.title)}")

    def _show_run_event(self, run_id: str, event: RunEvent) -> None:
        self._announce_late()
        match event.body:
            case Started(attempt):
                self._on_start(run_id, attempt)
            case TextDelta(text):
                self._write(text)
            case ToolCall(name=name, arguments_json=arguments):
                self.note(f"· {field(name)} {one_line(arguments)}")
            case ToolResult(name=name, content=content, is_error=is_error):
                outcome = "failed" if is_error else "returned"
                self.note(f"· {field(name)} {outcome}: {one_line(content)}")
            case Artifact(last=True) as artifact:
                self.note(artifact_text(artifact))
            case Folded(run_id=joined) if joined != run_id or joined in self._prompts:
                self._end_line()
                self._show_prompt(joined)
            case InputRequested(input_request=request):
                self._ask(request)
            case InputAnswered() | InputWithdrawn() | InputExpired():
                self._questions.pop(event.body.input_request_id, None)
            case RunComplete() as complete:
                self._on_end(run_id, complete)
            case _:
                pass

    def _on_start(self, run_id: str, attempt: int) -> None:
        if attempt > 1:
            self.active_run_id = run_id
            self.note(f"the run starts over (attempt {attempt}); ignore its text above")
        elif run_id in self._prompts or run_id in self.sending:
            self._announce(run_id)
        else:
            # The prompt of a run that starts at once follows with the change of the session.
            self._unannounced = self.active_run_id = run_id

    def _announce_late(self) -> None:
        run_id, self._unannounced = self._unannounced, ""
        if run_id:
            self._announce(run_id)

    def _announce(self, run_id: str) -> None:
        self.active_run_id = run_id
        self._wrote_text = False
        self._end_line()
        self._show_prompt(run_id)

    def _show_prompt(self, run_id: str) -> None:
        own = self.sending.pop(run_id, None)
        prompt = self._prompts.pop(run_id, own) or f"(run {run_id})"
        if len(prompt) == EXCERPT_CHARS:
            prompt += f"… (runlane show {field(run_id)} --prompt)"
        for line in for_terminal(prompt).splitlines() or [""]:
            self._print(f"> {line}", "bold cyan")

    def _on_end(self, run_id: str, complete: RunComplete) -> None:
        for name, request in list(self._questions.items()):
            if request.run_id == run_id:
                del self._questions[name]
        if run_id == self.active_run_id:
            self.active_run_id = ""
            if not self._wrote_text:
                self._write(complete.text)
        self._end_line()
        if (line := end_text(complete)) is not None:
            self.note(line)

    def _ask(self, request: InputRequest) -> None:
        """Prints a question whole: a person may only approve what can be seen."""
        if request.input_request_id in self._questions:
            return
        self._questions[request.input_request_id] = request
        self._end_line()
        self._print(f"? {field(request.text)}", "bold magenta")
        if request.tool_name:
            self._print(f"  {field(request.tool_name)} {field(request.arguments_json)}", "magenta")
        for n, choice in enumerate(request.choices, start=1):
            self._print(f"  {n}. {field(choice)}", "magenta")
        if request.kind is InputKind.FORM:
            self._print(f"  schema {field(request.schema_json)}", "dim")

    def _write(self, text: str) -> None:
        if not text:
            return
        self._wrote_text = True
        *lines, self._open_line = (self._open_line + for_terminal(text)).split("\n")
        for line in lines:
            self._print(line, "")
        most = OPEN_ROWS * max(self._width(), 20)
        while len(self._open_line) > most:
            cut = self._open_line.rfind(" ", most // 2, most) + 1 or most
            self._print(self._open_line[:cut], "")
            self._open_line = self._open_line[cut:]

    def _end_line(self) -> None:
        line, self._open_line = self._open_line, ""
        if line:
            self._print(line, "")
