"""ListTasks: pages of runs as tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import InvalidParamsError

from runlane.client import Client
from runlane.errors import SessionNotFound
from runlane.inputs import InputRequest
from runlane.pager import Page
from runlane.types import Run, RunOrder, RunState
from runlane_a2a.errors import refuse
from runlane_a2a.history import history_of
from runlane_a2a.task_view import TaskView

MAX_PAGE, DEFAULT_PAGE = 100, 50

AT_ONCE = 8
"""Maximum number of transcripts that are read at a time for one page."""

_STATES: Mapping[pb.TaskState, tuple[RunState, ...]] = MappingProxyType(
    {
        pb.TASK_STATE_SUBMITTED: (RunState.ACCEPTED, RunState.QUEUED),
        pb.TASK_STATE_WORKING: (
            RunState.ACTIVE,
            RunState.CANCELLING,
            RunState.FOLDED,
            RunState.INPUT_REQUIRED,
        ),
        pb.TASK_STATE_INPUT_REQUIRED: (RunState.INPUT_REQUIRED, RunState.CANCELLING),
        pb.TASK_STATE_COMPLETED: (RunState.COMPLETED,),
        pb.TASK_STATE_CANCELED: (RunState.CANCELLED,),
        pb.TASK_STATE_FAILED: (RunState.FAILED,),
        pb.TASK_STATE_REJECTED: (RunState.FAILED,),
        pb.TASK_STATE_AUTH_REQUIRED: (),
    }
)
"""The states of the runs whose tasks may be in a state."""

_ENDED = frozenset({RunState.COMPLETED, RunState.CANCELLED, RunState.FAILED})


async def list_tasks(params: pb.ListTasksRequest, client: Client) -> pb.ListTasksResponse:
    """Lists the tasks of the caller. Raises A2AError, RunlaneError.

    Pages come by the end of the tasks if only ended ones are asked for, else by their acceptance;
    within a page the task that changed last is first.
    """
    size = _page_size(params)
    if params.HasField("status_timestamp_after"):
        _after(params)
    try:
        page = await _page(params, client, size)
    except SessionNotFound:
        return pb.ListTasksResponse(page_size=size)
    views = await _views(page.items, client)
    wanted = [view for view in views if _matches(view, params)]
    wanted.sort(key=lambda view: view.changed, reverse=True)
    limit = asyncio.Semaphore(AT_ONCE)

    async def read(view: TaskView) -> pb.Task:
        async with limit:
            return await _task(view, runs[view.task_id], params, client)

    runs = {run.run_id: run for run in page.items}
    tasks = await asyncio.gather(*map(read, wanted))
    return pb.ListTasksResponse(
        tasks=tasks,
        next_page_token=page.next_page_token or "",
        page_size=size,
        total_size=page.total_size or 0,
    )


def _page_size(params: pb.ListTasksRequest) -> int:
    if not params.HasField("page_size"):
        return DEFAULT_PAGE
    if not 1 <= params.page_size <= MAX_PAGE:
        raise refuse(InvalidParamsError, f"must be from 1 to {MAX_PAGE}", field="pageSize")
    return params.page_size


async def _page(params: pb.ListTasksRequest, client: Client, size: int) -> Page[Run]:
    states: tuple[RunState, ...] = ()
    if params.status != pb.TASK_STATE_UNSPECIFIED:
        states = _STATES.get(params.status, ())
        if not states:
            return Page((), "")
    order = RunOrder.LATEST_ACCEPTED
    since = None
    if states and _ENDED.issuperset(states):
        order = RunOrder.LATEST_ENDED
        if params.HasField("status_timestamp_after"):
            since = _after(params)
    pager = client.list_runs(
        params.context_id or None,
        states=states,
        order=order,
        ended_from=since,
        with_total_size=True,
        page_size=size,
    )
    return await pager.page(params.page_token)


async def _views(runs: tuple[Run, ...], client: Client) -> list[TaskView]:
    limit = asyncio.Semaphore(AT_ONCE)

    async def questions(run: Run) -> list[InputRequest]:
        if run.started_at is None or run.run_complete is not None:
            return []
        async with limit:
            return [each async for each in client.list_input_requests(run_id=run.run_id)]

    requests = await asyncio.gather(*map(questions, runs))
    views: list[TaskView] = []
    for run, asked in zip(runs, requests, strict=True):
        view = TaskView.of_run(run)
        if run.run_complete is not None:
            view.end(run.run_complete, ())
        else:
            view.set_state(run, asked)
        views.append(view)
    return views


def _matches(view: TaskView, params: pb.ListTasksRequest) -> bool:
    if params.status not in (pb.TASK_STATE_UNSPECIFIED, view.state):
        return False
    if not params.HasField("status_timestamp_after"):
        return True
    return view.changed >= _after(params)


def _after(params: pb.ListTasksRequest) -> datetime:
    """Raises A2AError."""
    try:
        return params.status_timestamp_after.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise refuse(InvalidParamsError, "is no valid time", field="statusTimestampAfter") from None


async def _task(view: TaskView, run: Run, params: pb.ListTasksRequest, client: Client) -> pb.Task:
    if params.include_artifacts and run.run_complete is not None:
        pager = client.list_messages(run.session_id, run_id=run.run_id)
        view = TaskView.of_run(run)
        view.end(run.run_complete, [message async for message in pager])
    history = []
    if params.history_length > 0:
        view.asked = True  # perhaps
        history = await history_of(client, view, params.history_length)
    return view.task(history)
