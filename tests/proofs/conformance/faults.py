"""Faulty servers: ours with one piece of its source replaced. Conformance has to find each.

The first ones are bugs that servers of this kind have really had.
"""

from __future__ import annotations

from proofs.conformance.fault import Edit, Fault
from proofs.conformance.update_faults import UPDATE_FAULTS
from proofs.conformance.webhook_faults import WEBHOOK_FAULTS
from proofs.conformance.worker_faults import WORKER_FAULTS

COORDINATOR = "engine/coordinator.py"
STATES, EDIT = "core/lane/states.py", "core/lane/edit.py"
ACCEPTING, STARTING = "core/lane/accepting.py", "core/lane/starting.py"
ASKING, CANCELLING = "core/lane/asking.py", "core/lane/cancelling.py"
ATTEMPTS, ENDING = "core/lane/attempts.py", "core/lane/ending.py"
EXECUTOR, FOLDS, LANES = "engine/executor.py", "engine/folds.py", "engine/lanes.py"
READINESS, LANE_ACCESS = "engine/readiness.py", "engine/lane_access.py"
RUNS, INPUTS = "rpc/runs.py", "engine/inputs.py"
SESSIONS = "feed/sessions.py"


_IDLE_FLAG = (
    Edit(
        CANCELLING,
        "    edit = Edit(lane, at)\n    before = {run.run_id: run for run in lane.runs}\n",
        "    edit = Edit(lane, at)\n"
        "    from runlane_server.core.lane.edit import PENDING\n"
        "    if not lane.runs:\n        PENDING.add(lane.key)\n"
        "    before = {run.run_id: run for run in lane.runs}\n",
    ),
    Edit(
        ACCEPTING,
        "    if held.covered:\n        cancel_waiting",
        "    from runlane_server.core.lane.edit import PENDING\n"
        "    if held.covered or lane.key in PENDING:\n        PENDING.discard(lane.key)\n"
        "        cancel_waiting",
    ),
    Edit(EDIT, "", "\n\nPENDING = set()\n"),
)

_FOLD_QUEUE = (
    Edit(
        COORDINATOR,
        "            self.stored.add(accepted.key.tenant, run_weight(request))\n",
        "            self.stored.add(accepted.key.tenant, run_weight(request))\n"
        "            from runlane_server.engine.folds import QUEUES\n"
        "            if request.when_busy.value == 'fold':\n"
        "                QUEUES.setdefault(accepted.key, []).append(run)\n",
    ),
    Edit(
        FOLDS,
        "        self.committing = create_own_task(self._fold_in())\n"
        "        return await asyncio.shield(self.committing)\n",
        "        drained = QUEUES.pop(self._job.key, [])\n"
        "        self.committing = create_own_task(self._fold_in())\n"
        "        await asyncio.shield(self.committing)\n"
        "        return drained\n",
    ),
    Edit(FOLDS, "", "\n\nQUEUES = {}\n"),
)

_READY_BY_REQUEST = (
    Edit(
        READINESS,
        "            self._task = asyncio.create_task(self._get_ready())\n",
        "            pass\n",
    ),
    Edit(
        READINESS,
        "    async def _start_agent(self)",
        "    async def ready_for(self) -> None:\n"
        "        if not getattr(self, 'asked', False):\n"
        "            self.asked = True\n"
        "            await self._get_ready()\n\n"
        "    async def _start_agent(self)",
    ),
    Edit(
        COORDINATOR,
        "            accepted.use()\n",
        "            accepted.use()\n            for each in self._executor._readiness:\n"
        "                await each.ready_for()\n",
    ),
)

_FAILING_WAITS = (
    Edit(
        RUNS,
        "        run = await self._coordinator.wait_run(request.run_id, timeout=timeout, "
        "tenant=tenant())",
        "        run = await _unless_another_fails(self._coordinator.wait_run(request.run_id, "
        "timeout=timeout, tenant=tenant()))",
    ),
    Edit(
        RUNS,
        "",
        """

async def _unless_another_fails(wait):
    import asyncio
    from runlane_server.engine import lane_access
    from runlane_server.core.errors import RunNotFound
    failure = asyncio.get_running_loop().create_future()
    lane_access.WAITS.append(failure)
    waiting = asyncio.ensure_future(wait)
    await asyncio.wait({waiting, failure}, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        raise RunNotFound("a run failed")
    return waiting.result()
""",
    ),
    Edit(
        LANE_ACCESS,
        'the cancel that its agent was stopped for.\n        """\n',
        'the cancel that its agent was stopped for.\n        """\n'
        "        if outcome.error is not None:\n"
        "            for wait in WAITS:\n"
        "                wait.done() or wait.set_result(None)\n",
    ),
    Edit(LANE_ACCESS, "", "\n\nWAITS = []\n"),
)

HISTORICAL = (
    Fault(
        "a pending cancel that covers only the first of two accepted runs",
        (10,),
        (
            Edit(
                CANCELLING,
                "        cancel_waiting(edit, lane.queue, reason)",
                "        cancel_waiting(edit, lane.queue[:1], reason)",
            ),
        ),
    ),
    Fault("a pending cancel that catches a later run", (12,), _IDLE_FLAG),
    Fault(
        "no terminal event for a run that is dropped from the queue",
        (21,),
        (
            Edit(
                ENDING,
                '    end_run(edit, run, reason, error, _End(reason, error, message_id, ""))',
                "    if edit.active is not None:\n"
                "        edit.record(run)\n"
                "        return\n"
                '    end_run(edit, run, reason, error, _End(reason, error, message_id, ""))',
            ),
        ),
    ),
    Fault(
        "no terminal event for a run that is cancelled on entry",
        (21,),
        (
            Edit(
                ENDING,
                '    end_run(edit, run, reason, error, _End(reason, error, message_id, ""))',
                "    if trigger is Trigger.CANCEL and edit.active is None:\n"
                "        edit.record(run)\n"
                "        return\n"
                '    end_run(edit, run, reason, error, _End(reason, error, message_id, ""))',
            ),
        ),
    ),
    Fault(
        "no terminal event for a run that failed before it started",
        (30,),
        (
            Edit(
                ENDING,
                '    end_run(edit, run, reason, error, _End(reason, error, message_id, ""))',
                "    if trigger is Trigger.FAIL:\n"
                "        edit.record(run)\n"
                "        return\n"
                '    end_run(edit, run, reason, error, _End(reason, error, message_id, ""))',
            ),
        ),
    ),
    Fault("the error of one run fails the wait for another", (24,), _FAILING_WAITS),
    Fault(
        "the clean-up of a run that ends takes the cancel handle of the next one",
        (8,),
        (
            Edit(
                EXECUTOR,
                "        if self._runners.get(runner.job.key) is runner:\n"
                "            del self._runners[runner.job.key]\n",
                "        if self._runners.pop(runner.job.key, None):\n",
            ),
        ),
    ),
    Fault(
        "a burst on an idle session starts two runs",
        (7, 29),
        (
            Edit(
                "core/transition.py",
                "        return self.active is None and bool(self.waiting)",
                "        return bool(self.waiting)",
            ),
        ),
    ),
    Fault("readiness that is bound to the request of the first caller", (30,), _READY_BY_REQUEST),
    Fault("a queue that is drained outside the lane", (26,), _FOLD_QUEUE),
)

OTHERS = (
    Fault(
        "an answer before the commit",
        (1,),
        (
            Edit(
                LANES,
                "            decision = self._decide(lane, batch, mailbox)\n"
                "            if newly_cancelled(",
                "            decision = self._decide(lane, batch, mailbox)\n"
                "            decision.settle()\n"
                "            await asyncio.sleep(1)\n"
                "            if newly_cancelled(",
            ),
        ),
        durable=True,
        sound=(),
    ),
    Fault(
        "an accept that waits for the agent",
        (1,),
        (
            Edit(
                COORDINATOR,
                "            accepted.use()\n",
                "            accepted.use()\n"
                "            tenant = accepted.key.tenant\n"
                "            await self.wait_run(run.run_id, timeout=None, tenant=tenant)\n",
            ),
        ),
    ),
    Fault(
        "a session that is made though nobody asked for it",
        (2, 6),
        (Edit(ACCEPTING, "    if not (lane.exists or allow_missing):", "    if False:"),),
    ),
    Fault(
        "a run id that is taken twice",
        (3,),
        (
            Edit(
                COORDINATOR,
                "        if not same or run.prompt_fingerprint != request.fingerprint:",
                "        if not same:",
            ),
        ),
    ),
    Fault(
        "a run that ends with the call of who accepted it",
        (5,),
        (
            Edit(
                COORDINATOR,
                "            await self._gates.wait_at(",
                "            try:\n"
                "                await asyncio.sleep(0)\n"
                "                await self._gates.wait_at(Point.ACCEPT_COMMITTED, "
                "accepted.session_id, run.run_id)\n"
                "            except asyncio.CancelledError:\n"
                "                await self.cancel(accepted.session_id, run_id=run.run_id)\n"
                "                raise\n"
                "            await self._gates.wait_at(",
            ),
        ),
    ),
    Fault(
        "a session that is idle as soon as its run is cancelled",
        (9,),
        (
            Edit(
                "rpc/convert.py",
                "        busy=record.busy,",
                "        busy=record.busy and record.waiting_runs > 1,",
            ),
        ),
    ),
    Fault(
        "a cancel that covers what is accepted while the agent has not returned",
        (11,),
        (
            Edit(
                ACCEPTING,
                "    if held.covered:\n",
                "    if held.covered or (lane.active and lane.active.cancel_reason is not None and "
                "lane.active.state is RunState.CANCELLING):\n",
            ),
        ),
    ),
    Fault(
        "a second cancel that counts again",
        (13,),
        (
            Edit(
                CANCELLING,
                "    if active.state is RunState.CANCELLING:\n        return\n",
                "    if active.state is RunState.CANCELLING:\n"
                "        edit.covered.append(active.run_id)\n"
                "        return\n",
            ),
        ),
    ),
    Fault(
        "a cancel on entry that writes no turn",
        (14,),
        (
            Edit(
                ENDING,
                '    message_id = edit.write(run, close((), reason), "", attempt=run.attempt + 1)',
                '    message_id = ""',
            ),
        ),
    ),
    Fault(
        "a prompt that is written again where nothing was said",
        (15,),
        (
            Edit(
                ENDING,
                "    trigger = Trigger.COMPLETE if outcome.error is None else Trigger.FAIL\n",
                "    trigger = Trigger.COMPLETE if outcome.error is None else Trigger.FAIL\n"
                "    if not outcome.content:\n"
                "        edit.open_turn(active)\n"
                "        edit.messages[-1] = edit.messages[-1]._replace("
                "message_id=active.run_id + '-again')\n",
            ),
        ),
    ),
    Fault(
        "a cancel that drops what was said",
        (16,),
        (
            Edit(
                ENDING,
                "    content = close(outcome.content, reason)\n",
                "    content = close(() if cancelled else outcome.content, reason)\n",
            ),
        ),
    ),
    Fault(
        "a cancel of the waiting runs that takes the active one with it",
        (18,),
        (
            Edit(
                CANCELLING,
                "    if scope in {CancelScope.SESSION, CancelScope.ACTIVE}:",
                "    if scope is not CancelScope.RUN:",
            ),
        ),
    ),
    Fault(
        "a completion that wins against a cancel that was answered",
        (19,),
        (
            Edit(
                STATES,
                "        (_S.CANCELLING, _H.COMPLETE): _S.CANCELLED,",
                "        (_S.CANCELLING, _H.COMPLETE): _S.COMPLETED,",
            ),
        ),
    ),
    Fault(
        "a receipt without a fence",
        (20,),
        (
            Edit(
                CANCELLING,
                "Receipt(lane.key.session_id, tuple(covered), lane.accept_seq)",
                "Receipt(lane.key.session_id, tuple(covered), 0)",
            ),
        ),
        sound=(2,),
    ),
    Fault(
        "an end without what it cost",
        (23,),
        (
            Edit(
                ENDING,
                "        usage=usage,\n        attempt=run.attempt,",
                "        usage=NO_USAGE,\n        attempt=run.attempt,",
            ),
        ),
    ),
    Fault(
        "a subscription that skips the first event behind its cursor",
        (25,),
        (
            Edit(
                RUNS,
                "                return self._cursors.decode(tenant(), request.cursor)",
                "                return self._cursors.decode(tenant(), request.cursor) + 1",
            ),
        ),
    ),
    Fault(
        "a cursor that was compacted away and is skipped silently",
        (25,),
        (
            Edit(
                "feed/feed.py",
                "        if after < self._store.compacted_of(tenant):",
                "        after = max(after, self._store.compacted_of(tenant))\n"
                "        if after < self._store.compacted_of(tenant):",
            ),
        ),
    ),
    Fault(
        "an accept that expects another active run and is accepted",
        (27,),
        (
            Edit(
                ACCEPTING,
                '    if request.expected_active not in {"", lane.active_run_id}:',
                "    if False:",
            ),
        ),
    ),
    Fault(
        "REJECT that is queued",
        (27,),
        (
            Edit(
                ACCEPTING,
                "    if request.when_busy is WhenBusy.REJECT and (behind_another or beaten):",
                "    if False:",
            ),
        ),
    ),
    Fault(
        "a step that a later attempt repeats",
        (39,),
        (
            Edit(
                "engine/step_journal.py",
                "        self._is_loaded = run.events <= FIRST_EVENTS\n",
                "        self._is_loaded = True\n",
            ),
        ),
    ),
    Fault(
        "an unknown agent that is replaced by the default",
        (31,),
        (
            Edit(
                "core/agents.py",
                "            raise AgentNotFound.of(name)",
                "            return self.default",
            ),
        ),
    ),
    Fault(
        "a cancel that misses a run between two attempts",
        (38,),
        (Edit(CANCELLING, "        _cancel_backing_off(edit, reason)\n", ""),),
    ),
    Fault(
        "all runs are executed by the default agent",
        (31,),
        (
            Edit(
                EXECUTOR,
                "agent=self._agents.agent_of(job.run.agent)",
                "agent=self._agents.agent_of('')",
            ),
        ),
    ),
    Fault(
        "an agent that is not compared with that of the first request",
        (31,),
        (Edit("core/model.py", "in (self.agent, self.retry):", "in (self.retry,):"),),
    ),
    Fault(
        "a run folded into the turn of another agent",
        (31,),
        (Edit(STARTING, " and run.agent == host.agent]", "]"),),
    ),
    Fault(
        "a queue that ignores the limit of an agent",
        (32,),
        (
            Edit(
                "engine/slots.py",
                "            for agent, queue in tenant.queues.items()\n"
                "            if self._left(agent, name) > 0\n"
                "        ]",
                "            for agent, queue in tenant.queues.items()\n        ]",
            ),
        ),
    ),
    Fault(
        "an agent without a limit",
        (32,),
        (
            Edit(
                "engine/agent_room.py",
                "limit is None else limit - self._in_use[agent]",
                "True else 0",
            ),
        ),
    ),
    Fault(
        "a cancel of a run that has ended catches the one that is active now",
        (28,),
        (
            Edit(
                CANCELLING,
                "    if edit.active is not None and edit.active.run_id == run_id:",
                "    if edit.active is not None:",
            ),
        ),
    ),
    Fault(
        "a run that asks stays active",
        (40,),
        (Edit(ASKING, "if (asked or park) and run.state is", "if park and run.state is"),),
    ),
    Fault(
        "every answer is accepted",
        (41,),
        (
            Edit(
                INPUTS,
                "    return found, found.answer.answer_id == given.answer_id\n",
                "    return found, True\n",
            ),
        ),
    ),
    Fault(
        "an answer that is not compared with its schema",
        (41,),
        (
            Edit(
                INPUTS,
                "            await check_answer(found.question, given.value_json, tenant)\n",
                "",
            ),
        ),
    ),
    Fault(
        "an answer after the cancel is accepted",
        (42,),
        (
            Edit(
                INPUTS,
                "    if found.state is InputState.WITHDRAWN:\n",
                "    if found.state is InputState.WITHDRAWN:\n        return found, True\n"
                "    if found.state is InputState.WITHDRAWN:\n",
            ),
        ),
    ),
    Fault(
        "requests that never expire",
        (43,),
        (Edit(INPUTS, "more = await self.expire_due() == EXPIRY_STEP", "more = False"),),
    ),
    Fault(
        "an expiry that forgets the default",
        (43,),
        (Edit(ASKING, "    if item.default_json is not None:\n", "    if False:\n"),),
    ),
    Fault(
        "a crash that consumes an attempt of a run whose agent has left",
        (44,),
        (
            Edit(ATTEMPTS, "    if waits and active.asking.parked:\n", "    if False:\n"),
            Edit(
                "engine/recovery.py",
                "if lane.active.state is RunState.INPUT_REQUIRED and lane.active.asking.parked:",
                "if False:",
            ),
            Edit(
                "engine/recovery.py",
                "if session.active and not session.asks]",
                "if session.active]",
            ),
        ),
        durable=True,
    ),
    Fault(
        "an attempt that asks again what was answered",
        (44,),
        (
            Edit(
                "engine/asking.py",
                "self._job.key.tenant)\n        return question\n",
                "self._job.key.tenant)\n        return question._replace(key=str(uuid7()))\n",
            ),
        ),
        durable=True,
    ),
    Fault(
        "the ends of requests are not reported",
        (42, 45),
        (
            Edit(
                ASKING,
                "[_CLOSED[state](input_id) for state, input_id, _ in run.asking.late]",
                "[]",
            ),
        ),
    ),
    Fault(
        "a snapshot whose output has no position",
        (50,),
        (
            Edit(
                SESSIONS,
                "            0 if active is None else active.events,\n",
                "            0,\n",
            ),
        ),
    ),
    Fault(
        "a snapshot without the open questions",
        (50,),
        (Edit(SESSIONS, "for pending in active.asking.pending\n", "for pending in ()\n"),),
        case="A snapshot has the open",
    ),
    Fault(
        "a deletion that a stream does not report",
        (50,),
        (
            Edit(
                SESSIONS,
                "        return Step(SessionChanged(None, None), self.at)\n",
                "        return Step(QueueChanged((), ()), self.at)\n",
            ),
        ),
        case="A stream reports",
    ),
    Fault(
        "a cursor that repeats the last piece of output",
        (51,),
        (Edit("rpc/session_cursor.py", "at.event_index)", "max(0, at.event_index - 1))"),),
    ),
    Fault(
        "a stream that sends the end of a run before its output",
        (52,),
        (
            Edit(
                SESSIONS,
                "            output = await self._output_before(entry)\n",
                "            output: Sequence[Step] = ()\n",
            ),
        ),
    ),
    Fault(
        "a fork that copies the turn at work",
        (48,),
        (
            Edit(
                "core/fork.py",
                "return min(begun) - 1 if begun else lane.turn",
                "return lane.turn",
            ),
        ),
        case="A fork of a busy session",
    ),
    Fault(
        "a fork that refuses its repetition",
        (48,),
        (
            Edit(
                "engine/forking.py",
                "            and self.at_turn in {0, origin.turn}",
                "            and not self.at_turn",
            ),
        ),
        case="A repeated fork",
    ),
    Fault(
        "a list of requests that ignores the states",
        (45,),
        (Edit("rpc/inputs.py", "        states=states,\n", ""),),
    ),
)

FAULTS = (*HISTORICAL, *OTHERS, *WORKER_FAULTS, *UPDATE_FAULTS, *WEBHOOK_FAULTS)
