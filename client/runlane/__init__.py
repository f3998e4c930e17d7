"""The Python client of Runlane: submit, cancel, follow and wait for agent runs.

Import everything from here; other modules of this package are private, except `runlane.sync` (the
same client without asyncio), `runlane.errors`, `runlane.types` and `runlane.harness` (for tests).
The client never imports the server, `click` or `rich`.

import asyncio
from runlane import Client

async def main() -> None:
    async with Client("127.0.0.1:50051") as client:
        handle = await client.run_accepted("my-session", "What is new?", allow_missing=True)
        async for event in handle.events():
            print(event.body)

asyncio.run(main())
"""

from __future__ import annotations

from runlane.client import Client
from runlane.errors import (
    ClientClosed,
    CorruptRecord,
    CursorCompacted,
    CursorInvalid,
    DeadlineExceeded,
    Draining,
    EmptyPrompt,
    EventGap,
    GateNotFound,
    Internal,
    InvalidArgument,
    NotConnected,
    Overloaded,
    PageTokenInvalid,
    PermissionDenied,
    PromptTooLarge,
    QueueFull,
    QuotaExceeded,
    RunDeleted,
    RunIdConflict,
    RunlaneError,
    RunMissing,
    RunNotFound,
    SessionBusy,
    SessionExists,
    SessionMissing,
    SessionNotFound,
    StoreUnavailable,
    Unauthenticated,
    Unavailable,
    UnexpectedStatus,
    Unsupported,
    Violation,
)
from runlane.pager import Page, Pager
from runlane.run_events import RunEvents
from runlane.run_handle import RunHandle
from runlane.subscription import Subscription
from runlane.types import (
    Accepted,
    Artifact,
    ArtifactKind,
    Attachment,
    CancelledRun,
    CancelReceipt,
    CancelScope,
    Custom,
    EventBody,
    FinishReason,
    Folded,
    Message,
    Part,
    Progress,
    Reasoning,
    ReasoningDelta,
    Result,
    Role,
    Run,
    RunComplete,
    RunError,
    RunEvent,
    RunState,
    Session,
    Started,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
    WhenBusy,
)
from runlane.wire import RetryPolicy

__all__ = [
    "Accepted",
    "Artifact",
    "ArtifactKind",
    "Attachment",
    "CancelReceipt",
    "CancelScope",
    "CancelledRun",
    "Client",
    "ClientClosed",
    "CorruptRecord",
    "CursorCompacted",
    "CursorInvalid",
    "Custom",
    "DeadlineExceeded",
    "Draining",
    "EmptyPrompt",
    "EventBody",
    "EventGap",
    "FinishReason",
    "Folded",
    "GateNotFound",
    "Internal",
    "InvalidArgument",
    "Message",
    "NotConnected",
    "Overloaded",
    "Page",
    "PageTokenInvalid",
    "Pager",
    "Part",
    "PermissionDenied",
    "Progress",
    "PromptTooLarge",
    "QueueFull",
    "QuotaExceeded",
    "Reasoning",
    "ReasoningDelta",
    "Result",
    "RetryPolicy",
    "Role",
    "Run",
    "RunComplete",
    "RunDeleted",
    "RunError",
    "RunEvent",
    "RunEvents",
    "RunHandle",
    "RunIdConflict",
    "RunMissing",
    "RunNotFound",
    "RunState",
    "RunlaneError",
    "Session",
    "SessionBusy",
    "SessionExists",
    "SessionMissing",
    "SessionNotFound",
    "Started",
    "StoreUnavailable",
    "Subscription",
    "Text",
    "TextDelta",
    "ToolCall",
    "ToolResult",
    "Unauthenticated",
    "Unavailable",
    "UnexpectedStatus",
    "Unsupported",
    "Usage",
    "Violation",
    "WhenBusy",
]
