"""Accepting a run in process: the reservation before, and the accepted run after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from runlane_server.core.errors import RunlaneError
from runlane_server.core.model import Micros, Run, RunKey, SessionKey
from runlane_server.store.base import Position


@dataclass(frozen=True, slots=True)
class Acceptance:
    """A durable run, and the position in the event log just before its first event."""

    run: Run
    position: Position


class AcceptsInProgress:
    """The accepts in progress on this node, by the id of the coming run. Several may share one."""

    def __init__(self) -> None:
        self._sessions: dict[RunKey, tuple[SessionKey, ...]] = {}

    def begin(self, run: RunKey, session: SessionKey) -> None:
        """An accept of the run begins."""
        self._sessions[run] = (*self.sessions(run), session)

    def end(self, run: RunKey, session: SessionKey) -> None:
        """One accept of the run in this session has ended."""
        left = list(self._sessions.pop(run))
        left.remove(session)
        if left:
            self._sessions[run] = tuple(left)

    def sessions(self, run: RunKey) -> tuple[SessionKey, ...]:
        """The sessions in which the run is being accepted, the first accept first."""
        return self._sessions.get(run, ())


class AcceptedRun:
    """An accept that has begun and is NOT durable yet (R6).

    Despite its name no run exists yet: this is the reservation that `begin_accepted` hands out and
    that `run_accepted` turns into a durable run. From the reservation on the session is busy and a
    cancel covers the coming run (R8, R10). `close` releases it unless `run_accepted` has used it,
    and may be called any number of times; as a context manager it closes itself.

    `began_at` is the time of the reservation. With a `refusal` nothing is reserved: `run_accepted`
    raises it unless the run id names a run that was accepted earlier. `on_end` is called once, with
    whether the reservation was used.
    """

    def __init__(
        self,
        key: SessionKey,
        run_id: str,
        token: str = "",
        *,
        began_at: Micros,
        on_end: Callable[[AcceptedRun, bool], None] | None = None,
        refusal: RunlaneError | None = None,
    ) -> None:
        self.key = key
        self.run_id = run_id
        self.token = token
        self.began_at = began_at
        self.refusal = refusal
        self.is_closed = False
        self._on_end = on_end

    @property
    def session_id(self) -> str:
        """The id of the session."""
        return self.key.session_id

    def use(self) -> None:
        """Marks the reservation as used: a run has taken its place."""
        self._end(used=True)

    def close(self) -> None:
        """Releases the reservation if it is still open."""
        self._end(used=False)

    def _end(self, *, used: bool) -> None:
        if not self.is_closed:
            self.is_closed = True
            if self._on_end is not None:
                self._on_end(self, used)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
