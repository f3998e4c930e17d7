"""Updates of waiting runs on the wire."""

from __future__ import annotations

from runlane.v1 import run_service_pb2 as pb
from runlane_server.core.model import Attachment, WhenBusy
from runlane_server.core.update import Move, Place, RunPatch, patch_errors
from runlane_server.rpc import convert
from runlane_server.rpc.checks import Checks
from runlane_server.rpc.validate import check_attachments

EDITABLE = ("prompt", "attachments", "when_busy", "metadata", "position")
"""The fields of a run that callers may change while it waits."""


def update_run(request: pb.UpdateRunRequest) -> RunPatch:
    """Reads the request to edit or move a run. The size of its prompt is checked later, with what
    the run has."""
    checks = Checks()
    checks.run_id(request.run_id)
    paths = request.update_mask.paths
    checks.count("update_mask", paths, len(EDITABLE))
    if not set(paths) <= set(EDITABLE):
        checks.reject("update_mask", f"may name only {', '.join(EDITABLE)}")
    for name in EDITABLE:
        if name not in paths and _is_given(request, name):
            checks.reject(name, "is given, but update_mask does not name it")
    patch = RunPatch(
        text=request.prompt if "prompt" in paths else None,
        attachments=_attachments(checks, request) if "attachments" in paths else None,
        metadata=_labels(checks, request) if "metadata" in paths else None,
        when_busy=_when_busy(checks, request) if "when_busy" in paths else None,
        move=_move(checks, request) if "position" in paths else None,
        revision=request.revision if request.HasField("revision") else None,
        update_id=request.update_id,
    )
    checks.identifier("update_id", patch.update_id)
    if patch.revision is not None:
        checks.between("revision", patch.revision, 0)
    for error in patch_errors(request.run_id, patch) if set(paths) <= set(EDITABLE) else ():
        checks.include(error)
    checks.finish()
    return patch


def _is_given(request: pb.UpdateRunRequest, name: str) -> bool:
    return request.HasField("position") if name == "position" else bool(getattr(request, name))


def _attachments(checks: Checks, request: pb.UpdateRunRequest) -> tuple[Attachment, ...]:
    checks.count("attachments", request.attachments)
    check_attachments(checks, request.attachments)
    return convert.prompt_from("", request.attachments).attachments


def _labels(checks: Checks, request: pb.UpdateRunRequest) -> dict[str, str]:
    checks.labels("metadata", request.metadata)
    return dict(request.metadata)


def _when_busy(checks: Checks, request: pb.UpdateRunRequest) -> WhenBusy:
    return checks.enum("when_busy", request.when_busy, convert.WHEN_BUSY_FROM.get, WhenBusy.QUEUE)


def _move(checks: Checks, request: pb.UpdateRunRequest) -> Move | None:
    position = request.position
    match position.WhichOneof("place"):
        case "first" if position.first:
            return Move(Place.FIRST)
        case "last" if position.last:
            return Move(Place.LAST)
        case "before_run_id":
            return _anchored(checks, Place.BEFORE, position.before_run_id)
        case "after_run_id":
            return _anchored(checks, Place.AFTER, position.after_run_id)
    checks.reject("position", "is missing; give first, last, before_run_id or after_run_id")
    return None


def _anchored(checks: Checks, place: Place, anchor: str) -> Move:
    checks.identifier(f"position.{place}_run_id", anchor)
    return Move(place, anchor)
