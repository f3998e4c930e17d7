"""The rules of a lane: which run of a session is active, which wait, and what commands change.

How to think about this machine
-------------------------------
A session is a conversation, and its prompts run one at a time. The **lane** is everything needed to
keep that promise: the active run, the runs folded into its turn, the waiting runs in order, and the
reservations of accepts that have begun. It is one frozen record of one version. Prompts, messages
and events are not in it; they are in the store.

    reservations --accept--> waiting --dispatch--> active --finish--> (gone)
                                |                    ^
                                +--drain_for_step----+   folded into the active turn

A **command** is a plain function, listed below by the module that decides it. It takes a lane, its
arguments and the time, and either raises and changes nothing or returns a **transition**: the next
lane and everything to be committed with it - changed runs, messages, events - plus the reply to the
caller. The store commits a transition as one transaction, on condition that the lane still has the
version that the command saw. If it has not, the command is simply applied again to the new lane.
That is the only concurrency control, so no race is decided anywhere but here: of a cancel and a
completion the one that is committed first wins, and the other sees its result (R8, R19).

A **trigger** moves one run from state to state, as `TABLE` lists; every pair that is not in the
table is illegal. The table knows nothing about other runs. The commands decide *which* runs a
trigger applies to: a cancel triggers CANCEL for every run it covers, a handoff triggers ADVANCE for
the next run.

A run that waits is ACCEPTED at the head of a lane without an active run, and QUEUED otherwise. That
is a property of its place, so no command sets it: `Edit.done` derives it at the end.

A run whose agent failed, and whose retry policy asks for another attempt, goes back to the head and
waits there until its backoff is over (R38). It is ACCEPTED, as no agent is at work for it and it
holds no slot; but it has begun its turn, so a cancel of the active run covers it, INTERRUPT cancels
it, and a cancel of the waiting runs spares it.

Callers may edit and move a run that waits and has not begun its turn (R46, R47). `rank` alone says
who starts next, and a move changes only that of the moved run, unless the others leave no room. No
rank exceeds `accept_seq`, which nodes of older releases take as the rank of a new run. Folding
keeps the accept order (R26): a run that joins a turn does not start.

A cancelled active run stays in its place as CANCELLING until its agent has returned (R9), so the
lane is busy for that long. A run that ends without having been active still gets its turn in the
transcript (R14).

A run whose agent asks people stays the active run, as INPUT_REQUIRED, and needs no slot (R40). It
is INPUT_REQUIRED also while it has all answers and waits for a slot; `resume` makes it ACTIVE. A
request belongs to the run, not to the attempt: it stays open, and keeps its answer, when an attempt
is lost (R44). The end of the run, or a cancel, withdraws open requests (R42).

The modules of the rules
------------------------
    states      the triggers, and `TABLE`
    edit        a lane while one command changes it: its order, and what is written
    parking     what an attempt leaves behind that does not go on
    asking      `ask`, `answer`, `expire`, `resume`
    ending      `fail_waiting`, `remove`; how a turn ends, and a run that never started
    cancelling  `cancel`
    accepting   `reserve`, `release`, `accept`
    updating    `update`
    starting    `dispatch`, `drain_for_step`
    attempts    `finish`, `node_lost`, `hand_over`, `adopt`

Each module imports only those above it. Other rooms import only this one.

How to add a rule
-----------------
A new state or trigger goes into `RunState` or `Trigger` and into `TABLE`. A new command is a
function that makes an `Edit`, changes it, and returns `edit.done(reply)`. How runs are ordered is
decided by methods of `Edit`, and which runs a command covers by the module of its family. Then
extend the exhaustive search: `tests/proofs/lanecheck` has the commands, their effects written down
a second time, and the invariants. Nothing here may await, read a clock or generate an id.
"""

from __future__ import annotations

from runlane_server.core.lane.accepting import accept, release, reserve
from runlane_server.core.lane.asking import answer, ask, expire, resume
from runlane_server.core.lane.attempts import (
    NODE_LOST,
    SHUT_DOWN,
    adopt,
    finish,
    hand_over,
    node_lost,
)
from runlane_server.core.lane.cancelling import cancel
from runlane_server.core.lane.edit import ATTEMPT_ORDINALS
from runlane_server.core.lane.ending import INPUT_EXPIRED, fail_waiting, remove
from runlane_server.core.lane.starting import dispatch, drain_for_step
from runlane_server.core.lane.states import TABLE, Trigger, advance, next_state
from runlane_server.core.lane.updating import update

__all__ = [
    "ATTEMPT_ORDINALS",
    "INPUT_EXPIRED",
    "NODE_LOST",
    "SHUT_DOWN",
    "TABLE",
    "Trigger",
    "accept",
    "adopt",
    "advance",
    "answer",
    "ask",
    "cancel",
    "dispatch",
    "drain_for_step",
    "expire",
    "fail_waiting",
    "finish",
    "hand_over",
    "next_state",
    "node_lost",
    "release",
    "remove",
    "reserve",
    "resume",
    "update",
]
