"""Updates of waiting runs: edited, sent now, moved (R46, R47)."""

from __future__ import annotations

from runlane_server.core.errors import AlreadyStarted, AnchorNotWaiting, EditConflict
from runlane_server.core.lane.cancelling import cancel_active
from runlane_server.core.lane.edit import Edit
from runlane_server.core.model import Micros, Updated, WhenBusy
from runlane_server.core.transition import Lane, LaneRun, Transition
from runlane_server.core.update import Move, Place, RunEdit, RunUpdate, is_repeated, remembered


def update(lane: Lane, wanted: RunUpdate, *, at: Micros) -> Transition[LaneRun]:
    """Changes a waiting run, and replies with it.

    A repeated update changes nothing, also when the run has started. INTERRUPT acts as if the run
    were accepted now (R27). Raises AlreadyStarted, EditConflict, AnchorNotWaiting, and
    InvalidArgument if another update has the same id.
    """
    run = lane.find(wanted.run_id)
    if run is not None and _is_repeated(run, wanted):
        return Transition(lane, reply=run)
    # A run that waits for its next attempt has begun its turn, and its prompt is written.
    if run is None or run not in lane.waiting or run.turn:
        raise AlreadyStarted.of(
            wanted.run_id,
            state="" if run is None else run.state,
            folded_into="" if run is None else run.folded_into,
            active=lane.active_run_id,
        )
    if wanted.revision not in {None, run.revision}:
        raise EditConflict.of_run(run.run_id, run.revision)
    edit = Edit(lane, at)
    if wanted.when_busy is WhenBusy.INTERRUPT:
        cancel_active(edit, "interrupted by " + run.run_id)
        _put(edit, run, 0)
    if wanted.move is not None:
        _put(edit, run, _index(edit, run, wanted.move))
    _change(edit, run, wanted)
    made = edit.done(reply=None)
    return made.replying(next(it for it in made.lane.waiting if it.run_id == run.run_id))


def _is_repeated(run: LaneRun, wanted: RunUpdate) -> bool:
    return is_repeated(wanted, run.last_update, run.revision, has_begun=bool(run.turn))


def _index(edit: Edit, run: LaneRun, move: Move) -> int:
    """The place in the queue without the run itself. Raises AnchorNotWaiting."""
    others = [other for other in edit.waiting if other.run_id != run.run_id]
    begun = [n for n, other in enumerate(others) if other.turn]
    # Nothing overtakes a run that waits for its next attempt (R38).
    first = begun[-1] + 1 if begun else 0
    if move.place is Place.FIRST:
        return first
    if move.place is Place.LAST:
        return len(others)
    found = next((n for n, other in enumerate(others) if other.run_id == move.anchor), None)
    if found is None or (move.place is Place.BEFORE and found < first):
        raise AnchorNotWaiting.of(move.anchor, run.run_id)
    return max(first, found + (move.place is Place.AFTER))


def _put(edit: Edit, run: LaneRun, index: int) -> None:
    """Moves a run to a place in the queue; the others keep their order (R47)."""
    order = [other.run_id for other in edit.waiting]
    moved = [other for other in order if other != run.run_id]
    moved.insert(index, run.run_id)
    if moved != order:
        current = edit.latest(run)
        edit.remove([run])
        edit.insert(index, [current])


def _change(edit: Edit, run: LaneRun, wanted: RunUpdate) -> None:
    """Counts the update, if it has an effect, and reports what it edited.

    One with an id is remembered also without an effect: its repetition could have one.
    """
    moved = edit.latest(run)
    when_busy = wanted.when_busy or run.when_busy
    is_edited = wanted.content is not None or when_busy is not run.when_busy
    has_effect = bool(is_edited or edit.covered or moved is not run)
    if not (has_effect or wanted.update_id):
        return
    last = remembered(wanted, run.last_update)
    changed = moved._replace(
        when_busy=when_busy, revision=run.revision + has_effect, last_update=last
    )
    if is_edited:
        changed = edit.emit(changed, Updated(changed.revision, wanted.excerpt, when_busy))
    edit.replace(changed)
    edit.note(changed, RunEdit(wanted.content, wanted.growth))
