"""Which slots of the stacked adapters belong to which adapter: a state machine without tensors."""

from __future__ import annotations


class SlotSpace:
    """Adapters side by side, each with a run of slots of its own; what one leaves is filled by the next that fits."""

    def __init__(self) -> None:
        self._runs: dict[str, range] = {}

    @property
    def size(self) -> int:
        """Slots up to the last that is taken."""
        return max((run.stop for run in self._runs.values()), default=0)

    def __getitem__(self, handle: str) -> range:
        return self._runs[handle]

    @property
    def handles(self) -> tuple[str, ...]:
        return tuple(self._runs)

    def take(self, handle: str, count: int) -> range:
        """The first `count` slots in a row that are free become `handle`'s."""
        assert handle not in self._runs
        assert count > 0
        start = 0
        for run in sorted(self._runs.values(), key=lambda run: run.start):
            if run.start - start >= count:
                break
            start = run.stop
        self._runs[handle] = range(start, start + count)
        return self._runs[handle]

    def free(self, handle: str) -> range:
        """`handle` leaves; the slots that were its own."""
        return self._runs.pop(handle)
