"""Faulty servers for workers; each case about workers finds at least one of them."""

from __future__ import annotations

from proofs.conformance.fault import Edit, Fault

EXECUTOR, OUTBOX = "engine/executor.py", "engine/outbox.py"
EXECUTION, SLOT = "agents/worker/execution.py", "agents/worker/slot.py"
WORKERS = "agents/worker/workers.py"
RPC, MESSAGES = "rpc/worker.py", "rpc/worker_messages.py"
EVENTS = "rpc/worker_events.py"

WORKER_FAULTS = (
    Fault(
        "an offer for an agent that does not exist",
        (31,),
        (Edit(WORKERS, "            if agent not in self._agents:\n", "            if False:\n"),),
        case="An offer for an agent that workers do not execute",
    ),
    Fault(
        "a run that starts before a worker offers",
        (32,),
        (
            Edit(
                "engine/agent_room.py",
                "        self._offered[agent] = 0\n",
                "        self._offered[agent] = 9\n",
            ),
            Edit(
                "engine/agent_room.py",
                "        return self._sources[agent].offers_to(agent, tenant)\n",
                "        return True\n",
            ),
        ),
        case="A run waits for a worker",
    ),
    Fault(
        "a token that is not compared",
        (33,),
        (
            Edit(
                EXECUTOR,
                "if fence is not None and not compare_digest(token.encode(), fence.encode()):",
                "if False:",
            ),
            Edit(
                WORKERS,
                "        if not compare_digest(execution.turn.fence, wanted.fence):\n",
                "        if False:\n",
            ),
        ),
        case="A worker without the token",
    ),
    Fault(
        "a worker with two connections",
        (33,),
        (
            Edit(
                EXECUTION,
                "        if before is not None and before is not slot:\n",
                "        if False:\n",
            ),
        ),
        case="A worker that comes back on another connection",
    ),
    Fault(
        "a token that is the same for every attempt",
        (33,),
        (
            Edit(
                "engine/worker_turn.py", "run.run_id, run.attempt, run.started_at))", "run.run_id))"
            ),
            Edit(WORKERS, " or execution.turn.attempt != wanted.attempt:", ":"),
            Edit(
                EXECUTOR, "lost.run_id, lost.attempt, host=", "lost.run_id, active.attempt, host="
            ),
        ),
        case="The worker of a lost attempt is fenced",
    ),
    Fault(
        "a worker that never learns that its turn was taken away",
        (33, 37),
        (Edit(EXECUTION, "            slot.fence(self._why_ended)\n", "            pass\n"),),
        case="A worker that does not stop after a cancel",
    ),
    Fault(
        "an acknowledgement before the event is durable",
        (34,),
        (
            Edit(
                OUTBOX,
                "        while not await self._is_appended(batch):\n",
                "        await asyncio.sleep(0.5)\n"
                "        while not await self._is_appended(batch):\n",
            ),
            Edit(
                EXECUTION,
                "            self.received += 1\n",
                "            self.received += 1\n        self._send(Acked(self.received))\n",
            ),
        ),
        durable=True,
        case="Acknowledged events are in the store",
    ),
    Fault(
        "a repeated event that is stored again",
        (34,),
        (Edit(EXECUTION, "in events[self.received + 1 - number :]:", "in events:"),),
        case="An event that is repeated is stored once",
    ),
    Fault(
        "a gap in the numbers that goes unnoticed",
        (34,),
        (Edit(EXECUTION, "        if number > self.received + 1:\n", "        if False:\n"),),
        case="Wrong output ends the stream",
    ),
    Fault(
        "a text without a limit",
        (34,),
        (
            Edit(
                EVENTS,
                "    elif len(text) > MAX_DELTA_CHARS:\n",
                "    elif False:\n",
            ),
        ),
        case="Wrong output ends the stream",
    ),
    Fault(
        "output after the end of a turn that is ignored forever",
        (34,),
        (Edit(SLOT, "worker_id\n        self._discards = False\n", "worker_id\n"),),
        case="Output that a worker sends after the end",
    ),
    Fault(
        "an end without a turn",
        (34,),
        (
            Edit(
                SLOT,
                '            raise InvalidArgument.of(field, "came without a turn")\n',
                "            return None\n",
            ),
        ),
        case="Output and ends without a turn",
    ),
    Fault(
        "any version of the protocol",
        (34,),
        (
            Edit(
                MESSAGES, "    if offer.protocol_version != PROTOCOL_VERSION:\n", "    if False:\n"
            ),
        ),
        case="A worker of another version",
    ),
    Fault(
        "a lost connection that loses the attempt at once",
        (35,),
        (
            Edit(
                EXECUTION,
                "            if self._has_begun:\n                self.wait_for_worker()\n",
                "            if self._has_begun:\n                self.lose(self._why_lost)\n",
            ),
        ),
        case="A worker that comes back within its lease",
    ),
    Fault(
        "a lease without an end",
        (35,),
        (
            Edit(
                EXECUTION,
                "self._start_timer(AttemptLost(self._why_lost))",
                "pass",
            ),
        ),
        case="A run whose last attempt is lost",
    ),
    Fault(
        "a turn that was lost on its way and waits for its lease",
        (35,),
        (
            Edit(
                EXECUTION,
                "                self._settle(HandedBack(NEVER_BEGUN))\n",
                "                self.wait_for_worker()\n",
            ),
        ),
        case="A turn that is lost on its way",
    ),
    Fault(
        "a restart that counts the runs of workers as lost",
        (36,),
        (
            Edit(
                "engine/recovery.py",
                "        if self._runs.has_workers and await self._runs.adopt(lost):\n",
                "        if False:\n",
            ),
        ),
        durable=True,
        case="After a crash of the server",
    ),
    Fault(
        "a shutdown that ends the runs of workers",
        (36,),
        (
            Edit(
                "engine/runner.py",
                "            if self._end is not None and self._can_leave:\n",
                "            if False:\n",
            ),
        ),
        durable=True,
        case="After a graceful restart of the server",
    ),
    Fault(
        "a worker that learns of no cancel from before its return",
        (36,),
        (Edit(EXECUTION, "        if self._is_stopped:\n            slot.put(Stopped())\n", ""),),
        durable=True,
        case="After a crash a cancel covers the run",
    ),
    Fault(
        "a prompt that joined the turn and is forgotten",
        (36,),
        (Edit(EXECUTION, "list(turn.folded)", "[]"),),
        durable=True,
        case="A prompt that joined the turn",
    ),
    Fault(
        "a cancel that does not reach the worker",
        (37,),
        (Edit(EXECUTION, "        self._send(Stopped())\n", ""),),
        case="A cancel reaches the worker",
    ),
    Fault(
        "a worker that reads nothing and keeps its run",
        (37,),
        (
            Edit(
                "engine/runner.py",
                "            await asyncio.wait(left, timeout=until - loop.time())\n",
                "            await asyncio.wait(left)\n",
            ),
            # Which would take the run away before a person notices.
            Edit(EXECUTION, "self._start_timer(HandedBack(NOT_BEGUN))", "pass"),
        ),
        case="A worker that reads nothing",
    ),
    Fault(
        "a run that is handed back and loses its attempt",
        (37,),
        (
            Edit(
                "core/lane/attempts.py",
                "    if is_unused and is_active and not (content or tail or lane.folded):\n",
                "    if False:\n",
            ),
        ),
        case="A run without output that is handed back",
    ),
    Fault(
        "a run that is handed back with its output and keeps its attempt",
        (37,),
        (
            Edit(
                "core/lane/attempts.py",
                "    if is_unused and is_active and not (content or tail or lane.folded):\n",
                "    if is_unused and is_active:\n",
            ),
            Edit(EXECUTION, "AttemptLost if self.received else HandedBack", "HandedBack"),
        ),
        case="A run with output that is handed back",
    ),
    Fault(
        "an offer that cannot be taken back",
        (37,),
        (Edit(RPC, "                self._workers.withdraw(slot)\n", ""),),
        case="An offer that is taken back",
    ),
)
