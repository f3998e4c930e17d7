"""The slots that workers offer for one agent."""

from __future__ import annotations

from runlane_server.agents.worker.slot import Slot


class Offers:
    """Free slots, by worker. A worker is known by its id."""

    def __init__(self) -> None:
        self._of_worker: dict[str, dict[Slot, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of_worker.values()))

    def add(self, slot: Slot) -> None:
        """Adds a slot."""
        self._of_worker.setdefault(slot.worker_id, {})[slot] = None

    def remove(self, slot: Slot) -> None:
        """Removes a slot."""
        slots = self._of_worker[slot.worker_id]
        del slots[slot]
        if not slots:
            del self._of_worker[slot.worker_id]

    def find(self, tenant: str) -> Slot | None:
        """A slot that executes runs of a tenant, of the worker with the most free slots: so equal
        workers execute equally many runs."""
        for slots in sorted(self._of_worker.values(), key=len, reverse=True):
            for slot in slots:
                if slot.serves(tenant):
                    return slot
        return None
