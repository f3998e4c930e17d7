"""Updates of waiting runs: what the lane needs to decide them is read here (R46, R47)."""

from __future__ import annotations

from collections.abc import Callable

from runlane_server.access.admission import Admission
from runlane_server.access.stored_bytes import StoredBytes
from runlane_server.core import lane as rules
from runlane_server.core.agents import AgentNames
from runlane_server.core.errors import (
    AlreadyStarted,
    CorruptRecord,
    RunMissing,
    RunNotFound,
)
from runlane_server.core.limits import Limits, prompt_errors
from runlane_server.core.model import Micros, Prompt, Run, RunKey, SessionKey
from runlane_server.core.transition import Lane, LaneRun, Transition
from runlane_server.core.update import RunContent, RunPatch, RunUpdate, is_repeated, patch_errors
from runlane_server.engine.lanes import LaneContended, Lanes
from runlane_server.engine.mailbox import Command
from runlane_server.store.base import Store
from runlane_server.store.corrupt import EXPLANATION, is_corrupt
from runlane_server.store.weight import content_growth

MAX_READS = 100
"""Attempts to update a run that others update at the same time."""


class _Outdated(Exception):
    """The run is not the one that was read."""


class Updates:
    """Updates the waiting runs of a store."""

    def __init__(
        self,
        lanes: Lanes,
        store: Store,
        *,
        limits: Callable[[], Limits],
        agents: Callable[[], AgentNames],
        admission: Admission,
        stored: StoredBytes,
    ) -> None:
        self._lanes = lanes
        self._store = store
        self._limits = limits
        self._agents = agents
        self._admission = admission
        self._stored = stored

    async def read(self, tenant: str, run_id: str) -> tuple[Run, Prompt]:
        """Reads a run with its prompt, both of the same revision, so that a caller can edit it.

        Raises RunMissing, RunNotFound and CorruptRecord.
        """
        if not run_id:
            raise RunMissing.of("run_id", "is missing")
        key = RunKey(tenant, run_id)
        run = await self._get(key)
        for _ in range(MAX_READS):
            prompt = await self._store.get_prompt(key)
            before, run = run, await self._get(key)
            if prompt is not None and run.revision == before.revision:
                return run, prompt
        raise LaneContended(f"gave up after {MAX_READS} concurrent updates of the run")

    async def update(
        self,
        tenant: str,
        run_id: str,
        patch: RunPatch,
        *,
        allowed_agents: frozenset[str] | None = None,
    ) -> Run:
        """Edits and moves a waiting run; returns it once that is durable.

        A repeated patch with the same id returns the run and changes nothing, also after later
        changes and when the run has started.

        `allowed_agents` are those that the caller may use; None: all. Raises PermissionDenied,
        RunMissing, RunNotFound, AlreadyStarted, EditConflict, AnchorNotWaiting, InvalidArgument,
        EmptyPrompt, PromptTooLarge and QuotaExceeded.
        """
        if not run_id:
            raise RunMissing.of("run_id", "is missing")
        for error in patch_errors(run_id, patch):
            raise error
        key = RunKey(tenant, run_id)
        run = await self._get(key)
        self._check_agent(run, allowed_agents)
        refusal = self._admission.edit_refusal(tenant, grows=patch.has_content)
        if refusal is not None and not _is_repeated(run, patch):
            raise refusal
        for _ in range(MAX_READS):
            if patch.update_id and _is_repeated(run, patch):
                return run
            if run.state.is_terminal:
                return await self._ended(tenant, run, patch)
            wanted = await self._decidable(key, run, patch)
            try:
                made = await self._lanes.post(
                    SessionKey(tenant, run.session_id), _update(wanted, run.revision)
                )
            except (_Outdated, AlreadyStarted) as refused:
                if isinstance(refused, AlreadyStarted) and "state" in refused.metadata:
                    raise
                run = await self._get(key)
                continue
            if made.revision > run.revision:
                self._stored.add(tenant, wanted.growth)
            return await self._get(key)
        raise LaneContended(f"gave up after {MAX_READS} concurrent updates of the run")

    def _check_agent(self, run: Run, allowed: frozenset[str] | None) -> None:
        """A caller that may not use the agent of a run may not change what it is asked to do."""
        if allowed is not None:
            names = self._agents()
            names.limited_to(allowed).choose(names.full_name(run.agent))

    async def _get(self, key: RunKey) -> Run:
        run = await self._store.get_run(key)
        if run is None:
            raise RunNotFound.of(key.run_id)
        if is_corrupt(run):
            raise CorruptRecord(f"run {key.run_id!r}: {EXPLANATION}")
        return run

    async def _ended(self, tenant: str, run: Run, patch: RunPatch) -> Run:
        if _is_repeated(run, patch):
            return run
        session = await self._store.get_session(SessionKey(tenant, run.session_id))
        raise AlreadyStarted.of(
            run.run_id,
            state=run.state,
            folded_into=run.folded_into,
            active="" if session is None else session.active_run_id,
        )

    async def _decidable(self, key: RunKey, run: Run, patch: RunPatch) -> RunUpdate:
        """The update that the patch is for this run. Raises EmptyPrompt and PromptTooLarge."""
        update = RunUpdate(
            run.run_id,
            patch.digest,
            run.prompt_excerpt,
            when_busy=patch.when_busy,
            move=patch.move,
            revision=patch.revision,
            update_id=patch.update_id,
        )
        if not patch.has_content:
            return update
        prompt = await self._store.get_prompt(key)
        if prompt is None:
            raise RunNotFound.of(key.run_id)
        before = RunContent(prompt, run.metadata)
        after = patch.applied_to(before)
        if after == before:
            return update
        if after.prompt != prompt:
            for error in prompt_errors(after.prompt, self._limits()):
                raise error
        growth = content_growth(before, after)
        return update._replace(content=after, excerpt=after.prompt.excerpt, growth=growth)


def _is_repeated(run: Run, patch: RunPatch) -> bool:
    """Whether the last update of a run was this one."""
    return is_repeated(patch, run.last_update, run.revision, has_begun=True)


def _update(wanted: RunUpdate, revision: int) -> Command[LaneRun]:
    """The command of an update that was made for the run at a revision."""

    def command(lane: Lane, at: Micros) -> Transition[LaneRun]:
        run = lane.find(wanted.run_id)
        if run is not None and run.revision != revision:
            raise _Outdated
        return rules.update(lane, wanted, at=at)

    return command
