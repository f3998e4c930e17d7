"""A task is built from the events of its run."""

from __future__ import annotations

import tracemalloc
from datetime import UTC, datetime

from a2a.types import a2a_pb2 as pb

from runlane.types import Artifact, ArtifactKind, RunEvent, Started, TextDelta
from runlane_a2a.task_view import TaskView, Update

TIME = datetime(2026, 1, 1, tzinfo=UTC)


def applied(view: TaskView, *bodies: Started | TextDelta | Artifact) -> list[Update]:
    updates: list[Update] = []
    for index, body in enumerate(bodies, 1):
        updates += view.apply(RunEvent(index, TIME, body))
    return updates


def test_the_first_piece_of_another_attempt_replaces_what_was_there() -> None:
    view = TaskView("r", "s", TIME)
    updates = applied(view, Started(1), TextDelta("a"), TextDelta("b"), Started(2), TextDelta("c"))
    appends = [each.append for each in updates if isinstance(each, pb.TaskArtifactUpdateEvent)]
    assert appends == [False, True, False]
    assert [each.parts[0].text for each in view.task().artifacts] == ["c"]


def test_a_piece_that_appends_to_nothing_begins_the_artifact() -> None:
    view = TaskView("r", "s", TIME)
    piece = Artifact("a", "n", "text/plain", ArtifactKind.TEXT, "x", append=True)
    (update,) = applied(view, piece)
    assert isinstance(update, pb.TaskArtifactUpdateEvent)
    assert (update.append, update.last_chunk) == (False, True)


def test_a_follower_keeps_the_ids_of_artifacts_only() -> None:
    view = TaskView("r", "s", TIME)
    applied(view, TextDelta("ä"), TextDelta("b"))
    assert [each.parts[0].text for each in view.task().artifacts] == ["äb"]
    view.forget_output()
    piece = Artifact("a", "n", "text/plain", ArtifactKind.TEXT, "x", append=True)
    updates = applied(view, TextDelta("c"), piece, piece, Started(2), TextDelta("d"))
    appends = [each.append for each in updates if isinstance(each, pb.TaskArtifactUpdateEvent)]
    assert appends == [True, False, True, False]
    assert view.task().ByteSize() < 100


def test_a_token_takes_little_memory() -> None:
    view = TaskView("r", "s", TIME)
    event = RunEvent(1, TIME, TextDelta("tok "))
    tracemalloc.start()
    for _ in range(20_000):
        view.apply(event)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 400_000  # five times the text
    assert view.task().artifacts[0].parts[0].text == "tok " * 20_000
