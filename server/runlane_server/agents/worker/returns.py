"""Runs that workers give back again and again."""

from __future__ import annotations

from dataclasses import dataclass, field

from runlane_server.core.model import RunKey

MAX_RETURNS = 3
"""Returns of a run in a row; with the last one its attempt is lost."""

MAX_WORKERS = 20
"""Workers that may each hand a run back once, as they shut down."""

MAX_RUNS = 10_000
"""Runs whose returns are known. The one that was returned the longest ago is forgotten first."""


@dataclass(slots=True)
class _Returned:
    count: int = 0
    by: set[str] = field(default_factory=set)


class Returns:
    """Counts how often workers gave each run back in a row.

    A prompt that ends every worker at once would otherwise run for ever in one attempt. Workers
    that shut down one after another hand a run back without fault: the first time by each of them
    does not count.
    """

    def __init__(self) -> None:
        self._runs: dict[RunKey, _Returned] = {}

    def add(self, key: RunKey, worker_id: str | None) -> bool:
        """Counts a return: by the worker that handed the run back, or None if the turn was lost on
        its way. Returns whether the attempt is lost; then the count starts again."""
        returned = self._runs.pop(key, None) or _Returned()
        if self._is_drain(returned, worker_id):
            returned.by.add(str(worker_id))
        else:
            returned.count += 1
        if returned.count >= MAX_RETURNS:
            return True
        self._runs[key] = returned
        if len(self._runs) > MAX_RUNS:
            del self._runs[next(iter(self._runs))]
        return False

    @staticmethod
    def _is_drain(returned: _Returned, worker_id: str | None) -> bool:
        is_first = worker_id is not None and worker_id not in returned.by
        return is_first and len(returned.by) < MAX_WORKERS

    def forget(self, key: RunKey) -> None:
        """The run has gone on."""
        self._runs.pop(key, None)
