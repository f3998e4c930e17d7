"""What a call can raise. One class for each reason of `runlane/v1/error_reason.proto`.

    RunlaneError
    ├── InvalidArgument          one or more fields are malformed; `violations` names them
    │   ├── EmptyPrompt
    │   ├── SessionMissing
    │   ├── RunMissing
    │   ├── PromptTooLarge
    │   ├── CursorInvalid
    │   └── PageTokenInvalid
    ├── SessionNotFound
    ├── SessionExists
    ├── SessionBusy
    ├── RunNotFound
    ├── RunIdConflict
    ├── QueueFull
    ├── Overloaded               the same call succeeds later; `retry_after` says when
    ├── QuotaExceeded            the tenant has used up a quota; `violations` names both
    ├── CursorCompacted          `oldest_cursor` is where to go on from
    ├── Unavailable              nobody answered, or not this node and not now
    │   ├── Draining
    │   └── StoreUnavailable
    ├── DeadlineExceeded         also a TimeoutError
    ├── Unauthenticated
    ├── PermissionDenied
    ├── GateNotFound             of the harness: no such gate is armed
    ├── Unsupported              of the harness: this server cannot do that
    ├── Internal                 a defect of the server; `error_id` finds it in the server's log
    ├── UnexpectedStatus         an answer that no Runlane server gives
    ├── EventGap                 a run's events do not follow on each other
    └── ClientClosed             the client was closed before or during the call

What the server says comes as `google.rpc.ErrorInfo` (domain `runlane`), `BadRequest`,
`QuotaFailure` and `RetryInfo`, in the trailing metadata of the call (https://google.aip.dev/193). A
reason that this version of the client does not know becomes the class of its status, and keeps its
`reason`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType

from grpc import StatusCode


@dataclass(frozen=True, slots=True)
class Violation:
    """A field that is wrong, and what is wrong with it."""

    field: str
    description: str


class RunlaneError(Exception):
    """Anything that a call to Runlane can raise.

    Attributes:
        reason: The stable word for what is wrong; empty where no Runlane server said anything.
        message: A sentence for people; also `str(error)`.
        status: The gRPC status.
        violations: The fields that are wrong, with what is wrong with each.
        retry_after: How long to wait before the same call may succeed, where the server knows.
        metadata: What else the server tells about the error.
        attempts: How often the call was made before it was given up.
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
        # A plain dict, as a mapping proxy cannot be pickled and exceptions often are.
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.attempts = 1

    @property
    def error_id(self) -> str:
        """Finds the details in the server's log; empty where the server gave none."""
        return self.metadata.get("error_id", "")


class InvalidArgument(RunlaneError):
    """One or more fields are malformed; `violations` names each of them."""

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
    """The prompt, or the attachments together, are larger than the server takes."""

    reason = "PROMPT_TOO_LARGE"


class CursorInvalid(InvalidArgument):
    """The cursor is not one that this service gave out."""

    reason = "CURSOR_INVALID"


class PageTokenInvalid(InvalidArgument):
    """The page token is not one that this call gave out."""

    reason = "PAGE_TOKEN_INVALID"


class SessionNotFound(RunlaneError):
    """There is no session of that id."""

    reason = "SESSION_NOT_FOUND"
    default_status = StatusCode.NOT_FOUND


class SessionExists(RunlaneError):
    """There is a session of that id already."""

    reason = "SESSION_EXISTS"
    default_status = StatusCode.ALREADY_EXISTS


class SessionBusy(RunlaneError):
    """The session has work, and the call (REJECT, DeleteSession) wants it idle."""

    reason = "SESSION_BUSY"
    default_status = StatusCode.FAILED_PRECONDITION


class RunNotFound(RunlaneError):
    """There is no run of that id."""

    reason = "RUN_NOT_FOUND"
    default_status = StatusCode.NOT_FOUND


class RunIdConflict(RunlaneError):
    """The run id was used before, for another session or another prompt."""

    reason = "RUN_ID_CONFLICT"
    default_status = StatusCode.ALREADY_EXISTS


class QueueFull(RunlaneError):
    """As many runs wait in the session as may."""

    reason = "QUEUE_FULL"
    default_status = StatusCode.RESOURCE_EXHAUSTED


class Overloaded(RunlaneError):
    """The node has as much work as it takes; `retry_after` says when to come back."""

    reason = "OVERLOADED"
    default_status = StatusCode.RESOURCE_EXHAUSTED


class QuotaExceeded(RunlaneError):
    """The tenant has used up one of its quotas, and the server did nothing.

    `violations` has it: `field` is the tenant, `description` names the quota and its limit.
    `retry_after` says when to come back, where waiting helps.
    """

    reason = "QUOTA_EXCEEDED"
    default_status = StatusCode.RESOURCE_EXHAUSTED


class CursorCompacted(RunlaneError):
    """Events after the cursor were removed, so going on would skip some of them silently.

    What was missed is told by `Client.list_runs` and `Client.get_run`; then subscribe again with
    `cursor=error.oldest_cursor`.
    """

    reason = "CURSOR_COMPACTED"
    default_status = StatusCode.OUT_OF_RANGE

    @property
    def oldest_cursor(self) -> str:
        """The earliest cursor that can still be resumed from."""
        return self.metadata.get("oldest_cursor", "")


class Unavailable(RunlaneError):
    """Nobody answered, or the connection was lost: whether the call had an effect is unknown."""

    default_status = StatusCode.UNAVAILABLE


class Draining(Unavailable):
    """The node is shutting down and did nothing. The same call succeeds elsewhere or later."""

    reason = "DRAINING"

    @property
    def cursor(self) -> str:
        """Where to resume a subscription that this ended; empty for other calls."""
        return self.metadata.get("cursor", "")


class StoreUnavailable(Unavailable):
    """The store did not confirm the write, so the outcome is unknown.

    Repeating the call with the same run id is safe and tells.
    """

    reason = "STORE_UNAVAILABLE"


class DeadlineExceeded(RunlaneError, TimeoutError):
    """The time for the call is up; whether it had an effect is unknown."""

    default_status = StatusCode.DEADLINE_EXCEEDED


class Unauthenticated(RunlaneError):
    """The caller did not say who it is, or that could not be verified."""

    reason = "UNAUTHENTICATED"
    default_status = StatusCode.UNAUTHENTICATED


class PermissionDenied(RunlaneError):
    """The caller is known and may not do this."""

    reason = "PERMISSION_DENIED"
    default_status = StatusCode.PERMISSION_DENIED


class GateNotFound(RunlaneError):
    """No gate of that id is armed, or it was released meanwhile."""

    reason = "GATE_NOT_FOUND"
    default_status = StatusCode.NOT_FOUND


class Unsupported(RunlaneError):
    """This server cannot do that, as it is set or run."""

    reason = "UNSUPPORTED"
    default_status = StatusCode.UNIMPLEMENTED


class Internal(RunlaneError):
    """A defect of the server; `error_id` finds the details in its log."""

    reason = "INTERNAL"
    default_status = StatusCode.INTERNAL


class UnexpectedStatus(RunlaneError):
    """A status that comes from something else than a Runlane server, or from a newer one."""


class EventGap(RunlaneError):
    """A run's events do not follow on each other, and asking again did not help.

    The end of the run and its transcript are still to be had: `Client.wait_run`,
    `Client.list_messages`.
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
            SessionBusy,
            RunMissing,
            RunNotFound,
            RunIdConflict,
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
            Unauthenticated,
            PermissionDenied,
            GateNotFound,
            Unsupported,
            Internal,
        )
    }
)
"""The class of each reason that a server can give."""

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
"""The class where a server gave no reason, or one that is not known here."""

LOST = frozenset(
    {
        StatusCode.UNAVAILABLE,
        StatusCode.ABORTED,
        StatusCode.CANCELLED,
        StatusCode.INTERNAL,
        StatusCode.UNKNOWN,
    }
)
"""What a connection that broke can look like when no Runlane server said anything. INTERNAL and
UNKNOWN are how a reset stream and a proxy's own errors arrive
(https://grpc.github.io/grpc/core/md_doc_statuscodes.html)."""


def is_refused(error: RunlaneError) -> bool:
    """Whether the server certainly did nothing, and may do it later or elsewhere."""
    return isinstance(error, Draining | Overloaded) or _is_quota_that_renews(error)


def is_transient(error: RunlaneError) -> bool:
    """Whether the same call may succeed later or elsewhere; it may have had its effect already."""
    if isinstance(error, ClientClosed | EventGap):
        return False
    # ABORTED is how a server ends a call that it lost track of, for whatever reason.
    if isinstance(error, Unavailable | Overloaded) or error.status is StatusCode.ABORTED:
        return True
    if _is_quota_that_renews(error):
        return True
    return not error.reason and error.status in LOST


def is_unknown(error: RunlaneError) -> bool:
    """Whether nobody can tell by the error if the call had its effect."""
    return is_transient(error) or isinstance(error, DeadlineExceeded)


def _is_quota_that_renews(error: RunlaneError) -> bool:
    """Whether it is a quota that waiting helps with: the server says for how long."""
    return isinstance(error, QuotaExceeded) and error.retry_after is not None
