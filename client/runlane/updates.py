"""Requests for updates of waiting runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from runlane import convert
from runlane.arguments import build
from runlane.ids import new_id
from runlane.types import Attachment, WhenBusy
from runlane.v1 import run_service_pb2 as pb


def update_run_request(
    run_id: str,
    *,
    prompt: str | None,
    attachments: Iterable[Attachment] | None,
    when_busy: WhenBusy | None,
    metadata: Mapping[str, str] | None,
    position: pb.QueuePosition | None,
    revision: int | None,
    update_id: str,
) -> pb.UpdateRunRequest:
    """The request to change what is not None. Raises ValueError without a change."""
    changes = {
        "prompt": prompt,
        "attachments": None if attachments is None else [*map(convert.to_attachment, attachments)],
        "when_busy": None if when_busy is None else convert.to_when_busy(when_busy),
        "metadata": metadata,
        "position": position,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    if not given:
        raise ValueError(f"nothing to change: give at least one of {', '.join(changes)}")
    request = build(
        pb.UpdateRunRequest,
        run_id=run_id,
        revision=revision,
        update_id=update_id or new_id(),
        **given,
    )
    request.update_mask.paths.extend(given)
    return request


def queue_position(*, first: bool, last: bool, before: str, after: str) -> pb.QueuePosition | None:
    """The place that one of the arguments names; None without any. Raises ValueError for two."""
    places = {
        "first": first or None,
        "last": last or None,
        "before_run_id": before or None,
        "after_run_id": after or None,
    }
    given = {name: value for name, value in places.items() if value is not None}
    if len(given) > 1:
        raise ValueError("first, last, before, after: give only one of them")
    return build(pb.QueuePosition, **given) if given else None
