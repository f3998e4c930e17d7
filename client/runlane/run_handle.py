"""What one has in hand once a run is accepted."""

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
    """An accepted run. Dropping it changes nothing about the run, which belongs to the server.

    Attributes:
        run: The run as it was when it was accepted, or when it was attached to.
        cursor: Just before all events of this run: a subscription from here misses nothing of it.
            None for a run that was attached to.
    """

    run: Run
    cursor: str | None
    _client: Client = field(repr=False, compare=False)

    @property
    def run_id(self) -> str:
        """The id of the run."""
        return self.run.run_id

    @property
    def session_id(self) -> str:
        """The session of the run."""
        return self.run.session_id

    def events(
        self, after_index: int = 0, *, on_lost: Callable[[RunlaneError], None] | None = None
    ) -> RunEvents:
        """Iterates over what happens in the run, from its acceptance, or after event `after_index`.

        It ends after the run's `RunComplete`; see `RunEvents` for what it does when connections
        break. `on_lost` is called with the error each time that happens.
        """
        return self._client.subscribe_run(self.run_id, after_index=after_index, on_lost=on_lost)

    async def completed(self, timeout: Seconds | None = None) -> RunComplete:
        """Waits for the run to end and tells how, over lost connections and restarted servers.

        `timeout` is how long to wait (seconds or a timedelta), None without limit. Raises
        DeadlineExceeded where the run has not ended by then, Unavailable where the server is out
        of reach by then. Neither changes anything about the run.
        """
        run = await self._client.wait_run(self.run_id, timeout=timeout)
        if run.run_complete is None:
            waited = "" if timeout is None else f" within {seconds(timeout):g} s"
            raise DeadlineExceeded(f"run {self.run_id} did not end{waited}: it is {run.state}")
        return run.run_complete

    async def cancel(self, reason: str = "") -> CancelReceipt:
        """Cancels the run, with the runs folded into it; no other run is touched.

        The receipt is empty where the run has ended, or was covered by an earlier cancel. The run
        ends a little later, which `completed` tells. Safe to repeat.
        """
        return await self._client.cancel(self.session_id, run_id=self.run_id, reason=reason)
