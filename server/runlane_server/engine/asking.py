"""The questions of one attempt, asked through the lane, and their answers (R40, R41)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import structlog
from uuid_utils import uuid7

from runlane_server.agents.base import AgentError
from runlane_server.agents.questions import (
    Asked,
    check_question,
    check_same,
    question_of,
    value_of,
)
from runlane_server.core.errors import InputLimit, StoreUnavailable
from runlane_server.core.input import (
    MAX_INPUTS,
    MAX_OPEN_INPUTS,
    Answer,
    InputRequest,
    InputState,
    Park,
    Question,
)
from runlane_server.core.lane import INPUT_EXPIRED
from runlane_server.core.limits import RETRY_PAUSE
from runlane_server.core.model import EventBody, RunState
from runlane_server.core.transition import LaneRun
from runlane_server.core.turn import DraftMessage
from runlane_server.engine.agent_code import create_own_task
from runlane_server.engine.agent_turn import Job
from runlane_server.engine.lane_access import LaneAccess
from runlane_server.engine.outbox import Outbox
from runlane_server.store.base import Store
from runlane_server.store.retry import retry_read

log = structlog.get_logger()


class ActiveTimer:
    """Calls `on_over` when an attempt was active for `limit` seconds; None is no limit. Time in
    which it waits for input does not count."""

    def __init__(self, used: float) -> None:
        self._used = used
        self._limit: float | None = None
        self._on_over: Callable[[], None] | None = None
        self._since: float | None = None
        self._handle: asyncio.TimerHandle | None = None

    def begin(self, limit: float | None, on_over: Callable[[], None]) -> None:
        """Starts counting."""
        self._limit, self._on_over = limit, on_over
        self.go_on()

    def go_on(self) -> None:
        """Counts again, if it was paused."""
        if self._since is not None:
            return
        loop = asyncio.get_running_loop()
        self._since = loop.time()
        if self._limit is not None and self._on_over is not None:
            left = max(0.0, self._limit - self._used)
            self._handle = loop.call_later(left, self._on_over)

    def pause(self) -> None:
        """Stops counting."""
        if self._since is not None:
            self._used += asyncio.get_running_loop().time() - self._since
        self._since = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def end(self) -> None:
        """Stops counting permanently, and drops the callback."""
        self.pause()
        self._on_over = None

    @property
    def used(self) -> float:
        """The seconds that were counted."""
        running = self._since is not None
        since = asyncio.get_running_loop().time() - (self._since or 0.0) if running else 0.0
        return self._used + since


class Asking:
    """Asks the questions of an attempt.

    The lane decides when the run waits and when it goes on; `follow` takes over what it decided,
    in the order of the commits.
    """

    def __init__(
        self,
        job: Job,
        store: Store,
        lane: LaneAccess,
        outbox: Outbox,
        *,
        resumable: bool,
        used: float,
    ) -> None:
        self.timer = ActiveTimer(used)
        self.leaving: tuple[Sequence[Question], str] | None = None
        """The questions that the agent leaves with, and its checkpoint."""
        self.is_waiting = False
        """Whether the run waits for input, or for a slot after it."""
        self.posting: asyncio.Task[Any] | None = None
        """The ask that is being committed."""
        self._job = job
        self._store = store
        self._lane = lane
        self._outbox = outbox
        self._resumable = resumable
        self._going_on = asyncio.Event()
        self._going_on.set()
        self._lock = asyncio.Lock()
        self._keys: set[str] = set()
        self._asks = job.run.asking.asks

    def follow(self, run: LaneRun) -> None:
        """Takes over the state of the run that was committed."""
        self._outbox.events = max(self._outbox.events, run.events)
        self.is_waiting = run.state is RunState.INPUT_REQUIRED
        if self.is_waiting:
            self._outbox.pause()
            self.timer.pause()
            self._going_on.clear()
        else:
            self._outbox.go_on()
            self.timer.go_on()
            self._going_on.set()

    async def ask(self, asked: Asked) -> Any:
        """Asks a question, and waits for its answer. Raises AgentError."""
        with self._naming() as named:
            question = await self._question(asked, named)
            async with self._lock:
                found = await self._find_same(question)
                if found is None:
                    self._lane.admit_questions(self._job.key.tenant, 1)
                if found is None or found.state is InputState.OPEN:
                    # Cancelling the agent must not interrupt the commit.
                    self.posting = create_own_task(self._post(question))
                    if not await asyncio.shield(self.posting):
                        # The run is about to end, and its agent about to be cancelled.
                        await asyncio.get_running_loop().create_future()
        while True:
            await self._going_on.wait()
            settled = await self._find_same(question)
            if settled is not None and settled.state is not InputState.OPEN:
                return _value(settled)
            # The run goes on with this request open: it was asked by an earlier attempt only.
            await asyncio.sleep(RETRY_PAUSE)

    async def _question(self, asked: Asked, named: list[str]) -> Question:
        """The question, with its key, which is added to `named` if it is new. Raises AgentError."""
        question = question_of(asked)
        if not asked.key:
            question = self._named(asked, question)
            named.append(question.key)
        await check_question(question, self._job.key.tenant)
        return question

    def _named(self, asked: Asked, question: Question) -> Question:
        """The question with a key of its own, if it is equal to others of this attempt."""
        for repeated in count():
            if repeated:
                question = question_of(asked, repeated=repeated)
            if question.key not in self._keys:
                self._keys.add(question.key)
                return question
        raise AssertionError

    @contextmanager
    def _naming(self) -> Iterator[list[str]]:
        """Takes the keys that a call gives. If the call is refused it frees all of them: the same
        question gets the same key later, as in an attempt that is not refused."""
        named: list[str] = []
        try:
            yield named
        except AgentError:
            self._keys.difference_update(named)
            raise

    async def begin_to_leave(self, questions: Sequence[Asked], checkpoint: str) -> bool:
        """Asks when the agent returns; returns whether anything is not answered yet (R44).

        An agent that leaves without a checkpoint starts again, as another attempt.
        """
        made: dict[str, Question] = {}
        with self._naming() as named:
            for asked in questions:
                question = await self._question(asked, named)
                check_same(made.setdefault(question.key, question), question)
            found = [await self._find_same(question) for question in made.values()]
            self._lane.admit_questions(self._job.key.tenant, found.count(None))
        left = [
            question
            for question, known in zip(made.values(), found, strict=True)
            if known is None or known.state is InputState.OPEN
        ]
        self.leaving = (left, checkpoint) if left else None
        return bool(left)

    async def answer_to(self, key: str) -> Any:
        """The answer to a question of this run. Raises AgentError."""
        return _value(await self.settled(key))

    async def settled(self, key: str) -> InputRequest:
        """An answered request of this run. Raises AgentError."""
        found = await self._find(key)
        if found is None:
            raise AgentError(f"nothing was asked with the key {key!r}")
        _check_answered(found)
        return found

    async def leave(
        self, tail: tuple[EventBody, ...], content: Callable[[], tuple[DraftMessage, ...]]
    ) -> bool:
        """Parks the run, whose agent has returned; returns whether that is so. `content` is the
        output of the attempt. Raises AgentError, and IllegalCommand if the attempt is not the
        active one."""
        assert self.leaving is not None  # noqa: S101 - the runner has checked it
        questions, checkpoint = self.leaving
        requests = [self._request(question) for question in questions]
        park = Park(checkpoint, round(self.timer.used * 1e6))
        said = () if checkpoint else content()
        return await self._post_requests(requests, park=park, tail=tail, content=said)

    async def _post(self, question: Question) -> bool:
        """Returns whether the question is asked; if not, the run is about to end."""
        await self._outbox.flush()
        if self._outbox.is_closed:
            return False
        self._outbox.pause()
        try:
            return await self._post_requests([self._request(question)])
        finally:
            if not self.is_waiting:
                self._outbox.go_on()

    async def _post_requests(
        self,
        requests: Sequence[InputRequest],
        *,
        park: Park | None = None,
        tail: tuple[EventBody, ...] = (),
        content: tuple[DraftMessage, ...] = (),
    ) -> bool:
        number = self._asks + 1
        while True:
            try:
                asked = await self._lane.ask(
                    self._job,
                    tuple(requests),
                    self._outbox.events,
                    number=number,
                    resumable=self._resumable,
                    park=park,
                    tail=tail,
                    content=content,
                )
            except InputLimit:
                raise AgentError(
                    f"the run has too many input requests: {MAX_OPEN_INPUTS} may be open,"
                    f" {MAX_INPUTS} may be asked",
                    reason="INPUT_LIMIT",
                ) from None
            except StoreUnavailable:
                if self._store.failed is not None:
                    raise
            else:
                self._asks = number
                return bool(asked)
            # The lane knows the number if the first commit was successful.
            await asyncio.sleep(RETRY_PAUSE)

    def _request(self, question: Question) -> InputRequest:
        """The request for a question; the lane sets its times."""
        return InputRequest(
            str(uuid7()),
            self._job.key.session_id,
            self._job.run.run_id,
            question,
            InputState.OPEN,
            0,
            None,
        )

    async def _find_same(self, question: Question) -> InputRequest | None:
        """The request of this run for a question. Raises AgentError if its key has another one."""
        found = await self._find(question.key)
        if found is not None:
            check_same(found.question, question)
        return found

    async def _find(self, key: str) -> InputRequest | None:
        return await retry_read(self._store, lambda: self._store.find_input(self._job.run_key, key))


def _value(settled: InputRequest) -> Any:
    return value_of(settled.question, _check_answered(settled))


def _check_answered(settled: InputRequest) -> Answer:
    if settled.answer is None:
        raise AgentError("nobody answered an input request in time", reason=INPUT_EXPIRED)
    return settled.answer
