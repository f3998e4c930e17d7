"""Who may have an active run on this node: so many lanes at a time, the longest waiting first."""

from __future__ import annotations

from collections.abc import Callable

from runlane_server.core.model import SessionKey


class Slots:
    """Hands out slots. A lane that finds none free lines up, and is called when it is its turn.

    While it is shut (the agent is not ready, or the node drains) nobody gets a slot.
    """

    def __init__(self, total: int, call: Callable[[SessionKey], None]) -> None:
        self._free = total
        self._call = call
        self._shut = True
        self._line: dict[SessionKey, None] = {}
        self._granted: dict[SessionKey, None] = {}
        self._taken: set[SessionKey] = set()

    @property
    def in_use(self) -> int:
        """How many slots are taken."""
        return len(self._taken)

    @property
    def free(self) -> int:
        """How many lanes more could get one now, beyond those in line."""
        return 0 if self._shut else max(0, self._free - len(self._line))

    @property
    def line(self) -> tuple[SessionKey, ...]:
        """The lanes that wait for a slot, the first in line first."""
        return (*self._granted, *self._line)

    def lined_up(self, lane: SessionKey) -> bool:
        """Whether a lane waits for a slot."""
        return lane in self._line or lane in self._granted

    def open(self) -> None:
        """Begins to hand out slots."""
        self._shut = False
        self._call_next()

    def shut(self) -> None:
        """Hands out no slot from now on. Slots that are taken stay so until they are given back."""
        self._shut = True
        self._free += len(self._granted)
        self._line = {**self._granted, **self._line}
        self._granted.clear()

    def take(self, lane: SessionKey) -> bool:
        """Takes a slot for a lane that wants to start a run; if there is none, the lane lines up.

        A lane that has one already, as its run has just ended, keeps it if nobody else waits.
        """
        if self._shut:
            self._line.setdefault(lane)
            return False
        if lane in self._granted:
            del self._granted[lane]
            self._taken.add(lane)
            return True
        if not self._line and (lane in self._taken or self._free > 0):
            if lane not in self._taken:
                self._free -= 1
                self._taken.add(lane)
            return True
        self._line.setdefault(lane)
        return False

    def occupy(self, lane: SessionKey) -> None:
        """Takes a slot for a lane that has an active run already, even if none is free."""
        if lane in self._granted:
            del self._granted[lane]
        elif lane not in self._taken:
            self._free -= 1
        self._line.pop(lane, None)
        self._taken.add(lane)

    def line_up(self, lane: SessionKey) -> None:
        """Puts a lane that has runs waiting into the line."""
        self._line.setdefault(lane)
        self._call_next()

    def give_back(self, lane: SessionKey) -> None:
        """Frees the slot that a lane has, or was called to take; does nothing if it has none."""
        if lane in self._taken:
            self._taken.remove(lane)
            self._free += 1
        elif lane in self._granted:
            del self._granted[lane]
            self._free += 1
        self._call_next()

    def settle(self, lane: SessionKey, *, running: bool, startable: bool) -> None:
        """Brings a lane's claims in line with what was committed: whether it has an active run,
        and whether it has one to start."""
        if running or not startable:
            self._line.pop(lane, None)
        if not running:
            self.give_back(lane)
        elif lane in self._granted:
            # It was called and holds a slot already, or its run is another node's.
            del self._granted[lane]
            self._free += 1
            self._call_next()

    def _call_next(self) -> None:
        while self._line and self._free > 0 and not self._shut:
            lane = next(iter(self._line))
            del self._line[lane]
            self._free -= 1
            self._granted[lane] = None
            self._call(lane)
