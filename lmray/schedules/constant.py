"""The peak, from the warm-up to the end."""

from __future__ import annotations

from lmray.schedules.base import Schedule


class Constant(Schedule):
    """One rate after the warm-up."""

    def rate(self, done: int, *, steps: int, warmup: int, peak: float) -> float:
        return peak
