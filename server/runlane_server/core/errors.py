"""The errors of the service, each with the stable reason that callers see.

    RunlaneError
    ├── InvalidArgument          one or more fields are malformed
    │   ├── EmptyPrompt
    │   ├── SessionMissing
    │   ├── RunMissing
    │   ├── PromptTooLarge
    │   ├── AnswerInvalid
    │   ├── CursorInvalid
    │   └── PageTokenInvalid
    ├── SessionNotFound, SessionExists, SessionBeingDeleted, SessionBusy
    ├── EditConflict, ActiveRunChanged
    ├── TurnNotFound, TurnNotFinished
    ├── RunNotFound, RunIdConflict, RunDeleted, AlreadyStarted, AnchorNotWaiting
    ├── InputNotFound, InputClosed
    ├── AgentNotFound
    ├── WebhookNotFound, WebhookChanged
    ├── QueueFull, Overloaded, QuotaExceeded
    ├── CursorCompacted
    ├── Draining
    ├── StoreUnavailable
    │   └── StoreDown            callers see no difference
    ├── CorruptRecord
    ├── Unauthenticated, PermissionDenied
    └── GateNotFound, Unsupported    raised by the test harness only

`rpc.errors` maps each to its gRPC status; `proto/runlane/v1/error_reason.proto` documents them.
`StartError`, `IllegalCommand` and `InputLimit` never reach a caller and stand outside the tree.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Violation:
    """A malformed field and a description of the problem."""

    field: str
    description: str


class RunlaneError(Exception):
    """Base class of the errors that callers receive.

    `retry_after`, in seconds, is set if a retry may succeed; `metadata` goes into ErrorInfo.
    """

    reason: ClassVar[str]

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.metadata = dict(metadata or {})


class InvalidArgument(RunlaneError):
    """One or more fields are malformed; the error lists all of them."""

    reason = "INVALID_ARGUMENT"

    @classmethod
    def of(cls, field: str, description: str) -> InvalidArgument:
        """Builds the error for one field."""
        return cls(f"{field}: {description}", violations=[Violation(field, description)])


class EmptyPrompt(InvalidArgument):
    """The run has neither a prompt nor a text attachment (R2)."""

    reason = "EMPTY_PROMPT"


class SessionMissing(InvalidArgument):
    """No session id was given (R2)."""

    reason = "SESSION_MISSING"


class RunMissing(InvalidArgument):
    """No run id was given."""

    reason = "RUN_MISSING"


class PromptTooLarge(InvalidArgument):
    """The prompt, or all attachments together, exceed the server's size limit."""

    reason = "PROMPT_TOO_LARGE"


class AnswerInvalid(InvalidArgument):
    """The answer does not match the question of its input request."""

    reason = "ANSWER_INVALID"


class CursorInvalid(InvalidArgument):
    """The cursor was not issued by this service."""

    reason = "CURSOR_INVALID"


class PageTokenInvalid(InvalidArgument):
    """The page token was not issued by this method."""

    reason = "PAGE_TOKEN_INVALID"


class SessionNotFound(RunlaneError):
    """No session has this id (R2)."""

    reason = "SESSION_NOT_FOUND"

    @classmethod
    def of(cls, session_id: str) -> SessionNotFound:
        """Builds the error for one session."""
        return cls(f"there is no session {session_id!r}")


class SessionExists(RunlaneError):
    """A session with this id already exists."""

    reason = "SESSION_EXISTS"


class SessionBeingDeleted(RunlaneError):
    """A session with this id was deleted, and its records are being removed (R3)."""

    reason = "SESSION_BEING_DELETED"

    @classmethod
    def of(cls, session_id: str) -> SessionBeingDeleted:
        """Builds the error for one session."""
        return cls(
            f"session {session_id!r} was deleted, and its records are being removed;"
            " retry later, or use another id",
            retry_after=1.0,
        )


class EditConflict(RunlaneError):
    """The record was changed since the caller read it."""

    reason = "EDIT_CONFLICT"

    @classmethod
    def of_run(cls, run_id: str, revision: int) -> EditConflict:
        """Builds the error for a run, which is at this revision."""
        return cls(
            f"revision: run {run_id!r} is at revision {revision}; read it again",
            metadata={"run_id": run_id, "revision": str(revision)},
        )


class SessionBusy(RunlaneError):
    """The session has work, and the call requires an idle session (R27)."""

    reason = "SESSION_BUSY"


class RunNotFound(RunlaneError):
    """No run has this id."""

    reason = "RUN_NOT_FOUND"

    @classmethod
    def of(cls, run_id: str) -> RunNotFound:
        """Builds the error for one run."""
        return cls(f"there is no run {run_id!r}")


class RunIdConflict(RunlaneError):
    """The run id was used before, for another session, prompt or agent (R3)."""

    reason = "RUN_ID_CONFLICT"

    @classmethod
    def of(cls, run_id: str) -> RunIdConflict:
        """Builds the error for one run."""
        return cls(f"run id {run_id!r} was used before, for another session, prompt or agent")


class RunDeleted(RunlaneError):
    """The run was executed before, and its session was deleted since (R3)."""

    reason = "RUN_DELETED"

    @classmethod
    def of(cls, run_id: str) -> RunDeleted:
        """Builds the error for one run."""
        return cls(
            f"run {run_id!r} was executed before, and its session was deleted;"
            " use a new run id to execute the prompt again"
        )


class AlreadyStarted(RunlaneError):
    """The run has left the queue (R46); the metadata has its state and the active run."""

    reason = "ALREADY_STARTED"

    @classmethod
    def of(
        cls, run_id: str, *, state: str = "", folded_into: str = "", active: str = ""
    ) -> AlreadyStarted:
        """Builds the error; what is not known, or is not there, is empty."""
        found = {"state": state, "folded_into": folded_into, "active_run_id": active}
        return cls(
            f"run {run_id!r} has left the queue{f' and is {state}' if state else ''}",
            metadata={"run_id": run_id, **{name: it for name, it in found.items() if it}},
        )


class AnchorNotWaiting(RunlaneError):
    """The run that a move refers to does not wait in the same queue (R46)."""

    reason = "ANCHOR_NOT_WAITING"

    @classmethod
    def of(cls, anchor: str, run_id: str) -> AnchorNotWaiting:
        """Builds the error for one anchor."""
        return cls(
            f"position: run {anchor!r} does not wait in the queue of run {run_id!r}, or has begun"
            " its turn",
            metadata={"run_id": run_id, "anchor_run_id": anchor},
        )


class InputNotFound(RunlaneError):
    """No input request has this id."""

    reason = "INPUT_NOT_FOUND"

    @classmethod
    def of(cls, input_request_id: str) -> InputNotFound:
        """Builds the error for one input request."""
        return cls(f"there is no input request {input_request_id!r}")


class InputClosed(RunlaneError):
    """The input request needs no answer any more: its run was cancelled or has ended (R42)."""

    reason = "INPUT_CLOSED"

    @classmethod
    def of(cls, input_request_id: str, why: str) -> InputClosed:
        """Builds the error for one input request."""
        return cls(
            f"input request {input_request_id!r} takes no answer: {why}",
            metadata={"input_request_id": input_request_id},
        )


class AgentNotFound(RunlaneError):
    """The server declares no agent of this name (R31)."""

    reason = "AGENT_NOT_FOUND"

    @classmethod
    def of(cls, name: str) -> AgentNotFound:
        """Builds the error for one name."""
        return cls(f"agent: this server has no agent {name!r}; ListAgents returns the names")


class ActiveRunChanged(RunlaneError):
    """The run that the caller takes for the active one is not; the metadata has the one that is."""

    reason = "ACTIVE_RUN_CHANGED"

    @classmethod
    def of(cls, session_id: str, expected: str, active: str) -> ActiveRunChanged:
        """Builds the error; `active` is empty if no run is active."""
        found = f"run {active!r} is" if active else "no run is"
        return cls(
            f"expected_active_run_id: run {expected!r} is not the active run of session"
            f" {session_id!r}; {found}",
            metadata={"session_id": session_id, "active_run_id": active},
        )


class TurnNotFound(RunlaneError):
    """The transcript has no turn of this number."""

    reason = "TURN_NOT_FOUND"

    @classmethod
    def of(cls, session_id: str, turn: int, last: int) -> TurnNotFound:
        """Builds the error for one turn; `last` is the last one that there is."""
        return cls(
            f"at_turn: session {session_id!r} has no turn {turn}; its last turn is {last}",
            metadata={"session_id": session_id, "last_turn": str(last)},
        )


class TurnNotFinished(RunlaneError):
    """The turn, or one before it, belongs to a run that has not ended."""

    reason = "TURN_NOT_FINISHED"

    @classmethod
    def of(cls, session_id: str, turn: int, finished: int) -> TurnNotFinished:
        """Builds the error for one turn; all turns up to `finished` have ended."""
        return cls(
            f"at_turn: turn {turn} of session {session_id!r} has not finished, or one before it has"
            f" not; fork at turn {finished}, or wait for the end of the run",
            metadata={"session_id": session_id, "finished_turn": str(finished)},
        )


class WebhookNotFound(RunlaneError):
    """No webhook has this id."""

    reason = "WEBHOOK_NOT_FOUND"

    @classmethod
    def of(cls, webhook_id: str) -> WebhookNotFound:
        """Builds the error for one webhook."""
        return cls(f"there is no webhook {webhook_id!r}")


class WebhookChanged(RunlaneError):
    """The webhook is not at the revision that a change was made from."""

    reason = "WEBHOOK_CHANGED"

    @classmethod
    def of(cls, webhook_id: str) -> WebhookChanged:
        """Builds the error for one webhook."""
        return cls(f"etag: webhook {webhook_id!r} was changed meanwhile; read it again")


class QueueFull(RunlaneError):
    """The session is at its limit of waiting runs."""

    reason = "QUEUE_FULL"


class Overloaded(RunlaneError):
    """The node is at its limit of waiting runs."""

    reason = "OVERLOADED"


class QuotaExceeded(RunlaneError):
    """The tenant has exhausted one of its quotas. The violation's field is the tenant, its
    description names the quota."""

    reason = "QUOTA_EXCEEDED"


class CursorCompacted(RunlaneError):
    """Events after the cursor were compacted away (R25)."""

    reason = "CURSOR_COMPACTED"


class Draining(RunlaneError):
    """The node is shutting down."""

    reason = "DRAINING"


class StoreUnavailable(RunlaneError):
    """The store did not confirm a write, so its outcome is unknown."""

    reason = "STORE_UNAVAILABLE"


class StoreDown(StoreUnavailable):
    """The store refuses connections: it is down, and not only slow or cut off."""


class CorruptRecord(RunlaneError):
    """A stored record that the call needs cannot be read."""

    reason = "CORRUPT_RECORD"


class Unauthenticated(RunlaneError):
    """The caller sent no credentials, or they could not be verified."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(RunlaneError):
    """The caller is authenticated but lacks permission for this call."""

    reason = "PERMISSION_DENIED"


class GateNotFound(RunlaneError):
    """No gate with this id is armed."""

    reason = "GATE_NOT_FOUND"

    @classmethod
    def of(cls, gate_id: str, armed: Iterable[str]) -> GateNotFound:
        """Builds the error for one gate, with those that are armed."""
        listed = ", ".join(islice(armed, 20)) or "none"
        return cls(f"no gate {gate_id!r} is armed; armed gates: {listed}")


class Unsupported(RunlaneError):
    """This server's settings, or the way it was started, do not support the call."""

    reason = "UNSUPPORTED"


class StartError(Exception):
    """The server cannot start; the message is one line with the reason.

    `exit_code` is that of the process. A supervisor starts a server again after 1, not after 2.

        1  a later start may succeed: the port is in use, the database is down, the disk is full
        2  SettingsError: what the settings name is missing, unreadable, invalid or not installed
    """

    exit_code = 1


class SettingsError(StartError):
    """The server cannot start with these settings, now or later."""

    exit_code = 2


_OF_SETTINGS = frozenset(
    {
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.EROFS,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.EAFNOSUPPORT,
    }
)
"""Errors of the system that another setting avoids, and another attempt does not."""


def start_error(message: str, cause: BaseException | None = None) -> StartError:
    """Returns the error for something that the settings name and that cannot be used.

    It is a SettingsError, unless `cause` is an error of the system that may pass.
    """
    passes = isinstance(cause, OSError) and cause.errno not in _OF_SETTINGS
    return StartError(message) if passes else SettingsError(message)


class IllegalCommand(Exception):
    """A command that the lane's state does not allow. It changed nothing.

    Expected only by the supervisor of a run that was fenced off; anywhere else it is a defect.
    """


class InputLimit(Exception):
    """A run has too many input requests. It changed nothing."""
