"""Mutants of the lane's rules: the exhaustive search must find each of them.

The first ones are bugs that servers of this kind really had.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from proofs.sim.explore import SMALL, UPDATED, Counterexample, explore
from runlane_server.core import lane as lane_rules

SOURCE = Path(lane_rules.__file__).parent
DEPTH = 8


@dataclass(frozen=True)
class Mutant:
    """A replacement in a module of `core.lane`, and the rule that must detect it."""

    name: str
    old: str
    new: str
    caught_by: str

    def build(self, folder: Path) -> ModuleType:
        """Writes the changed rules into a folder of the import path, and imports them."""
        texts = {path.name: path.read_text() for path in SOURCE.glob("*.py")}
        fits = [name for name, text in texts.items() for _ in range(text.count(self.old))]
        assert len(fits) == 1, "the mutant no longer fits the source"
        texts[fits[0]] = texts[fits[0]].replace(self.old, self.new)
        package = f"mutant_{folder.name}"
        (folder / package).mkdir()
        for name, text in texts.items():
            own = text.replace(f"from {lane_rules.__name__}.", f"from {package}.")
            (folder / package / name).write_text(own)
        return import_module(package)


MUTANTS = (
    Mutant(
        "an accept that expects another active run is accepted",
        'if request.expected_active not in {"", lane.active_run_id}:',
        "if False:",
        "refuse",
    ),
    Mutant(
        "a cancel covers only the first of two accepts that have begun",
        "and held.run_id not in known and not held.covered\n    ]",
        "and held.run_id not in known and not held.covered\n    ][:1]",
        "R20",
    ),
    Mutant(
        "a pending cancel catches a later run",
        "same_run = (held for held in lane.reservations if held.run_id == run_id)",
        "same_run = (held for held in lane.reservations)",
        "R11",
    ),
    Mutant(
        "no terminal event for a run dropped from the queue",
        "        edit.covered.append(run.run_id)\n        end_unstarted(",
        "        edit.covered.append(run.run_id)\n"
        "        edit.remove([run])\n        continue\n        end_unstarted(",
        "R21",
    ),
    Mutant(
        "no terminal event for a run that is cancelled on entry",
        "        cancel_waiting(edit, [run], held.cancel_reason)",
        "        edit.remove([run])",
        "R21",
    ),
    Mutant(
        "a run that never started leaves no turn",
        "    run = advance(run, trigger, turn=run.turn or edit.open_turn(run))\n"
        '    message_id = edit.write(run, close((), reason), "", attempt=run.attempt + 1)',
        '    run = advance(run, trigger)\n    message_id = ""',
        "R14",
    ),
    Mutant(
        "no terminal event for runs that failed before they started",
        "        end_unstarted(edit, run, Trigger.FAIL, FinishReason.ERROR, error)",
        "        edit.remove([run])",
        "R21",
    ),
    Mutant(
        "an error of one run ends the others",
        "    edit.active, edit.folded = None, ()\n    return complete",
        "    edit.active, edit.folded = None, ()\n"
        "    for run in edit.waiting if outcome.error else ():\n"
        "        end_unstarted(edit, run, Trigger.FAIL, FinishReason.ERROR, outcome.error)\n"
        "    return complete",
        "finish takes no run",
    ),
    Mutant(
        "the clean-up of a run drops the cancel of the next one",
        "    edit.active, edit.folded = None, ()\n    return complete",
        "    edit.active, edit.folded, edit.reservations = None, (), ()\n    return complete",
        "R28",
    ),
    Mutant(
        "two runs are started at once",
        "_start(edit, host) if lane.can_start_at(at) else None",
        "_start(edit, host) if lane.waiting and lane.waiting[0].not_before <= at else None",
        "queued cannot start",
    ),
    Mutant(
        "a burst of accepts that reject starts none",
        "earlier = takewhile(lambda other: other.token != held.token, lane.reservations)",
        "earlier = (other for other in lane.reservations if other.token != held.token)",
        "refuse",
    ),
    Mutant(
        "a completion undoes a cancel that was answered",
        "        (_S.CANCELLING, _H.COMPLETE): _S.CANCELLED,",
        "        (_S.CANCELLING, _H.COMPLETE): _S.COMPLETED,",
        "finish takes no run",
    ),
    Mutant(
        "a cancelled turn still takes folded runs",
        "_fold(edit) if active.state is RunState.ACTIVE else ()",
        "_fold(edit)",
        "goes the way of its turn",
    ),
    Mutant(
        "a queued run is folded",
        "(run for run in edit.waiting if run.when_busy is WhenBusy.FOLD)",
        "(run for run in edit.waiting)",
        "R26, R27",
    ),
    Mutant(
        "a run that has a turn is folded into another one's",
        "joining = [run for run in waiting_to if run.turn == 0 and run.agent == host.agent]",
        "joining = [run for run in waiting_to if run.agent == host.agent]",
        "keeps it",
    ),
    Mutant(
        "a run of another agent is folded",
        " and run.agent == host.agent]",
        "]",
        "R26, R27",
    ),
    Mutant(
        "a run gets the default agent in place of the one it names",
        "agent = agents.choose(request.agent, lane.agent)",
        'agent = agents.choose(request.agent and "") or agents.default',
        "R31",
    ),
    Mutant(
        "an unknown agent is accepted",
        "agent = agents.choose(request.agent, lane.agent)",
        "agent = request.agent or agents.default",
        "has to be refused",
    ),
    Mutant(
        "the runs of all agents fail with one of them",
        "if agents is None or run.agent in agents]",
        "]",
        "R32",
    ),
    Mutant(
        "folded runs are left behind by a cancel",
        "    edit.folded = tuple(_cover(edit, run, reason) for run in edit.folded)\n",
        "",
        "goes the way of its turn",
    ),
    Mutant(
        "a retry loses the folded runs",
        'folded_into="", turn=0) for run in folded',
        'folded_into="", turn=0) for run in ()',
        "R21",
    ),
    Mutant(
        "a retried run goes to the end",
        "        self.insert(0, back)",
        "        self.insert(len(self.waiting), back)",
        "node_lost takes no run",
    ),
    Mutant(
        "a retried run writes its prompt again",
        "        turn=head.turn or edit.open_turn(head),",
        "        turn=edit.open_turn(head),",
        "keeps it",
    ),
    Mutant(
        "an interrupting run goes to the end",
        "    index = 0 if at_head else len(waiting)",
        "    index = len(waiting)",
        "R7, R27",
    ),
    Mutant(
        "an accept that was cancelled interrupts",
        "request.when_busy is WhenBusy.INTERRUPT and not held.covered",
        "request.when_busy is WhenBusy.INTERRUPT",
        "R27",
    ),
    Mutant(
        "the receipt lists the state after the cancel",
        "before = {run.run_id: run for run in lane.runs}\n    if scope",
        "before = {r.run_id: r._replace(state=RunState.CANCELLING) for r in lane.runs}\n"
        "    if scope",
        "R20",
    ),
    Mutant(
        "a repeated cancel covers again",
        "    if active.state is RunState.CANCELLING:\n        return\n    edit.active",
        "    edit.active",
        "cannot cancel",
    ),
    Mutant(
        "the receipt names a run twice that is accepted once more",
        " and held.run_id not in known and not held.covered",
        " and not held.covered",
        "R20",
    ),
    Mutant(
        "the next run is not made first",
        "        self._set_waiting_states()\n        return Transition(",
        "        return Transition(",
        "R8",
    ),
    Mutant(
        "an event index is used twice",
        "        return run._replace(events=index, **changes)",
        "        return run._replace(**changes)",
        "counts its events",
    ),
    Mutant(
        "a lost attempt still ends the run",
        "if active is None or (active.run_id, active.attempt) != (run_id, attempt):\n        raise",
        "if active is None or active.run_id != run_id:\n        raise",
        "has to be refused",
    ),
    Mutant(
        "a withdrawn run takes the turn with it",
        "    for run in edit.folded:\n"
        "        if run.run_id == run_id and run.state is RunState.FOLDED:\n"
        "            _withdraw(edit, run, reason)",
        "    if any(run.run_id == run_id for run in edit.folded):\n"
        "        cancel_active(edit, reason)",
        "R20",
    ),
    Mutant(
        "an attempt starts before its backoff is over",
        "_start(edit, host) if lane.can_start_at(at) else None",
        "_start(edit, host) if lane.can_start else None",
        "R38",
    ),
    Mutant(
        "a failed attempt goes behind the queue",
        "    edit.put_back([back, *unfold(edit)])",
        "    if failed and edit.waiting:\n"
        "        edit.record(back)\n"
        "        edit.waiting = (*edit.waiting, back)\n"
        "        return\n"
        "    edit.put_back([back, *unfold(edit)])",
        "R38",
    ),
    Mutant(
        "a failure is not counted",
        "        failures=active.failures + failed,",
        "        failures=active.failures,",
        "R38",
    ),
    Mutant(
        "an interrupting run overtakes one that waits for its next attempt",
        "is WhenBusy.INTERRUPT and not held.covered:\n        cancel_active",
        "is WhenBusy.INTERRUPT and not (held.covered or lane.backing_off):\n        cancel_active",
        "R38",
    ),
    Mutant(
        "a cancel misses a run that waits for its next attempt",
        "    if active is None:\n        _cancel_backing_off(edit, reason)\n",
        "    if active is None:\n",
        "R20",
    ),
    Mutant(
        "a cancel of the queue takes the run that waits for its next attempt",
        "        cancel_waiting(edit, lane.queue, reason)",
        "        cancel_waiting(edit, [r for r in lane.waiting if r in edit.waiting], reason)",
        "R20",
    ),
    Mutant(
        "a run that a cancel covers is repeated",
        " or outcome.is_final or active.state not in AT_WORK:",
        " or outcome.is_final:",
        "cancelling cannot retry",
    ),
    Mutant(
        "a run that fails while it waits for input is not repeated",
        " or outcome.is_final or active.state not in AT_WORK:",
        " or outcome.is_final or active.state is not RunState.ACTIVE:",
        "keeps its place",
    ),
    Mutant(
        "a failed attempt counts as lost with its node",
        "    counted = active.attempt - active.failures - active.asking.extra_attempts",
        "    counted = active.attempt - active.asking.extra_attempts",
        "retried run goes back",
    ),
    Mutant(
        "a supervisor ends a run that another node has adopted",
        "    if host not in {None, active.host}:",
        "    if False:",
        "has to be refused",
    ),
    Mutant(
        "a supervisor ends a parked run that goes on",
        "active.asking.parked and _is_ending(active):",
        "active.asking.parked:",
        "has to be refused",
    ),
    Mutant(
        "nobody ends a run that was cancelled as it parked",
        "active.asking.parked and _is_ending(active):",
        "False:",
        "no reason to refuse",
    ),
    Mutant(
        "a run is lost with a node that it has left",
        "active.host}:\n        return Transition(lane, reply=False)",
        "active.host, lost_with}:\n        return Transition(lane, reply=False)",
        "counts its events",
    ),
    Mutant(
        "a run is taken from the node where its worker is now",
        "active.host}:\n        return Transition(lane, reply=active)",
        "active.host, lost_with}:\n        return Transition(lane, reply=active)",
        "changes its node and nothing else",
    ),
    Mutant(
        "a run that is resumed has no node",
        '{"state": next_state(active.state, Trigger.RESUME), "host": host}',
        '{"state": next_state(active.state, Trigger.RESUME), "host": ""}',
        "where it has a slot",
    ),
    Mutant(
        "an adoption takes the cancel back",
        "    moved = active._replace(host=host)\n",
        "    moved = active._replace(host=host, state=RunState.ACTIVE, cancel_reason='')\n",
        "adopt takes no run",
    ),
    Mutant(
        "a late attempt is adopted",
        "    active = the_active(lane, run_id, attempt)\n    if active.host == host or",
        "    active = the_active(lane, run_id, lane.active.attempt)\n    if active.host == host or",
        "has to be refused",
    ),
    Mutant(
        "an attempt that was given back counts",
        "        count(edit, active._replace(asking=asking), events)",
        "        count(edit, active, events)",
        "R37",
    ),
    Mutant(
        "the attempt after one that was given back has its number",
        "        count(edit, active._replace(asking=asking), events)",
        "        count(edit, active._replace(attempt=active.attempt - 1), events)",
        "R33",
    ),
    Mutant(
        "a turn with folded runs is given back as if nothing had happened",
        "is_active and not (content or tail or lane.folded):",
        "is_active:",
        "R37",
    ),
    Mutant(
        "accept_seq is given twice after a cancel on entry",
        "    seq = edit.accept_seq + 1\n",
        "    held = [*edit.waiting, *filter(None, [edit.active])]\n"
        "    seq = max([0, *(run.accept_seq for run in held)]) + 1\n",
        "R4",
    ),
    Mutant(
        "a run that asks does not wait",
        "    if (asked or park) and run.state is RunState.ACTIVE:",
        "    if park and run.state is RunState.ACTIVE:",
        "R40",
    ),
    Mutant(
        "an agent without a checkpoint continues its attempt",
        "    if park is not None and not (park.checkpoint or active.asking.parked):\n",
        "    if False:\n",
        "R44",
    ),
    Mutant(
        "a request is asked twice after a retry",
        "    new = [request for request in asked if request.question.key not in held]",
        "    new = asked",
        "R41",
    ),
    Mutant(
        "a question that the store did not confirm is asked again",
        "    if active.asking.asks >= number:",
        "    if False:",
        "R44",
    ),
    Mutant(
        "an answer while the run is active again is forgotten",
        "    asked = [request for request in stamped if request.question.key not in closed]",
        "    asked = stamped",
        "R44",
    ),
    Mutant(
        "a closed request takes another answer",
        "    left = tuple(one for one in run.asking.pending if one != item)",
        "    left = run.asking.pending",
        "R42",
    ),
    Mutant(
        "a cancel leaves requests open",
        "    run = advance(withdraw_inputs(edit, run)",
        "    run = advance(run",
        "R42",
    ),
    Mutant(
        "the end of a run leaves requests open",
        "    run = end_inputs(edit, run)\n",
        "",
        "R42",
    ),
    Mutant(
        "a run that nobody answered completes",
        "    if active.asking.expired:\n        expired",
        "    if False:\n        expired",
        "R43",
    ),
    Mutant(
        "a default answer fails the run",
        "    if given is None and run.state is RunState.INPUT_REQUIRED:",
        "    if run.state is RunState.INPUT_REQUIRED:",
        "R43",
    ),
    Mutant(
        "a run that waits for input loses its attempt though it can resume",
        "    if waits and active.asking.resumable:",
        "    if waits and False:",
        "R44",
    ),
    Mutant(
        "a run that ends while it waits to begin again writes over its dropped output",
        "    attempt = ended.attempt + ended.asking.restarts\n",
        "    attempt = ended.attempt\n",
        "not used again",
    ),
    Mutant(
        "a run that is cancelled between two attempts writes over the last one",
        '    message_id = edit.write(run, close((), reason), "", attempt=run.attempt + 1)',
        '    message_id = edit.write(run, close((), reason), "", attempt=1)',
        "not used again",
    ),
    Mutant(
        "resuming after a lost node consumes an attempt",
        "extra_attempts=kept.extra_attempts + 1, ",
        "",
        "R44",
    ),
    Mutant(
        "a parked run is taken for lost",
        "    if waits and active.asking.parked:",
        "    if waits and False:",
        "R44",
    ),
    Mutant(
        "a run resumes before all answers are there",
        "_resume(edit, host) if lane.can_resume else None",
        "_resume(edit, host) if lane.active else None",
        "cannot resume",
    ),
    Mutant(
        "an event of input takes the number of one of the agent",
        "    if run.state not in {RunState.ACTIVE, RunState.CANCELLING}:\n"
        "        run = emit_late(edit, run)",
        "    run = emit_late(edit, run)",
        "numbered",
    ),
)

UPDATES = (
    Mutant(
        "an update of an old revision is taken",
        "    if wanted.revision not in {None, run.revision}:",
        "    if False:",
        "has to be refused",
    ),
    Mutant(
        "a run that has begun its turn is edited",
        "run not in lane.waiting or run.turn:",
        "run not in lane.waiting:",
        "has to be refused",
    ),
    Mutant(
        "a repeated update is refused once the run has started",
        "if run is not None and _is_repeated(run, wanted):",
        "if False:",
        "no reason to refuse",
    ),
    Mutant(
        "a move overtakes a run that waits for its next attempt",
        "    first = begun[-1] + 1 if begun else 0",
        "    first = 0",
        "R47",
    ),
    Mutant(
        "a run is put behind the one that it is to come before",
        "found + (move.place is Place.AFTER))",
        "found + 1)",
        "R47",
    ),
    Mutant(
        "a run that is to interrupt leaves the active one alone",
        '        cancel_active(edit, "interrupted by " + run.run_id)\n',
        "",
        "R27",
    ),
    Mutant(
        "an update is not counted",
        "revision=run.revision + has_effect, ",
        "",
        "R46",
    ),
    Mutant(
        "a move writes the whole queue",
        "        if ranks is None:",
        "        if True:",
        "R47",
    ),
    Mutant(
        "an edit is not committed",
        "    edit.note(changed, RunEdit(wanted.content, wanted.growth))",
        "    edit.note(changed, RunEdit())",
        "committed",
    ),
)


@pytest.mark.parametrize("mutant", [*MUTANTS, *UPDATES], ids=lambda mutant: mutant.name)
def test_the_search_finds_the_mutant(
    mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = mutant.build(tmp_path)
    bounds = UPDATED if mutant in UPDATES else SMALL
    with pytest.raises(Counterexample) as found:
        explore(DEPTH, bounds, rules=module)
    assert mutant.caught_by in found.value.rule


def test_the_search_accepts_a_copy_of_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    same = "_S, _H = RunState"
    explore(4, rules=Mutant("none", same, same, "").build(tmp_path))
