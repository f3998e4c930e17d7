"""What an agent is given to work on: an attempt of a run, its prompt, and what came before."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from runlane_server.agents.base import AgentError, FoldedPrompt
from runlane_server.core.model import (
    NO_LABELS,
    Message,
    Prompt,
    Role,
    RunKey,
    RunRequest,
    SessionKey,
)
from runlane_server.core.transition import LaneRun
from runlane_server.store.base import MessagePlace, Page, Store
from runlane_server.store.retry import retry_read

HISTORY_PAGE = 500
HISTORY_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """An attempt of a run. `request` is None where it has to be read from the store; `trace` is the
    place in a trace that the agent is given, empty for none."""

    key: SessionKey
    run: LaneRun
    request: RunRequest | None
    trace: str = ""

    @property
    def run_key(self) -> RunKey:
        """The key of the run."""
        return RunKey(self.key.tenant, self.run.run_id)

    @property
    def attempt(self) -> tuple[str, int]:
        """Which attempt it is of which run."""
        return self.run.run_id, self.run.attempt


class AgentTurn:
    """An `agents.base.Turn`. `fold` folds what waits to be folded into the turn."""

    def __init__(
        self, job: Job, store: Store, fold: Callable[[], Awaitable[Sequence[LaneRun]]]
    ) -> None:
        self.session_id = job.key.session_id
        self.run_id = job.run.run_id
        self.attempt = job.run.attempt
        self.prompt = Prompt("")
        self.metadata: Mapping[str, str] = NO_LABELS
        self.traceparent = job.trace
        self._job = job
        self._store = store
        self._fold = fold

    async def load(self) -> None:
        """Reads what is not at hand."""
        request = self._job.request
        if request is not None:
            self.prompt, self.metadata = request.prompt, request.metadata
            return
        run = await retry_read(self._store, lambda: self._store.get_run(self._job.run_key))
        if run is not None:
            self.metadata = run.metadata
        self.prompt = (await self._folded_prompt(self._job.run)).prompt

    async def _folded_prompt(self, run: LaneRun) -> FoldedPrompt:
        """The prompt of a run of this tenant."""
        key = RunKey(self._job.key.tenant, run.run_id)
        prompt = await retry_read(self._store, lambda: self._store.get_prompt(key))
        if prompt is None:
            raise AgentError("its prompt is gone from the store", reason="INTERRUPTED")
        return FoldedPrompt(run.run_id, prompt)

    async def history(self) -> Sequence[Message]:
        """The transcript before this turn."""
        messages: list[Message] = []
        place: MessagePlace | None = None
        while True:
            page = await retry_read(self._store, partial(self._page, place))
            earlier = [item for item in page.items if item.turn < self._job.run.turn]
            messages += earlier
            place = page.next
            if place is None or len(earlier) < len(page.items):
                return _of_ended_turns(messages)

    async def _page(self, after: MessagePlace | None) -> Page[Message, MessagePlace]:
        return await self._store.list_messages(
            self._job.key, after=after, limit=HISTORY_PAGE, max_bytes=HISTORY_BYTES
        )

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts that wait to join this turn."""
        return [await self._folded_prompt(run) for run in await self._fold()]


def _of_ended_turns(messages: Sequence[Message]) -> Sequence[Message]:
    """Leaves out the prompt of a run that waits to be retried: a run that interrupts comes first,
    and its history is not to have a question without an answer."""
    ended = {message.turn for message in messages if message.role is not Role.USER}
    return [message for message in messages if message.turn in ended]
