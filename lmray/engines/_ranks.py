"""Which ranks of the stacked adapters belong to which adapter: a state machine without tensors."""

from __future__ import annotations


class RankSpace:
    """Adapters side by side, each with a run of ranks of its own; what one leaves is filled by the next that fits."""

    def __init__(self) -> None:
        self._runs: dict[str, range] = {}

    @property
    def size(self) -> int:
        """Ranks up to the last that is taken."""
        return max((run.stop for run in self._runs.values()), default=0)

    def __getitem__(self, handle: str) -> range:
        return self._runs[handle]

    @property
    def handles(self) -> tuple[str, ...]:
        return tuple(self._runs)

    def take(self, handle: str, rank: int) -> range:
        """The first `rank` ranks in a row that are free become `handle`'s."""
        assert handle not in self._runs
        assert rank > 0
        start = 0
        for run in sorted(self._runs.values(), key=lambda run: run.start):
            if run.start - start >= rank:
                break
            start = run.stop
        self._runs[handle] = range(start, start + rank)
        return self._runs[handle]

    def free(self, handle: str) -> range:
        """`handle` leaves; the ranks that were its own."""
        return self._runs.pop(handle)
