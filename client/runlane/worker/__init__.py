"""Executes runs of a server in this process.

    from runlane.worker import Worker

    async def answer(turn):
        yield f"You said: {turn.prompt.text}"

    Worker("127.0.0.1:50051", {"default": answer}, slots=8).run()

The functions are those that a server takes as `--agent MODULE:ATTRIBUTE`: async functions run on
the event loop, plain ones in threads, and both may yield events or return the answer.
"""

from __future__ import annotations

from runlane.types import FinishReason, ReasoningDelta, TextDelta, ToolCall, ToolResult, Usage
from runlane.worker.events import (
    AgentError,
    Artifact,
    Custom,
    FoldedPrompt,
    Prompt,
    Report,
    Result,
)
from runlane.worker.functions import BlockingTurn
from runlane.worker.questions import Approval
from runlane.worker.turn import Turn
from runlane.worker.worker import Worker

__all__ = [
    "AgentError",
    "Approval",
    "Artifact",
    "BlockingTurn",
    "Custom",
    "FinishReason",
    "FoldedPrompt",
    "Prompt",
    "ReasoningDelta",
    "Report",
    "Result",
    "TextDelta",
    "ToolCall",
    "ToolResult",
    "Turn",
    "Usage",
    "Worker",
]
