"""A task, built from the events of its run.

Snapshots and updates come from one sequence of events, so what follows a snapshot begins exactly
where it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import TypeAlias

from a2a.types import a2a_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from runlane.inputs import (
    InputAnswered,
    InputExpired,
    InputRequest,
    InputRequested,
    InputState,
    InputWithdrawn,
)
from runlane.types import (
    Artifact,
    Custom,
    Message,
    Result,
    Role,
    Run,
    RunComplete,
    RunEvent,
    RunState,
    Started,
    Text,
    TextDelta,
)
from runlane_a2a.parts import artifact_part, json_part, text_part
from runlane_a2a.questions import question_message

Update: TypeAlias = pb.TaskStatusUpdateEvent | pb.TaskArtifactUpdateEvent

OUTPUT, RESULT = "runlane.output", "runlane.result"
"""Ids of the artifacts with the text that the agent wrote, and with its structured result."""

MESSAGE = "a2a.message"
"""The type of the custom event by which an agent answers SendMessage with a message."""

REJECTED = "REJECTED"
"""The reason of an agent's error that makes its task rejected, not failed."""

_ENDS: Mapping[RunState, pb.TaskState] = MappingProxyType(
    {
        RunState.COMPLETED: pb.TASK_STATE_COMPLETED,
        RunState.CANCELLED: pb.TASK_STATE_CANCELED,
        RunState.FAILED: pb.TASK_STATE_FAILED,
    }
)

TERMINAL = frozenset({*_ENDS.values(), pb.TASK_STATE_REJECTED})
"""The states in which a task has ended."""


@dataclass(slots=True)
class _Pieces:
    """An artifact as it came so far.

    Attributes:
        name: Its name.
        first: The first piece.
        content: All of it, if the pieces are text (as UTF-8) or bytes: a part for each token would
            take a hundred times its size.
    """

    name: str
    first: pb.Part
    content: bytearray = field(default_factory=bytearray)

    def add(self, part: pb.Part) -> None:
        """Adds a piece of the same kind; only text and bytes come in pieces."""
        kind = part.WhichOneof("content")
        if kind != self.first.WhichOneof("content"):
            return
        if kind == "text":
            self.content += part.text.encode()
        elif kind == "raw":
            self.content += part.raw

    def joined(self) -> pb.Part:
        """One part with all pieces."""
        joined = pb.Part()
        joined.CopyFrom(self.first)
        kind = joined.WhichOneof("content")
        if kind == "text":
            joined.text = self.content.decode()
        elif kind == "raw":
            joined.raw = bytes(self.content)
        return joined


@dataclass(slots=True)
class TaskView:
    """The state of a task after the events so far.

    Attributes:
        task_id: The run.
        context_id: Its session.
        state: The state of the task.
        open: The questions that wait for an answer, the oldest first.
        asked: True if the agent ever asked people.
        replies: True if the agent wants its output to be one message, not the artifacts of a task.
    """

    task_id: str
    context_id: str
    changed: datetime
    state: pb.TaskState = pb.TASK_STATE_SUBMITTED
    open: dict[str, InputRequest] = field(default_factory=dict)
    asked: bool = False
    replies: bool = False
    _message: pb.Message | None = None
    _keeps_output: bool = True
    _artifacts: dict[str, _Pieces] = field(default_factory=dict)

    @classmethod
    def of_run(cls, run: Run) -> TaskView:
        """The view before any event."""
        return cls(run.run_id, run.session_id, run.accepted_at)

    @property
    def has_ended(self) -> bool:
        """True if the task has ended."""
        return self.state in TERMINAL

    @property
    def rests(self) -> bool:
        """True if the task has ended, or waits for people."""
        return self.has_ended or bool(self.open)

    def apply(self, event: RunEvent) -> list[Update]:  # noqa: PLR0911 - one for each kind
        """Applies the next event; returns what a follower is sent."""
        match event.body:
            case Started(attempt):
                # An attempt begins its output again: its first pieces replace the earlier ones.
                if attempt > 1:
                    self._artifacts.clear()
                return self._working(event.time)
            case TextDelta(text):
                append = OUTPUT in self._artifacts
                return [self._piece(OUTPUT, "output", text_part(text), append=append, last=False)]
            case Artifact() as artifact:
                return [self._of_artifact(artifact)]
            case InputRequested(request):
                return self._ask(request, event.time)
            case InputAnswered(key) | InputWithdrawn(key) | InputExpired(key):
                self.open.pop(key, None)
                return self._asking(event.time) if self.open else self._working(event.time)
            case RunComplete() as end:
                return self._end(end)
            case Custom(kind, _) if kind == MESSAGE:
                self.replies = True
                return []
            case _:
                return []

    def end(self, complete: RunComplete, messages: Iterable[Message]) -> None:
        """Completes the view of a run whose events are not needed any more."""
        for message in messages:
            if message.role is not Role.USER:
                self._take_parts(message)
        self._end(complete)

    def set_state(self, run: Run, requests: Iterable[InputRequest]) -> None:
        """Sets the state of a live run that is only listed.

        Args:
            run: The run.
            requests: All its questions.
        """
        times = [] if run.started_at is None else [run.started_at]
        for request in sorted(requests, key=lambda each: each.requested_at):
            times += [request.requested_at, request.closed_at or request.requested_at]
            self.asked = True
            if request.state is InputState.OPEN:
                self.open[request.input_request_id] = request
        if self.open:
            self._asking(max(times))
        elif times:
            self._working(max(times))

    def forget_output(self) -> None:
        """Keeps only the ids of artifacts from now on: a follower has been sent the output."""
        self._keeps_output = False
        for key in self._artifacts:
            self._artifacts[key] = _Pieces("", pb.Part())

    def status(self) -> pb.TaskStatus:
        """The status."""
        return pb.TaskStatus(
            state=self.state, message=self._message, timestamp=timestamp(self.changed)
        )

    def task(self, history: Iterable[pb.Message] = ()) -> pb.Task:
        """The task as it is now."""
        return pb.Task(
            id=self.task_id,
            context_id=self.context_id,
            status=self.status(),
            artifacts=[
                pb.Artifact(artifact_id=key, name=found.name, parts=[found.joined()])
                for key, found in self._artifacts.items()
            ],
            history=history,
        )

    def message(self) -> pb.Message:
        """The output as one message."""
        return pb.Message(
            message_id=f"reply:{self.task_id}",
            context_id=self.context_id,
            role=pb.ROLE_AGENT,
            parts=[found.joined() for found in self._artifacts.values()],
        )

    def _working(self, time: datetime) -> list[Update]:
        return self._become(pb.TASK_STATE_WORKING, time)

    def _ask(self, request: InputRequest, time: datetime) -> list[Update]:
        self.asked = True
        self.open[request.input_request_id] = request
        return self._asking(time)

    def _asking(self, time: datetime) -> list[Update]:
        message = question_message(*self.open.values())
        return self._become(pb.TASK_STATE_INPUT_REQUIRED, time, message)

    def _end(self, end: RunComplete) -> list[Update]:
        self.open.clear()
        updates: list[Update] = []
        if end.text and OUTPUT not in self._artifacts:  # of a turn that it was folded into
            updates.append(self._piece(OUTPUT, "output", text_part(end.text)))
        if end.result is not None:
            updates.append(self._piece(RESULT, "result", json_part(end.result)))
        state, message = _ENDS[end.state], None
        if end.error is not None:
            message = _agent_message(self, f"end:{end.run_id}", end.error.message)
            message.metadata.update({"reason": end.error.reason})
            if end.error.reason == REJECTED:
                state = pb.TASK_STATE_REJECTED
        return [*updates, *self._become(state, end.ended_at, message)]

    def _become(
        self, state: pb.TaskState, time: datetime, message: pb.Message | None = None
    ) -> list[Update]:
        self.state, self.changed, self._message = state, time, message
        return [
            pb.TaskStatusUpdateEvent(
                task_id=self.task_id, context_id=self.context_id, status=self.status()
            )
        ]

    def _of_artifact(self, artifact: Artifact) -> Update:
        return self._piece(
            artifact.artifact_id,
            artifact.name,
            artifact_part(artifact),
            append=artifact.append and artifact.artifact_id in self._artifacts,
            last=artifact.last,
        )

    def _piece(
        self, key: str, name: str, part: pb.Part, *, append: bool = False, last: bool = True
    ) -> Update:
        if not append:
            self._artifacts[key] = _Pieces(name, part if self._keeps_output else pb.Part())
        if self._keeps_output:
            self._artifacts[key].add(part)
        return pb.TaskArtifactUpdateEvent(
            task_id=self.task_id,
            context_id=self.context_id,
            artifact=pb.Artifact(artifact_id=key, name=name, parts=[part]),
            append=append,
            last_chunk=last,
        )

    def _take_parts(self, message: Message) -> None:
        for part in message.parts:
            match part:
                case Text(text):
                    append = OUTPUT in self._artifacts
                    self._piece(OUTPUT, "output", text_part(text), append=append)
                case Artifact():
                    self._of_artifact(part)
                case Result(text):
                    self._piece(RESULT, "result", json_part(text))
                case _:
                    pass


def timestamp(time: datetime) -> Timestamp:
    """The protobuf form of a time."""
    made = Timestamp()
    made.FromDatetime(time)
    return made


def _agent_message(view: TaskView, message_id: str, text: str) -> pb.Message:
    return pb.Message(
        message_id=message_id,
        context_id=view.context_id,
        task_id=view.task_id,
        role=pb.ROLE_AGENT,
        parts=[text_part(text)],
    )
