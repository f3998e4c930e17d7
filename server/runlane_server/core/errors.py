"""What can go wrong, each with the stable reason that callers see.

    RunlaneError
    ├── InvalidArgument          one or more fields are malformed
    │   ├── EmptyPrompt
    │   ├── SessionMissing
    │   ├── RunMissing
    │   ├── PromptTooLarge
    │   ├── CursorInvalid
    │   └── PageTokenInvalid
    ├── SessionNotFound, SessionExists, SessionBusy
    ├── RunNotFound, RunIdConflict
    ├── QueueFull, Overloaded, QuotaExceeded
    ├── CursorCompacted
    ├── Draining
    ├── StoreUnavailable
    ├── Unauthenticated, PermissionDenied
    └── GateNotFound, Unsupported    of the harness

`rpc.errors` gives each its gRPC status; `proto/runlane/v1/error_reason.proto` documents them.
`StartError` and `IllegalCommand` are not among them: they never reach a caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Violation:
    """A field that is wrong, and what is wrong with it."""

    field: str
    description: str


class RunlaneError(Exception):
    """An error that a caller is told of.

    `retry_after`, in seconds, is given where waiting helps; `metadata` goes into ErrorInfo.
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
    """One or more fields are malformed; all of them are named together."""

    reason = "INVALID_ARGUMENT"

    @classmethod
    def of(cls, field: str, description: str) -> InvalidArgument:
        """The error for one field."""
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
    """The prompt, or the attachments together, are larger than the server takes."""

    reason = "PROMPT_TOO_LARGE"


class CursorInvalid(InvalidArgument):
    """The cursor is not one that this service gave out."""

    reason = "CURSOR_INVALID"


class PageTokenInvalid(InvalidArgument):
    """The page token is not one that this call gave out."""

    reason = "PAGE_TOKEN_INVALID"


class SessionNotFound(RunlaneError):
    """There is no session of that id (R2)."""

    reason = "SESSION_NOT_FOUND"

    @classmethod
    def of(cls, session_id: str) -> SessionNotFound:
        """The error for one session."""
        return cls(f"there is no session {session_id!r}")


class SessionExists(RunlaneError):
    """A session of that id exists already."""

    reason = "SESSION_EXISTS"


class SessionBusy(RunlaneError):
    """The session has work, and the call wants it idle (R27)."""

    reason = "SESSION_BUSY"


class RunNotFound(RunlaneError):
    """There is no run of that id."""

    reason = "RUN_NOT_FOUND"

    @classmethod
    def of(cls, run_id: str) -> RunNotFound:
        """The error for one run."""
        return cls(f"there is no run {run_id!r}")


class RunIdConflict(RunlaneError):
    """The run id was used before, for another session or another prompt (R3)."""

    reason = "RUN_ID_CONFLICT"

    @classmethod
    def of(cls, run_id: str) -> RunIdConflict:
        """The error for one run."""
        return cls(f"run id {run_id!r} was used before, for another session or another prompt")


class QueueFull(RunlaneError):
    """As many runs wait in the session as may."""

    reason = "QUEUE_FULL"


class Overloaded(RunlaneError):
    """The node has as much work as it takes."""

    reason = "OVERLOADED"


class QuotaExceeded(RunlaneError):
    """The tenant has used up one of its quotas: the violation's field is the tenant, and its
    description names the quota."""

    reason = "QUOTA_EXCEEDED"


class CursorCompacted(RunlaneError):
    """Events after the cursor were removed (R25)."""

    reason = "CURSOR_COMPACTED"


class Draining(RunlaneError):
    """The node is shutting down."""

    reason = "DRAINING"


class StoreUnavailable(RunlaneError):
    """The store did not confirm a write, so its outcome is unknown."""

    reason = "STORE_UNAVAILABLE"


class Unauthenticated(RunlaneError):
    """The caller did not say who it is, or that could not be verified."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(RunlaneError):
    """The caller is known, and may not do this."""

    reason = "PERMISSION_DENIED"


class GateNotFound(RunlaneError):
    """No gate of that id is armed."""

    reason = "GATE_NOT_FOUND"

    @classmethod
    def of(cls, gate_id: str) -> GateNotFound:
        """The error for one gate."""
        return cls(f"no gate {gate_id!r} is armed")


class Unsupported(RunlaneError):
    """This server cannot do that, as it is set or run."""

    reason = "UNSUPPORTED"


class StartError(Exception):
    """The server cannot start; the message is one line that says why.

    `exit_code` is that of the process: 1 where it may be another time.
    """

    exit_code = 1


class SettingsError(StartError):
    """The same, because of its settings: it will not start with them another time either."""

    exit_code = 2


class IllegalCommand(Exception):
    """A command that the lane's state does not allow. It changed nothing.

    The supervisor of a run that was fenced off meets it; anywhere else it is a defect.
    """
