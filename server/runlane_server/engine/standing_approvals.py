"""Answers approvals that the operator has granted in advance.

A granted question is asked like any other, durably and for all to see, and answered a moment later
by the same command as the answer of a person. If the node is lost in between, or the store does not
confirm the answer, the question stays open for people.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

import structlog
from uuid_utils import uuid7

from runlane_server.access.grants import Grant, GrantBook
from runlane_server.core import lane as rules
from runlane_server.core.agents import AgentNames
from runlane_server.core.errors import InputClosed, RunlaneError
from runlane_server.core.input import Answer, InputKind, InputRequest
from runlane_server.core.model import Micros
from runlane_server.engine.agent_code import create_own_task
from runlane_server.engine.agent_turn import Job
from runlane_server.engine.lanes import LaneContended, Lanes

log = structlog.get_logger()


class StandingApprovals:
    """Applies the grants of a node to what its agents ask."""

    def __init__(
        self, grants: GrantBook, lanes: Lanes, agents: AgentNames, now: Callable[[], Micros]
    ) -> None:
        self._grants = grants
        self._lanes = lanes
        self._agents = agents
        self._now = now
        self._answering: set[asyncio.Task[None]] = set()

    def answer_soon(self, job: Job, requests: Sequence[InputRequest], names: Sequence[str]) -> None:
        """Begins to answer the requests that were just asked under these ids, where granted."""
        if not self._grants:
            return
        for request, name in zip(requests, names, strict=False):
            # Under the id of an earlier request the lane has another question, with the same key.
            is_new = name == request.input_request_id
            if is_new and (grant := self._grant_for(job, request)) is not None:
                task = create_own_task(self._answer(job, request, grant))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)

    def _grant_for(self, job: Job, request: InputRequest) -> Grant | None:
        question = request.question
        if question.kind is not InputKind.APPROVAL:
            return None
        return self._grants.find(
            job.key.tenant,
            self._agents.full_name(job.run.agent),
            question.tool_name,
            question.arguments_json,
            now=self._now() / 1e6,
        )

    async def _answer(self, job: Job, request: InputRequest, grant: Grant) -> None:
        run_id, name = job.run.run_id, request.input_request_id
        given = Answer(
            answer_id=str(uuid7()),
            value_json=json.dumps({"approved": True, "reason": grant.reason}),
            by=grant.set_by,
            how="grant",
            peer="",
            digest=request.question.digest,
            at=self._now(),
        )
        try:
            await self._lanes.post(
                job.key, lambda lane, at: rules.answer(lane, run_id, name, given, at=at)
            )
        except InputClosed:
            return  # a person was faster, or the run has ended
        except (RunlaneError, LaneContended) as error:
            log.warning("granted question left to people", grant=grant.name, error=str(error))
            return
        log.info("input answered", run_id=run_id, answered_by=grant.set_by, grant=grant.name)
