"""Long runs as tasks of MCP: the extension `io.modelcontextprotocol/tasks` of 2026-07-28.

A task is a run, by its id: nothing is kept here, so a task outlives this process, and any process
with the same rights can go on with it. Questions of agents are for people and not for the client of
a task: such a task is `working`, and its message says what it waits for.

https://modelcontextprotocol.io/seps/2663-tasks-extension
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.extension import Extension, MethodBinding
from mcp.server.mcpserver import require_client_extension
from mcp.shared.exceptions import MCPError
from mcp.types import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    CallToolRequestParams,
    CallToolResult,
    InputResponses,
    RequestParams,
    TextContent,
)

from runlane.cli.mcp_server.records import Record, cut, error_text
from runlane.cli.mcp_server.tools import Tools, as_text
from runlane.client import Client
from runlane.errors import InvalidArgument, RunlaneError, RunNotFound
from runlane.types import Run, RunState

IDENTIFIER = "io.modelcontextprotocol/tasks"

POLL_MS = 1000
"""The suggested interval between two calls of `tasks/get`, in milliseconds."""

VERSIONS = frozenset({"2026-07-28"})
"""The versions of MCP with this extension."""

FOLLOW = "follow_run"

Request = ServerRequestContext[Any, Any]


class TaskParams(RequestParams):
    """The parameters of `tasks/get` and `tasks/cancel`."""

    task_id: str


class UpdateParams(TaskParams):
    """The parameters of `tasks/update`."""

    input_responses: InputResponses


class Tasks(Extension):
    """Answers `follow_run` with a task if the client knows tasks and the run has not ended."""

    identifier = IDENTIFIER

    def __init__(self, client: Client, tools: Tools) -> None:
        self._client = client
        self._tools = tools

    def methods(self) -> Sequence[MethodBinding]:
        """Returns the methods of the extension."""
        return (
            MethodBinding("tasks/get", TaskParams, self._get, VERSIONS),
            MethodBinding("tasks/update", UpdateParams, self._update, VERSIONS),
            MethodBinding("tasks/cancel", TaskParams, self._cancel, VERSIONS),
        )

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: Request, call_next: CallNext
    ) -> HandlerResult:
        """Returns a task for a run that goes on; every other call is one of the tool."""
        run_id = (params.arguments or {}).get("run_id")
        if params.name != FOLLOW or not _knows_tasks(ctx) or not isinstance(run_id, str):
            return await call_next(ctx)
        try:
            run = await self._client.get_run(run_id)
        except RunlaneError:
            return await call_next(ctx)  # the tool reports it
        if run.state.terminal:
            return await call_next(ctx)
        return {"resultType": "task", **_task(run)}

    async def _get(self, ctx: Request, params: TaskParams) -> Record:
        run = await self._find(ctx, params.task_id)
        task = {"resultType": "complete", **_task(run)}
        if run.state.terminal and run.state is not RunState.CANCELLED:
            outcome = await self._tools.outcome(run)
            content = TextContent(type="text", text=as_text(outcome))
            result = CallToolResult(content=[content], structured_content=outcome)
            task["result"] = result.model_dump(by_alias=True, mode="json", exclude_none=True)
        return task

    async def _update(self, ctx: Request, params: UpdateParams) -> Record:
        """Acknowledges the answers, which belong to no request: a task never has any."""
        await self._find(ctx, params.task_id)
        return {"resultType": "complete"}

    async def _cancel(self, ctx: Request, params: TaskParams) -> Record:
        run = await self._find(ctx, params.task_id)
        try:
            await self._client.cancel(run_id=run.run_id, reason="tasks/cancel")
        except RunlaneError as error:
            raise MCPError(INTERNAL_ERROR, error_text(error)) from error
        return {"resultType": "complete"}

    async def _find(self, ctx: Request, task_id: str) -> Run:
        require_client_extension(ctx, IDENTIFIER)
        try:
            return await self._client.get_run(task_id)
        except (RunNotFound, InvalidArgument) as error:
            raise MCPError(INVALID_PARAMS, f"taskId: {error_text(error)}") from error
        except RunlaneError as error:
            raise MCPError(INTERNAL_ERROR, error_text(error)) from error


def _knows_tasks(ctx: Request) -> bool:
    capabilities = ctx.session.client_capabilities
    return IDENTIFIER in ((capabilities and capabilities.extensions) or {})


def _task(run: Run) -> Record:
    """The state of a run as a task. A run that failed is a task with a result that says so."""
    statuses = {RunState.CANCELLED: "cancelled"}
    status = statuses.get(run.state, "completed" if run.state.terminal else "working")
    message = str(run.state)
    if run.state is RunState.INPUT_REQUIRED:
        message = "input required: a person answers, with `runlane answer` or another client"
    elif run.run_complete is not None and run.run_complete.cancel_reason:
        message = f"{message}: {run.run_complete.cancel_reason}"
    return {
        "taskId": run.run_id,
        "status": status,
        "statusMessage": cut(message, 500),
        "createdAt": run.accepted_at.isoformat(),
        "lastUpdatedAt": (run.ended_at or run.started_at or run.accepted_at).isoformat(),
        "ttlMs": None,
        "pollIntervalMs": POLL_MS,
    }
