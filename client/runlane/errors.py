"""The exceptions of calls: one class per reason of `runlane/v1/error_reason.proto`.

    RunlaneError
    ├── InvalidArgument          one or more fields are invalid; `violations` lists them
    │   ├── EmptyPrompt
    │   ├── SessionMissing
    │   ├── RunMissing
    │   ├── PromptTooLarge
    │   ├── AnswerInvalid
    │   ├── CursorInvalid
    │   └── PageTokenInvalid
    ├── SessionNotFound
    ├── SessionExists
    ├── EditConflict             the record was changed since it was read
    ├── TurnNotFound             the session has no such turn; `last_turn` is its last one
    ├── TurnNotFinished          the turn has not finished; `finished_turn` is the last that has
    ├── SessionBusy
    ├── RunNotFound
    ├── RunIdConflict
    ├── AlreadyStarted           the run has left the queue; `state` and `active_run_id` say more
    ├── AnchorNotWaiting         the run to move to does not wait in the same queue
    ├── RunDeleted               the run was executed before, and its session was deleted since
    ├── AgentNotFound
    ├── InputNotFound
    ├── InputClosed              the input request takes no answer any more
    ├── ActiveRunChanged         another run is active than expected; `active_run_id` names it
    ├── WebhookNotFound
    ├── WebhookChanged           the webhook was changed meanwhile
    ├── QueueFull
    ├── Overloaded               the node is at its limit; retry after `retry_after`
    ├── QuotaExceeded            the tenant exceeded a quota; `violations` names both
    ├── CursorCompacted          events were removed; `oldest_cursor` still works
    ├── Unavailable              the server or the node cannot be reached
    │   ├── NotConnected         there was no connection; the call was not sent
    │   ├── Draining
    │   ├── SessionBeingDeleted  the records of a deleted session with this id are being removed
    │   └── StoreUnavailable
    ├── DeadlineExceeded         the call timed out; also a TimeoutError
    ├── CorruptRecord            a stored record that the call needs is damaged
    ├── Unauthenticated
    ├── PermissionDenied
    ├── GateNotFound             harness only: no such gate is armed
    ├── Unsupported              harness only: the server's configuration does not allow it
    ├── Internal                 a bug in the server; `error_id` identifies it in the server log
    ├── UnexpectedStatus         a status that no Runlane server sends
    ├── EventGap                 events of a run are missing
    └── ClientClosed             the client was closed before or during the call

The server sends `google.rpc.ErrorInfo` (domain `runlane`), `BadRequest`, `QuotaFailure` and
`RetryInfo` in the trailing metadata of the call (https://google.aip.dev/193). A reason unknown to
this client maps to the class of its status; the attribute `reason` keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType

from grpc import StatusCode


@dataclass(frozen=True, slots=True)
class Violation:
    """An invalid field and its problem."""

    field: str
    description: str


class RunlaneError(Exception):
    """Base class of all errors of calls.

    Attributes:
        reason: The stable reason; empty if the error does not come from a Runlane server.
        message: A message for people; equal to `str(error)`.
        status: The gRPC status.
        violations: The invalid fields and their problems.
        retry_after: Delay before a retry, if the server sent one.
        metadata: Further details from the server.
        attempts: Number of attempts made.
        may_have_arrived: False if no attempt can have had an effect: none was sent, or the server
            refused each.
    """

    reason: str = ""
    default_status: StatusCode = StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        status: StatusCode | None = None,
        reason: str | None = None,
        violations: Sequence[Violation] = (),
        retry_after: timedelta | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = self.default_status if status is None else status
        if reason is not None:
            self.reason = reason
        self.violations = tuple(violations)
        self.retry_after = retry_after
        # A dict, because exceptions are often pickled and a mapping proxy cannot be.
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.attempts = 1
        self.may_have_arrived = True

    @property
    def error_id(self) -> str:
        """The id of the details in the server log; empty if the server sent none."""
        return self.metadata.get("error_id", "")


class InvalidArgument(RunlaneError):
    """One or more fields are invalid; `violations` lists them."""

    reason = "INVALID_ARGUMENT"
    default_status = StatusCode.INVALID_ARGUMENT


class EmptyPrompt(InvalidArgument):
    """The run has neither a prompt nor a text attachment."""

    reason = "EMPTY_PROMPT"


class SessionMissing(InvalidArgument):
    """No session id was given."""

    reason = "SESSION_MISSING"


class RunMissing(InvalidArgument):
    """No run id was given."""

    reason = "RUN_MISSING"


class PromptTooLarge(InvalidArgument):
    """The prompt, or the attachments together, exceed the server's size limit."""

    reason = "PROMPT_TOO_LARGE"


class AnswerInvalid(InvalidArgument):
    """The answer does not match the question of its input request."""

    reason = "ANSWER_INVALID"


class CursorInvalid(InvalidArgument):
    """This service did not issue the cursor."""

    reason = "CURSOR_INVALID"


class PageTokenInvalid(InvalidArgument):
    """This call did not issue the page token."""

    reason = "PAGE_TOKEN_INVALID"


class SessionNotFound(RunlaneError):
    """No session has this id."""

    reason = "SESSION_NOT_FOUND"
    default_status = StatusCode.NOT_FOUND


class SessionExists(RunlaneError):
    """A session with this id exists already."""

    reason = "SESSION_EXISTS"
    default_status = StatusCode.ALREADY_EXISTS


class EditConflict(RunlaneError):
    """The record was changed since it was read. Read it again before you change it."""

    reason = "EDIT_CONFLICT"
    default_status = StatusCode.FAILED_PRECONDITION


class SessionBusy(RunlaneError):
    """The session has unfinished runs and the call requires an idle session."""

    reason = "SESSION_BUSY"
    default_status = StatusCode.FAILED_PRECONDITION


class RunNotFound(RunlaneError):
    """No run has this id."""

    reason = "RUN_NOT_FOUND"
    default_status = StatusCode.NOT_FOUND


class RunIdConflict(RunlaneError):
    """A run with this id exists already with a different session, prompt, attachments or
    agent."""

    reason = "RUN_ID_CONFLICT"
    default_status = StatusCode.ALREADY_EXISTS


class RunDeleted(RunlaneError):
    """The run was executed before, and its session was deleted since.

    To execute the prompt again, use a new run id.
    """

    reason = "RUN_DELETED"
    default_status = StatusCode.FAILED_PRECONDITION


class AgentNotFound(RunlaneError):
    """The server has no agent of this name; `Client.list_agents` returns the names."""

    reason = "AGENT_NOT_FOUND"
    default_status = StatusCode.NOT_FOUND


class InputNotFound(RunlaneError):
    """No input request has this id."""

    reason = "INPUT_NOT_FOUND"
    default_status = StatusCode.NOT_FOUND


class InputClosed(RunlaneError):
    """The input request takes no answer any more: its run was cancelled or has ended, or it has
    expired."""

    reason = "INPUT_CLOSED"
    default_status = StatusCode.FAILED_PRECONDITION


class ActiveRunChanged(RunlaneError):
    """Another run of the session is active than the caller expected, or none."""

    reason = "ACTIVE_RUN_CHANGED"
    default_status = StatusCode.FAILED_PRECONDITION

    @property
    def active_run_id(self) -> str:
        """The run that is active; empty for none."""
        return self.metadata.get("active_run_id", "")


class TurnNotFound(RunlaneError):
    """The session has no turn of this number."""

    reason = "TURN_NOT_FOUND"
    default_status = StatusCode.NOT_FOUND

    @property
    def last_turn(self) -> int:
        """The last turn of the session; 0 without any."""
        return int(self.metadata.get("last_turn", "0"))


class TurnNotFinished(RunlaneError):
    """The turn, or one before it, belongs to a run that has not ended."""

    reason = "TURN_NOT_FINISHED"
    default_status = StatusCode.FAILED_PRECONDITION

    @property
    def finished_turn(self) -> int:
        """The last turn that a fork can have now; 0 for none."""
        return int(self.metadata.get("finished_turn", "0"))


class AlreadyStarted(RunlaneError):
    """The run has left the queue, so it can be neither edited nor moved."""

    reason = "ALREADY_STARTED"
    default_status = StatusCode.FAILED_PRECONDITION

    @property
    def state(self) -> str:
        """The state of the run, such as "active"."""
        return self.metadata.get("state", "")

    @property
    def folded_into(self) -> str:
        """The run whose turn it joined; empty for none."""
        return self.metadata.get("folded_into", "")

    @property
    def active_run_id(self) -> str:
        """The active run of the session; empty for none."""
        return self.metadata.get("active_run_id", "")


class AnchorNotWaiting(RunlaneError):
    """The run that a move refers to does not wait in the queue of the run to move."""

    reason = "ANCHOR_NOT_WAITING"
    default_status = StatusCode.FAILED_PRECONDITION


class WebhookNotFound(RunlaneError):
    """No webhook has this id."""

    reason = "WEBHOOK_NOT_FOUND"
    default_status = StatusCode.NOT_FOUND


class WebhookChanged(RunlaneError):
    """The webhook was changed meanwhile: the etag is not its current one. Read it again."""

    reason = "WEBHOOK_CHANGED"
    default_status = StatusCode.ABORTED


class QueueFull(RunlaneError):
    """The session is at its limit of waiting runs."""

    reason = "QUEUE_FULL"
    default_status = StatusCode.RESOURCE_EXHAUSTED


class Overloaded(RunlaneError):
    """The node is at its limit of work; `retry_after` is the delay before a retry."""

    reason = "OVERLOADED"
    default_status = StatusCode.RESOURCE_EXHAUSTED


class QuotaExceeded(RunlaneError):
    """The tenant exceeded a quota; the call had no effect.

    In `violations`, `field` is the tenant and `description` names the quota and its limit.
    `retry_after` is the delay before a retry; None if waiting does not help.
    """

    reason = "QUOTA_EXCEEDED"
    default_status = StatusCode.RESOURCE_EXHAUSTED


class CursorCompacted(RunlaneError):
    """Events after the cursor were removed, so resuming would skip them silently.

    Find the missed runs with `Client.list_runs` and `Client.get_run`, then subscribe with
    `cursor=error.oldest_cursor`.
    """

    reason = "CURSOR_COMPACTED"
    default_status = StatusCode.OUT_OF_RANGE

    @property
    def oldest_cursor(self) -> str:
        """The earliest cursor that still works."""
        return self.metadata.get("oldest_cursor", "")


class Unavailable(RunlaneError):
    """No response, or the connection was lost; the call may have had its effect."""

    default_status = StatusCode.UNAVAILABLE


class NotConnected(Unavailable):
    """There was no connection to the server, so the call was not sent."""


class Draining(Unavailable):
    """The node is shutting down; the call had no effect. Retry on another node or later."""

    reason = "DRAINING"

    @property
    def cursor(self) -> str:
        """The cursor to resume an ended subscription from; empty for other calls."""
        return self.metadata.get("cursor", "")


class SessionBeingDeleted(Unavailable):
    """A session with this id was deleted, and its records are being removed; retry later."""

    reason = "SESSION_BEING_DELETED"


class StoreUnavailable(Unavailable):
    """The store did not confirm the write, so the outcome is unknown.

    A retry with the same run id is safe and returns the outcome.
    """

    reason = "STORE_UNAVAILABLE"


class DeadlineExceeded(RunlaneError, TimeoutError):
    """The call timed out; it may have had its effect."""

    default_status = StatusCode.DEADLINE_EXCEEDED


class CorruptRecord(RunlaneError):
    """A stored record that the call needs is damaged. Deleting its session removes it."""

    reason = "CORRUPT_RECORD"
    default_status = StatusCode.DATA_LOSS


class Unauthenticated(RunlaneError):
    """The call has no credentials, or they could not be verified."""

    reason = "UNAUTHENTICATED"
    default_status = StatusCode.UNAUTHENTICATED


class PermissionDenied(RunlaneError):
    """The caller is authenticated and lacks permission for this call."""

    reason = "PERMISSION_DENIED"
    default_status = StatusCode.PERMISSION_DENIED


class GateNotFound(RunlaneError):
    """No armed gate has this id; it may have been released."""

    reason = "GATE_NOT_FOUND"
    default_status = StatusCode.NOT_FOUND


class Unsupported(RunlaneError):
    """The server's configuration does not support this call."""

    reason = "UNSUPPORTED"
    default_status = StatusCode.UNIMPLEMENTED


class Internal(RunlaneError):
    """A bug in the server; `error_id` identifies the details in its log."""

    reason = "INTERNAL"
    default_status = StatusCode.INTERNAL


class UnexpectedStatus(RunlaneError):
    """A status from a proxy, from another service or from a newer Runlane server."""


class EventGap(RunlaneError):
    """Events of a run are missing, also after a second attempt to read them.

    `Client.wait_run` still returns the result and `Client.list_messages` the transcript.
    """

    default_status = StatusCode.DATA_LOSS


class ClientClosed(RunlaneError):
    """The client was closed before or during the call."""

    default_status = StatusCode.CANCELLED

    def __init__(self, message: str = "the client is closed") -> None:
        super().__init__(message)


BY_REASON: Mapping[str, type[RunlaneError]] = MappingProxyType(
    {
        cls.reason: cls
        for cls in (
            EmptyPrompt,
            SessionMissing,
            SessionNotFound,
            SessionExists,
            EditConflict,
            SessionBusy,
            RunMissing,
            RunNotFound,
            RunIdConflict,
            RunDeleted,
            AlreadyStarted,
            AnchorNotWaiting,
            AgentNotFound,
            InputNotFound,
            InputClosed,
            AnswerInvalid,
            ActiveRunChanged,
            TurnNotFound,
            TurnNotFinished,
            SessionBeingDeleted,
            WebhookNotFound,
            WebhookChanged,
            QueueFull,
            Overloaded,
            QuotaExceeded,
            PromptTooLarge,
            CursorInvalid,
            CursorCompacted,
            PageTokenInvalid,
            InvalidArgument,
            Draining,
            StoreUnavailable,
            CorruptRecord,
            Unauthenticated,
            PermissionDenied,
            GateNotFound,
            Unsupported,
            Internal,
        )
    }
)
"""The class of each reason."""

BY_STATUS: Mapping[StatusCode, type[RunlaneError]] = MappingProxyType(
    {
        cls.default_status: cls
        for cls in (
            InvalidArgument,
            Unavailable,
            DeadlineExceeded,
            Unauthenticated,
            PermissionDenied,
            Internal,
        )
    }
)
"""The class of a status, for errors without a reason or with an unknown one."""

LOST = frozenset(
    {
        StatusCode.UNAVAILABLE,
        StatusCode.ABORTED,
        StatusCode.CANCELLED,
        StatusCode.INTERNAL,
        StatusCode.UNKNOWN,
    }
)
"""The statuses of a lost connection, if the error has no reason. A reset stream or an error of a
proxy arrives as INTERNAL or UNKNOWN (https://grpc.github.io/grpc/core/md_doc_statuscodes.html)."""


def is_refused(error: RunlaneError) -> bool:
    """Returns True if the call certainly had no effect and a retry may succeed."""
    return isinstance(error, Draining | Overloaded) or _is_renewing_quota(error)


def is_transient(error: RunlaneError) -> bool:
    """Returns True if a retry may succeed. The call may have had its effect."""
    if isinstance(error, ClientClosed | EventGap):
        return False
    # A server aborts calls whose state it has lost.
    if isinstance(error, Unavailable | Overloaded) or error.status is StatusCode.ABORTED:
        return True
    if _is_renewing_quota(error):
        return True
    return not error.reason and error.status in LOST


def is_outcome_unknown(error: RunlaneError) -> bool:
    """Returns True if the error does not show whether the call had its effect."""
    return is_transient(error) or isinstance(error, DeadlineExceeded)


def _is_renewing_quota(error: RunlaneError) -> bool:
    # The server sends a delay only for quotas that waiting helps with.
    return isinstance(error, QuotaExceeded) and error.retry_after is not None
