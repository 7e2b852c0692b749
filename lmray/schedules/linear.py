"""A straight line to zero after the last step."""

from __future__ import annotations

from lmray.schedules.base import Schedule


class Linear(Schedule):
    """Falls evenly."""

    def rate(self, done: int, *, steps: int, warmup: int, peak: float) -> float:
        return peak * (1 - done / steps)
