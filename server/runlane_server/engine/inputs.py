"""Takes the answers of people, and lets requests expire that nobody answers (R41, R43)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from uuid_utils import uuid7

from runlane_server.agents.questions import check_answer
from runlane_server.core import lane as rules
from runlane_server.core.agents import AgentNames
from runlane_server.core.errors import AnswerInvalid, InputClosed, InputNotFound, RunlaneError
from runlane_server.core.input import Answer, InputKind, InputRequest, InputState
from runlane_server.core.limits import RETRY_PAUSE
from runlane_server.core.model import Micros, RunKey, SessionKey
from runlane_server.engine.lanes import LaneContended, Lanes
from runlane_server.store.base import DueInput, Store

log = structlog.get_logger()

EXPIRY_SECONDS = 1.0
"""Seconds between two looks for requests that have expired."""

EXPIRY_STEP = 200
"""Requests that expire in one step."""


class Inputs:
    """The input requests of a store."""

    def __init__(
        self, lanes: Lanes, store: Store, agents: AgentNames, now: Callable[[], Micros]
    ) -> None:
        self._lanes = lanes
        self._store = store
        self._agents = agents
        self._now = now

    async def answer(
        self,
        tenant: str,
        input_request_id: str,
        given: Answer,
        *,
        kind: InputKind | None = None,
        allowed_agents: frozenset[str] | None = None,
    ) -> tuple[InputRequest, bool]:
        """Answers a request; returns it, and whether this answer is the one that counts (R41).

        `kind` is that of the question which the answer is for. An answer without an id gets one.
        `allowed_agents` are those that the caller may use; None: all. Raises InputNotFound,
        PermissionDenied, InputClosed and AnswerInvalid.
        """
        given = given._replace(answer_id=given.answer_id or str(uuid7()), at=self._now())
        while True:
            found = await self._get(tenant, input_request_id)
            if allowed_agents is not None:
                await self._check_agent(RunKey(tenant, found.run_id), allowed_agents)
            if found.state is not InputState.OPEN:
                return _settled(found, given)
            if given.digest and given.digest != found.question.digest:
                raise AnswerInvalid.of(
                    "question_digest", "is not that of the question; show the question again"
                )
            if kind not in {None, found.question.kind}:
                problem = f"is for a question of kind {kind}; this one is {found.question.kind}"
                raise AnswerInvalid.of("answer", problem)
            await check_answer(found.question, given.value_json, tenant)
            if await self._post(tenant, found, given):
                log.info("input answered", run_id=found.run_id, answered_by=given.by)
                return await self._get(tenant, input_request_id), True
            # Another answer, or the end of the run, came first; the store knows it in a moment.
            await asyncio.sleep(0)

    async def _check_agent(self, key: RunKey, allowed: frozenset[str]) -> None:
        """A caller that may not use the agent of a run may not decide what it does."""
        run = await self._store.get_run(key)
        if run is not None:
            names = self._agents.limited_to(allowed)
            names.choose(names.full_name(run.agent))

    async def _post(self, tenant: str, found: InputRequest, given: Answer) -> bool:
        run_id, name = found.run_id, found.input_request_id
        try:
            await self._lanes.post(
                SessionKey(tenant, found.session_id),
                lambda lane, at: rules.answer(lane, run_id, name, given, at=at),
            )
        except InputClosed:
            return False
        return True

    async def _get(self, tenant: str, input_request_id: str) -> InputRequest:
        found = await self._store.get_input(tenant, input_request_id)
        if found is None:
            raise InputNotFound.of(input_request_id)
        return found

    async def expire_due(self) -> int:
        """Lets requests expire whose time is over; returns their number."""
        due = await self._store.due_inputs(self._now(), EXPIRY_STEP)
        if due:
            await asyncio.gather(*map(self._expire, due))
        return len(due)

    async def _expire(self, due: DueInput) -> None:
        try:
            if await self._lanes.post(
                due.session,
                lambda lane, at: rules.expire(lane, due.run_id, due.input_request_id, at=at),
            ):
                log.info("input expired", session_id=due.session.session_id, run_id=due.run_id)
        except (RunlaneError, LaneContended) as error:
            log.warning("input not expired", run_id=due.run_id, error=str(error))
        except Exception:
            # The others expire; this one is tried again.
            log.exception("input not expired", run_id=due.run_id)

    async def keep_expiring(self) -> None:
        """Lets requests expire in time, until it is cancelled."""
        while True:
            try:
                more = await self.expire_due() == EXPIRY_STEP
            except RunlaneError as error:
                log.debug("store unavailable", error=error.message)
                more = False
            await asyncio.sleep(RETRY_PAUSE / 20 if more else EXPIRY_SECONDS)


def _settled(found: InputRequest, given: Answer) -> tuple[InputRequest, bool]:
    """The reply to an answer that comes after the end of its request."""
    if found.state is InputState.WITHDRAWN:
        raise InputClosed.of(found.input_request_id, "its run was cancelled or has ended")
    if found.answer is None:
        raise InputClosed.of(found.input_request_id, "it has expired")
    return found, found.answer.answer_id == given.answer_id
