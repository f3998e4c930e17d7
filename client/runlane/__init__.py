"""Runlane's client: hand prompts to agent runs, cancel them, and learn how each of them ended.

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
    CursorCompacted,
    CursorInvalid,
    DeadlineExceeded,
    Draining,
    EmptyPrompt,
    EventGap,
    Internal,
    InvalidArgument,
    Overloaded,
    PageTokenInvalid,
    PermissionDenied,
    PromptTooLarge,
    QueueFull,
    QuotaExceeded,
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
    Violation,
)
from runlane.pager import Page, Pager
from runlane.run_events import RunEvents
from runlane.run_handle import RunHandle
from runlane.subscription import Subscription
from runlane.types import (
    Accepted,
    Attachment,
    CancelledRun,
    CancelReceipt,
    CancelScope,
    EventBody,
    FinishReason,
    Folded,
    Message,
    Part,
    Progress,
    Reasoning,
    ReasoningDelta,
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
    "Attachment",
    "CancelReceipt",
    "CancelScope",
    "CancelledRun",
    "Client",
    "ClientClosed",
    "CursorCompacted",
    "CursorInvalid",
    "DeadlineExceeded",
    "Draining",
    "EmptyPrompt",
    "EventBody",
    "EventGap",
    "FinishReason",
    "Folded",
    "Internal",
    "InvalidArgument",
    "Message",
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
    "RetryPolicy",
    "Role",
    "Run",
    "RunComplete",
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
    "Usage",
    "Violation",
    "WhenBusy",
]
