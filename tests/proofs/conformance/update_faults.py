"""Faulty servers that update waiting runs wrongly."""

from __future__ import annotations

from proofs.conformance.fault import Edit, Fault

UPDATING = "core/lane/updating.py"

UPDATE_FAULTS = (
    Fault(
        "an edit is answered and not stored",
        (46,),
        (Edit(UPDATING, "RunEdit(wanted.content, wanted.growth)", "RunEdit()"),),
        case="A waiting run that is edited",
    ),
    Fault(
        "an edited run starts with the prompt that was cached before",
        (46,),
        (Edit("engine/lanes.py", "None if active.revision else request", "request"),),
        case="A waiting run that is edited",
    ),
    Fault(
        "an update of a run that has started is answered as if it had an effect",
        (46,),
        (
            Edit(
                UPDATING,
                "    # A run that waits for its next attempt",
                "    if run is not None and run not in lane.waiting:\n"
                "        return Transition(lane, reply=run)\n"
                "    # A run that waits for its next attempt",
            ),
        ),
        case="A run that has left the queue",
    ),
    Fault(
        "an old revision overwrites a newer one",
        (46,),
        (Edit(UPDATING, "if wanted.revision not in {None, run.revision}:", "if False:"),),
        case="An update of an old revision",
    ),
    Fault(
        "a repeated update is refused once its run has started",
        (46,),
        (
            Edit(UPDATING, "if run is not None and _is_repeated(run, wanted):", "if False:"),
            Edit(
                "engine/updates.py", "if patch.update_id and _is_repeated(run, patch):", "if False:"
            ),
        ),
        case="A repeated update",
    ),
    Fault(
        "a run that is to interrupt only waits at the head",
        (46,),
        (Edit(UPDATING, 'cancel_active(edit, "interrupted by " + run.run_id)', "pass"),),
        case="A waiting run that is to INTERRUPT",
    ),
    Fault(
        "a run that is to fold goes on waiting",
        (46,),
        (Edit(UPDATING, "when_busy=when_busy, revision", "when_busy=run.when_busy, revision"),),
        case="A waiting run that is to FOLD",
    ),
    Fault(
        "an empty prompt is stored",
        (46,),
        (
            Edit(
                "engine/updates.py",
                "        if after.prompt != prompt:",
                "        if after.prompt != prompt and after.prompt.text.strip():",
            ),
        ),
        case="An update to an empty prompt",
    ),
    Fault(
        "an edit is lost with the process",
        (46,),
        (
            Edit(
                "store/sqlite/queries.py",
                "    return lane_from(key, lambda: _lane(key, rows))",
                "    found = lane_from(key, lambda: _lane(key, rows))\n"
                "    line = sorted(found.waiting, key=lambda run: run.accept_seq)\n"
                "    return found._replace(waiting=tuple(line))",
            ),
        ),
        durable=True,
        case="An edit and a move survive",
    ),
    Fault(
        "a run is moved at once to the end",
        (47,),
        (
            Edit(
                UPDATING,
                "    edit.insert(index, [current])",
                "    edit.insert(len(edit.waiting), [current])",
            ),
        ),
        case="Moved runs start",
    ),
    Fault(
        "a moved run counts as accepted again",
        (47,),
        (
            Edit(
                UPDATING,
                "        edit.insert(index, [current])",
                "        edit.accept_seq += 1\n"
                "        edit.insert(index, [current._replace(accept_seq=edit.accept_seq)])",
            ),
        ),
        case="A cancel lists moved runs",
    ),
    Fault(
        "a move before a run that does not wait goes to the head",
        (47,),
        (
            Edit(
                UPDATING,
                "    found = next(",
                "    if move.anchor not in [other.run_id for other in others]:\n"
                "        return first\n"
                "    found = next(",
            ),
        ),
        case="A move to a run that does not wait",
    ),
)
