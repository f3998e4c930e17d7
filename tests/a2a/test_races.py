"""Cancels and subscribers that meet the end of a task."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

from a2a.types import a2a_pb2 as pb

from runlane.types import RunComplete
from runlane_server.config import Config
from runlane_server.core.limits import Limits as ServerLimits
from runlane_server.testing import LocalServer
from runlane_web.gateway import Limits
from support.a2a_door import A2A, TRANSPORTS, Failed, a2a_door, script

RACES = int(os.environ.get("RUNLANE_A2A_RACES", "60"))
"""Number of tasks; `make a2a-races` sends 1,000."""

SECONDS = 20 + RACES / 5

LIMITS = Limits(streams=5000, streams_per_caller=5000)
ENDED = {pb.TASK_STATE_COMPLETED, pb.TASK_STATE_CANCELED, pb.TASK_STATE_FAILED}


async def test_tasks_that_are_sent_and_cancelled_at_once_are_each_canceled_once() -> None:
    """Some cancels come before their run is active, some after; all wait for their agent."""
    config = Config(limits=ServerLimits(max_active_runs=RACES // 2))
    async with (
        LocalServer("scripted", config=config) as server,
        a2a_door(server.address, limits=LIMITS) as a2a,
    ):

        async def race(n: int) -> pb.Task:
            transport = TRANSPORTS[n % 3]
            request = script({"text": "x"}, {"wait": "never"}, context_id=f"c{n % (RACES // 4)}")
            request.configuration.return_immediately = True
            task = await a2a.task(transport, request)
            cancel = pb.CancelTaskRequest(id=task.id)
            cancelled: pb.Task = await a2a.call(transport, "CancelTask", cancel)
            return cancelled

        async with asyncio.timeout(SECONDS):
            tasks = await asyncio.gather(*map(race, range(RACES)))
        assert {task.status.state for task in tasks} == {pb.TASK_STATE_CANCELED}
        assert len({task.id for task in tasks}) == RACES
        async with server.client() as client:
            ends: Counter[str] = Counter()
            for task in tasks:
                async with client.subscribe_run(task.id) as events:
                    async for event in events:
                        ends[task.id] += isinstance(event.body, RunComplete)
    assert ends == {task.id: 1 for task in tasks}


async def test_a_cancel_that_meets_the_end_agrees_with_every_view_of_the_task() -> None:
    async with (
        LocalServer("scripted") as server,
        a2a_door(server.address, limits=LIMITS) as a2a,
    ):

        async def race(n: int) -> None:
            transport = TRANSPORTS[n % 3]
            request = script({"text": "x"}, context_id=f"c{n}")
            stream = a2a.stream(transport, "SendStreamingMessage", request)
            task_id = (await anext(stream)).task.id
            cancelled, *followed = await asyncio.gather(
                _cancel(a2a, transport, task_id), _last(stream), _subscribe(a2a, transport, task_id)
            )
            state = (await a2a.get(task_id)).status.state
            assert state in ENDED
            assert cancelled in (None, state)
            assert {each for each in followed if each is not None} <= {state}

        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*map(race, range(RACES)))


async def _cancel(a2a: A2A, transport: str, task_id: str) -> pb.TaskState | None:
    """The state after a cancel; None if it came too late."""
    try:
        task: pb.Task = await a2a.call(transport, "CancelTask", pb.CancelTaskRequest(id=task_id))
    except Failed as failed:
        if failed.reasons != ["TASK_NOT_CANCELABLE"]:
            raise
        return None
    return task.status.state


async def _subscribe(a2a: A2A, transport: str, task_id: str) -> pb.TaskState | None:
    request = pb.SubscribeToTaskRequest(id=task_id)
    try:
        return await _last(a2a.stream(transport, "SubscribeToTask", request))
    except Failed as failed:
        if failed.reasons != ["UNSUPPORTED_OPERATION", "TASK_ENDED"]:
            raise
        return None


async def _last(stream: object) -> pb.TaskState | None:
    """The last state in a stream; nothing comes after the end."""
    states: list[pb.TaskState] = []
    async for each in stream:  # type: ignore[attr-defined]
        assert not ENDED & set(states)
        if each.HasField("task"):
            states.append(each.task.status.state)
        elif each.HasField("status_update"):
            states.append(each.status_update.status.state)
    return states[-1] if states else None
