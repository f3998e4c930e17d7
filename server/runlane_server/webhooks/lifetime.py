"""How long the webhook of a single run lives that does not deliver the end of its run; one that
does is deleted."""

from __future__ import annotations

from dataclasses import dataclass

from runlane_server.core.model import Micros, Run
from runlane_server.store.webhooks import Webhook

SECOND = 1_000_000
"""Microseconds."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """The times that a webhook of a run has; in seconds.

    `delivered` is the time after the end of its run, `unconfirmed` that of one whose endpoint did
    not answer the challenge yet. `unused` is the time within which its run must have been accepted.
    `look` is the time between two looks at the run.
    """

    delivered: float = 600.0
    unconfirmed: float = 86_400.0
    unused: float = 3_600.0
    look: float = 30.0

    def is_over(self, webhook: Webhook, run: Run | None, *, confirmed: bool, now: Micros) -> bool:
        """Whether a webhook that has nothing left to deliver is to be deleted."""
        if run is None:
            return now > webhook.created_at + int(self.unused * SECOND)
        if run.ended_at is None:
            return False
        is_done = confirmed or webhook.progress.disabled
        kept = self.delivered if is_done else self.unconfirmed
        return now > run.ended_at + int(kept * SECOND)


LASTING = Lifetime()
