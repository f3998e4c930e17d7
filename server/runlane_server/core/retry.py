"""Retries of attempts that the agent failed (R38)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

Micros: TypeAlias = int

ONLY_IF_NAMED = frozenset({"RUN_TIMEOUT", "OUTPUT_LIMIT"})
"""Reasons that a policy without reasons does not match: another attempt would take as long, and
emit as much."""

DEFAULT_INITIAL_BACKOFF: Micros = 1_000_000
DEFAULT_MAX_BACKOFF: Micros = 60_000_000


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Which failures of the agent lead to another attempt, how often and how soon.

    `reasons` are those of the errors to repeat; none: every reason outside `ONLY_IF_NAMED`.
    `max_attempts` counts the attempts that the agent may fail, including the first; attempts lost
    with their node are limited by the run's own `max_attempts`. The backoff doubles with each
    failure up to `max_backoff`; both are in microseconds. Without `after_output`, an attempt that
    has emitted anything for the transcript is not repeated.
    """

    reasons: tuple[str, ...]
    max_attempts: int
    initial_backoff: Micros = DEFAULT_INITIAL_BACKOFF
    max_backoff: Micros = DEFAULT_MAX_BACKOFF
    after_output: bool = False

    def backoff(self, reason: str, failures: int, *, had_output: bool) -> Micros | None:
        """The time until the next attempt after one failed; None if there is no next one.

        `failures` is the number of attempts that failed, including this one.
        """
        if failures >= self.max_attempts or (had_output and not self.after_output):
            return None
        if reason not in self.reasons and (self.reasons or reason in ONLY_IF_NAMED):
            return None
        return self.pause(failures)

    def pause(self, failures: int) -> Micros:
        """The backoff after so many failures, at least one."""
        # Bounded, so that the power of two stays small.
        doubled = self.initial_backoff << min(failures - 1, 40)
        return min(doubled, max(self.max_backoff, self.initial_backoff))
