"""The operations of A2A over the client: a context is a session, a task is a run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

from a2a.server.context import ServerCallContext
from a2a.server.request_handlers.request_handler import RequestHandler
from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import (
    InvalidParamsError,
    TaskNotCancelableError,
    UnsupportedOperationError,
)
from a2a.utils.proto_utils import validate_proto_required_fields
from google.protobuf.message import Message

from runlane.client import Client
from runlane.errors import RunNotFound
from runlane.ids import new_id
from runlane.inputs import InputAnswered, InputRequest, InputState
from runlane.run_events import RunEvents
from runlane.types import Run, RunEvent, RunState
from runlane_a2a.card import extended_card
from runlane_a2a.errors import refuse
from runlane_a2a.history import history_of
from runlane_a2a.incoming import NewTask, check_message, read_new_task
from runlane_a2a.parts import read_parts
from runlane_a2a.push import (
    comes_with,
    create_config,
    delete_config,
    get_config,
    list_configs,
    pushed,
)
from runlane_a2a.questions import answer_id, as_seen, find_request, is_repeated, read_answer
from runlane_a2a.settings import Caller, Settings, caller_of
from runlane_a2a.task_list import list_tasks
from runlane_a2a.task_view import TaskView, Update
from runlane_web.errors import Refused

Event: TypeAlias = pb.Message | pb.Task | Update

CANCEL_SECONDS = 20.0
"""Seconds that CancelTask waits for the agent to return; the task is cancelled in any case."""

SNAPSHOT_SECONDS = 10.0
"""Seconds to read the events of a live task up to now."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """A run that a message started or continued.

    Attributes:
        run: The run.
        answered: The question that the message answered; empty: it started the run.
    """

    run: Run
    answered: str = ""


class Handler(RequestHandler):
    """The operations.

    Args:
        settings: The settings.
        card: The public card.
    """

    def __init__(
        self,
        settings: Settings,
        card: pb.AgentCard,
    ) -> None:
        self._settings = settings
        self._card = card

    # --- Messages --------------------------------------------------------------------------------

    async def on_message_send(
        self, params: pb.SendMessageRequest, context: ServerCallContext
    ) -> pb.Task | pb.Message:
        """Starts a task, or answers its question; waits until it ends or asks people."""
        caller, configuration = caller_of(context), params.configuration
        length = _history_length(configuration)
        if not configuration.return_immediately:
            await caller.take_place()
        sent = await self._send(params, caller)
        if configuration.return_immediately:
            return await self._read(sent.run.run_id, caller, length)
        view = TaskView.of_run(sent.run)
        async with caller.streams.subscribe_run(sent.run.run_id) as events:
            await _skip_to_answer(view, events, sent.answered)
            async with aclosing(_follow(view, events, caller.calls)) as updates:
                async for _ in updates:
                    pass
        if view.replies and view.state == pb.TASK_STATE_COMPLETED:
            return view.message()
        return view.task(await history_of(caller.calls, view, length))

    async def on_message_send_stream(
        self, params: pb.SendMessageRequest, context: ServerCallContext
    ) -> AsyncGenerator[Event, None]:
        """The same, with everything that happens meanwhile; the task comes first."""
        caller = caller_of(context)
        await caller.take_place()
        sent = await self._send(params, caller)
        view = TaskView.of_run(sent.run)
        async with caller.streams.subscribe_run(sent.run.run_id) as events:
            await _skip_to_answer(view, events, sent.answered)
            length = _history_length(params.configuration)
            yield view.task(await history_of(caller.calls, view, length))
            view.forget_output()
            async with aclosing(_follow(view, events, caller.calls)) as updates:
                async for update in updates:
                    yield update

    # --- Tasks -----------------------------------------------------------------------------------

    async def on_get_task(
        self, params: pb.GetTaskRequest, context: ServerCallContext
    ) -> pb.Task | None:
        """Returns a task."""
        _check(params)
        return await self._read(params.id, caller_of(context), _history_length(params))

    async def on_list_tasks(
        self, params: pb.ListTasksRequest, context: ServerCallContext
    ) -> pb.ListTasksResponse:
        """Lists tasks."""
        _check(params)
        return await list_tasks(params, caller_of(context).calls)

    async def on_cancel_task(
        self, params: pb.CancelTaskRequest, context: ServerCallContext
    ) -> pb.Task | None:
        """Cancels a task; returns it once its agent has returned."""
        _check(params)
        caller = caller_of(context)
        run = await caller.calls.get_run(params.id)
        if not run.state.terminal:
            await caller.calls.cancel(run_id=params.id, reason="A2A CancelTask")
            try:
                await caller.take_place()
            except Refused:  # many streams are open; the task is cancelled without a wait
                return await self._read(params.id, caller, None)
            run = await caller.streams.wait_run(params.id, timeout=CANCEL_SECONDS)
            if run.state in (RunState.CANCELLED, RunState.CANCELLING):
                return await self._read(params.id, caller, None)
        raise refuse(TaskNotCancelableError, f"the task is {run.state.value}", field="id")

    async def on_subscribe_to_task(
        self, params: pb.SubscribeToTaskRequest, context: ServerCallContext
    ) -> AsyncGenerator[Event, None]:
        """Yields the task as it is, and then exactly what happens after that."""
        _check(params)
        caller = caller_of(context)
        await caller.take_place()
        run = await caller.calls.get_run(params.id)
        if run.state.terminal:
            raise refuse(
                UnsupportedOperationError,
                f"the task is {run.state.value}; read it with GetTask",
                field="id",
                reason="TASK_ENDED",
            )
        view = TaskView.of_run(run)
        async with caller.streams.subscribe_run(run.run_id) as events:
            await _skip_to_index(view, events, run.last_event_index)
            yield view.task(await history_of(caller.calls, view, None))
            view.forget_output()
            follow = _follow(view, events, caller.calls, is_asked=view.rests)
            async with aclosing(follow) as updates:
                async for update in updates:
                    yield update

    # --- Push notifications ----------------------------------------------------------------------

    async def on_create_task_push_notification_config(
        self, params: pb.TaskPushNotificationConfig, context: ServerCallContext
    ) -> pb.TaskPushNotificationConfig:
        """Creates a config of a task, or replaces it."""
        calls = await _calls_for(params, context)
        return await create_config(params, calls)

    async def on_get_task_push_notification_config(
        self, params: pb.GetTaskPushNotificationConfigRequest, context: ServerCallContext
    ) -> pb.TaskPushNotificationConfig:
        """Returns a config of a task."""
        calls = await _calls_for(params, context)
        return await get_config(params.task_id, params.id, calls)

    async def on_list_task_push_notification_configs(
        self, params: pb.ListTaskPushNotificationConfigsRequest, context: ServerCallContext
    ) -> pb.ListTaskPushNotificationConfigsResponse:
        """Lists the configs of a task."""
        calls = await _calls_for(params, context)
        return await list_configs(params, calls)

    async def on_delete_task_push_notification_config(
        self, params: pb.DeleteTaskPushNotificationConfigRequest, context: ServerCallContext
    ) -> None:
        """Deletes a config of a task."""
        calls = await _calls_for(params, context)
        await delete_config(params.task_id, params.id, calls)

    # --- The card --------------------------------------------------------------------------------

    async def on_get_extended_agent_card(
        self, params: pb.GetExtendedAgentCardRequest, context: ServerCallContext
    ) -> pb.AgentCard:
        """Returns the card with the agents that the caller may use."""
        _check(params)
        return await extended_card(self._card, caller_of(context).calls)

    # --- How -------------------------------------------------------------------------------------

    async def _send(self, params: pb.SendMessageRequest, caller: Caller) -> _Sent:
        _check(params)
        check_message(params)
        if params.message.task_id:
            return await self._answer(params, caller)
        new = read_new_task(params, self._settings, caller.run_id)
        if new.run_id and comes_with(params) and await _is_task(new.run_id, caller):
            # It may be that of another message, which this one must not change.
            run = await self._accept(new, new.run_id, caller)
            async with pushed(params, run.run_id, caller.calls):
                return _Sent(run)
        run_id = new.run_id or new_id()
        # Before the run is accepted, so that no event of it is missed, and a config that is refused
        # starts nothing.
        async with pushed(params, run_id, caller.calls):
            return _Sent(await self._accept(new, run_id, caller))

    async def _accept(self, new: NewTask, run_id: str, caller: Caller) -> Run:
        handle = await caller.calls.run_accepted(
            new.context_id,
            new.content.text,
            run_id=run_id,
            attachments=new.content.attachments,
            metadata=new.labels,
            allow_missing=True,
            agent=self._settings.agent,
        )
        return handle.run

    async def _answer(self, params: pb.SendMessageRequest, caller: Caller) -> _Sent:
        message = params.message
        run = await caller.calls.get_run(message.task_id)
        if message.context_id not in ("", run.session_id):
            raise refuse(InvalidParamsError, "is not that of the task", field="message.contextId")
        if run.state.terminal:
            raise refuse(
                UnsupportedOperationError,
                f"the task is {run.state.value}; "
                "send the message with its contextId and without a taskId",
                field="message.taskId",
                reason="TASK_ENDED",
            )
        read_parts(message.parts, self._settings.modes)
        request = await self._open_request(message, caller)
        async with pushed(params, run.run_id, caller.calls):
            receipt = await caller.calls.answer_input(
                as_seen(message, request),
                read_answer(message, request),
                answer_id=answer_id(message, request),
            )
            if not receipt.accepted:
                raise refuse(
                    UnsupportedOperationError,
                    "the question was answered before",
                    field="message.taskId",
                    reason="INPUT_ANSWERED",
                )
        return _Sent(run, request.input_request_id)

    async def _open_request(self, message: pb.Message, caller: Caller) -> InputRequest:
        pager = caller.calls.list_input_requests(
            run_id=message.task_id, states=[InputState.OPEN, InputState.ANSWERED]
        )
        requests = [request async for request in pager]
        for request in requests:  # after a lost response
            if is_repeated(message, request):
                return request
        requests = [request for request in requests if request.state is InputState.OPEN]
        if not requests:
            raise refuse(
                UnsupportedOperationError,
                "the task asks nothing; send the message with its contextId and without a taskId",
                field="message.taskId",
                reason="NO_INPUT_REQUIRED",
            )
        return find_request(message, requests)

    async def _read(self, task_id: str, caller: Caller, length: int | None) -> pb.Task:
        run = await caller.calls.get_run(task_id)
        view = TaskView.of_run(run)
        if run.run_complete is not None:
            pager = caller.calls.list_messages(run.session_id, run_id=task_id)
            view.end(run.run_complete, [message async for message in pager])
            view.asked = True  # perhaps
        elif run.last_event_index:
            async with (
                asyncio.timeout(SNAPSHOT_SECONDS),
                caller.streams.subscribe_run(task_id) as events,
            ):
                await _skip_to_index(view, events, run.last_event_index)
        return view.task(await history_of(caller.calls, view, length))


async def _skip_to_index(view: TaskView, events: RunEvents, index: int) -> None:
    """Applies the events up to an index."""
    while events.last_index < index and not view.has_ended:
        view.apply(await anext(events))


async def _skip_to_answer(view: TaskView, events: RunEvents, answered: str) -> None:
    """Applies the events up to an answer, if there is one."""
    seen = not answered
    while not seen and not view.has_ended:
        event = await anext(events)
        view.apply(event)
        seen = _answers(event, answered)


def _answers(event: RunEvent, request_id: str) -> bool:
    match event.body:
        case InputAnswered(found):
            return found == request_id
        case _:
            return False


async def _follow(
    view: TaskView, events: RunEvents, client: Client, *, is_asked: bool = False
) -> AsyncGenerator[Update, None]:
    """Yields what happens until the task ends or asks people.

    Args:
        view: The task.
        events: Its next events.
        client: To look for more questions that were asked at the same time.
        is_asked: The follower knows the open questions; it waits for the next change.
    """
    index = 0
    while not view.has_ended:
        if view.rests and not is_asked and events.last_index >= index:
            index = (await client.get_run(view.task_id)).last_event_index
            if events.last_index >= index:
                return
        for update in view.apply(await anext(events)):
            is_asked = is_asked and not isinstance(update, pb.TaskStatusUpdateEvent)
            yield update


def _history_length(message: pb.SendMessageConfiguration | pb.GetTaskRequest) -> int | None:
    if not message.HasField("history_length"):
        return None
    if message.history_length < 0:
        raise refuse(InvalidParamsError, "must be 0 or more", field="historyLength")
    return message.history_length


def _check(params: Message) -> None:
    """Checks what the transports leave to the operation. Raises A2AError."""
    validate_proto_required_fields(params)
    if getattr(params, "tenant", ""):
        raise refuse(InvalidParamsError, "the token decides it; leave it empty", field="tenant")


async def _is_task(run_id: str, caller: Caller) -> bool:
    try:
        await caller.calls.get_run(run_id)
    except RunNotFound:
        return False
    return True


async def _calls_for(params: Message, context: ServerCallContext) -> Client:
    """The server as the caller sees it, once the task of a request is known to exist."""
    _check(params)
    calls = caller_of(context).calls
    await calls.get_run(params.task_id)  # type: ignore[attr-defined] # of all four requests
    return calls
