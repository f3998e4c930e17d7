"""The handle of an accepted run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runlane.convert import Seconds, seconds
from runlane.errors import DeadlineExceeded, RunlaneError
from runlane.run_events import RunEvents
from runlane.types import CancelReceipt, Run, RunComplete

if TYPE_CHECKING:
    from runlane.client import Client


@dataclass(frozen=True, slots=True)
class RunHandle:
    """An accepted run. Discarding the handle does not affect the run.

    Attributes:
        run: The run at the time of `run_accepted` or `attach`.
        cursor: The position just before the events of this run; a subscription from here receives
            all of them. None after `attach`.
    """

    run: Run
    cursor: str | None
    _client: Client = field(repr=False, compare=False)

    @property
    def run_id(self) -> str:
        """The run id."""
        return self.run.run_id

    @property
    def session_id(self) -> str:
        """The session id."""
        return self.run.session_id

    def events(
        self, after_index: int = 0, *, on_lost: Callable[[RunlaneError], None] | None = None
    ) -> RunEvents:
        """Iterates over the events of the run after `after_index`; ends after its `RunComplete`.

        `RunEvents` reconnects after a lost connection; `on_lost` is called with the error each
        time.
        """
        return self._client.subscribe_run(self.run_id, after_index=after_index, on_lost=on_lost)

    async def completed(self, timeout: Seconds | None = None) -> RunComplete:
        """Waits for the end of the run, across lost connections and server restarts.

        Args:
            timeout: Maximum time to wait (seconds or a timedelta); None: no limit. A timeout does
                not affect the run.

        Raises:
            DeadlineExceeded: The run has not ended within the timeout.
            Unavailable: The server cannot be reached at the end of the timeout.
        """
        run = await self._client.wait_run(self.run_id, timeout=timeout)
        if run.run_complete is None:
            suffix = "" if timeout is None else f" after {seconds(timeout):g} s"
            raise DeadlineExceeded(f"run {self.run_id} is still {run.state}{suffix}")
        return run.run_complete

    async def cancel(self, reason: str = "") -> CancelReceipt:
        """Cancels the run and the runs folded into it. Idempotent.

        The receipt is empty if the run has ended or an earlier cancel covered it. The run may end
        later than this call returns; wait with `completed`.
        """
        return await self._client.cancel(self.session_id, run_id=self.run_id, reason=reason)
