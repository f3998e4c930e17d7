"""The input of an agent: an attempt of a run, its prompt, and the history of the session."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import structlog

from runlane_server.agents.base import AgentError, AgentEvent, FoldedPrompt
from runlane_server.agents.questions import Asked, check_checkpoint
from runlane_server.core.errors import CorruptRecord
from runlane_server.core.input import InputRequest
from runlane_server.core.model import (
    NO_LABELS,
    Attachment,
    KeptPart,
    Message,
    Origin,
    Part,
    Prompt,
    Reasoning,
    ResultPart,
    Role,
    RunKey,
    RunRequest,
    SessionKey,
    Text,
    TextDelta,
    utf8_size,
)
from runlane_server.core.transition import LaneRun
from runlane_server.engine.output_size import output_size
from runlane_server.engine.step_journal import StepJournal, StoreStep
from runlane_server.store.base import MessagePlace, Page, Store
from runlane_server.store.retry import retry_read

log = structlog.get_logger()

HISTORY_PAGE = 500
HISTORY_BYTES = 8 << 20

MESSAGE_BYTES = 200
"""The size of a message besides its content, so that many empty ones have a limit too."""


@dataclass(slots=True)
class Hold:
    """Whether a supervisor may still commit for its attempt: not once another one has it."""

    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """An attempt of a run. `request` is None if it must be read from the store; `trace` is the
    `traceparent` for the agent, empty for none. `is_resumed`: another process began the attempt."""

    key: SessionKey
    run: LaneRun
    request: RunRequest | None
    trace: str = ""
    is_resumed: bool = False
    hold: Hold = field(default_factory=Hold)

    @property
    def run_key(self) -> RunKey:
        """The key of the run."""
        return RunKey(self.key.tenant, self.run.run_id)

    @property
    def attempt(self) -> tuple[str, int]:
        """The run id and the number of the attempt."""
        return self.run.run_id, self.run.attempt


class Questions(Protocol):
    """The questions of an attempt; see `asking.Asking`."""

    async def ask(self, asked: Asked) -> Any:
        """Asks a question, and waits for its answer."""

    async def begin_to_leave(self, questions: Sequence[Asked], checkpoint: str) -> bool:
        """Asks when the agent returns; returns whether anything is not answered yet."""

    async def answer_to(self, key: str) -> Any:
        """The answer to a question of this run."""

    async def settled(self, key: str) -> InputRequest:
        """An answered question of this run."""


class AgentTurn:
    """Implements `agents.base.Turn`.

    `fold` folds the waiting FOLD runs into the turn, `accept` takes an event of the agent, and
    `store_step` makes the result of a step durable.
    """

    def __init__(
        self,
        job: Job,
        store: Store,
        *,
        fold: Callable[[], Awaitable[Sequence[LaneRun]]],
        accept: Callable[[AgentEvent], Awaitable[None]],
        store_step: StoreStep,
        asking: Questions,
        max_history: int,
    ) -> None:
        self.tenant = job.key.tenant
        self.session_id = job.key.session_id
        self.run_id = job.run.run_id
        self.attempt = job.run.attempt
        self.prompt = Prompt("")
        self.metadata: Mapping[str, str] = NO_LABELS
        self.traceparent = job.trace
        self.origin: Origin | None = None
        self._job = job
        self._store = store
        self._fold = fold
        self._accept = accept
        self._asking = asking
        self.checkpoint = job.run.asking.checkpoint
        self._max_history = max_history
        self._journal = StepJournal(store, job.run_key, job.run, store_step)

    async def load(self) -> None:
        """Loads the prompt and the metadata, from the store if necessary, and the origin."""
        if self._job.run.turn > 1:  # a fork has turns before its own
            session = await retry_read(self._store, lambda: self._store.get_session(self._job.key))
            self.origin = None if session is None else session.origin
        request = self._job.request
        if request is not None:
            self.prompt, self.metadata = request.prompt, request.metadata
            return
        run = await retry_read(self._store, lambda: self._store.get_run(self._job.run_key))
        if run is not None:
            self.metadata = run.metadata
        self.prompt = (await self.prompt_of(self._job.run.run_id)).prompt

    async def prompt_of(self, run_id: str) -> FoldedPrompt:
        """Reads the prompt of a run of this tenant."""
        key = RunKey(self._job.key.tenant, run_id)
        try:
            prompt = await retry_read(self._store, lambda: self._store.get_prompt(key))
        except CorruptRecord as error:
            raise AgentError(error.message, reason=error.reason) from error
        if prompt is None:
            raise AgentError("the prompt is missing from the store", reason="INTERRUPTED")
        return FoldedPrompt(run_id, prompt)

    async def history(self) -> Sequence[Message]:
        """Reads the transcript before this turn: the latest turns within `--max-history`."""
        latest = LatestTurns(self._max_history)
        place: MessagePlace | None = None
        while True:
            page = await retry_read(self._store, partial(self._page, place))
            earlier = [item for item in page.items if item.turn < self._job.run.turn]
            for message in earlier:
                latest.add(message)
            place = page.next
            if place is None or len(earlier) < len(page.items):
                if latest.omitted:
                    log.info("history cut to --max-history", omitted_turns=latest.omitted)
                return _answered_turns(latest.messages())

    async def _page(self, after: MessagePlace | None) -> Page[Message, MessagePlace]:
        return await self._store.list_messages(
            self._job.key, after=after, limit=HISTORY_PAGE, max_bytes=HISTORY_BYTES
        )

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts of the runs that join this turn now."""
        return [await self.prompt_of(run.run_id) for run in await self._fold()]

    async def step(self, key: str, work: Callable[[], Any]) -> Any:
        """Does the work of a step unless its result is stored; returns the result."""
        return await self._journal.step(key, work)

    async def find_step(self, key: str) -> str | None:
        """The stored result of a step."""
        return await self._journal.find_step(key)

    async def keep_step(self, key: str, result: object) -> str:
        """Makes the result of a step durable."""
        return await self._journal.keep_step(key, result)

    async def emit(self, event: AgentEvent | str) -> None:
        """Adds an event to the output."""
        await self._accept(TextDelta(event) if isinstance(event, str) else event)

    async def ask(
        self,
        text: str,
        *,
        key: str = "",
        tool_name: str = "",
        arguments: Mapping[str, Any] | None = None,
        choices: Sequence[str] = (),
        schema: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        default: Any = None,
    ) -> Any:
        """Asks people, and waits for the answer."""
        asked = Asked(text, key, tool_name, arguments, choices, schema, timeout, default)
        return await self._asking.ask(asked)

    async def ask_and_leave(self, questions: Sequence[Asked], checkpoint: str) -> bool:
        """Asks people, and ends this call of the agent; False if all is answered already."""
        check_checkpoint(questions, checkpoint)
        return await self._asking.begin_to_leave(questions, checkpoint)

    async def answer_to(self, key: str) -> Any:
        """The answer to a question that the agent has left with."""
        return await self._asking.answer_to(key)


class LatestTurns:
    """The latest turns of a transcript that together have at most `max_bytes`, at least one.

    Only whole turns are left out: the calls and results within a turn belong together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.omitted = 0
        self._max_bytes = max_bytes
        self._turns: deque[list[Message]] = deque()
        self._sizes: deque[int] = deque()
        self._bytes = 0

    def add(self, message: Message) -> None:
        """Adds the next message."""
        if not self._turns or self._turns[-1][0].turn != message.turn:
            self._turns.append([])
            self._sizes.append(0)
        size = MESSAGE_BYTES + sum(_part_size(part) for part in message.parts)
        self._turns[-1].append(message)
        self._sizes[-1] += size
        self._bytes += size
        while self._bytes > self._max_bytes and len(self._turns) > 1:
            self._turns.popleft()
            self._bytes -= self._sizes.popleft()
            self.omitted += 1

    def messages(self) -> Sequence[Message]:
        """The messages, the oldest first."""
        return [message for turn in self._turns for message in turn]


def _part_size(part: Part) -> int:
    match part:
        case Text(text) | Reasoning(text) | ResultPart(text):
            return utf8_size(text)
        case Attachment() | KeptPart():
            return part.size
        case _:
            return output_size(part)


def _answered_turns(messages: Sequence[Message]) -> Sequence[Message]:
    """Leaves out the prompt of a run that waits for its retry: an interrupting run goes before it,
    and its history must not contain a question without an answer."""
    answered = {message.turn for message in messages if message.role is not Role.USER}
    return [message for message in messages if message.turn in answered]
