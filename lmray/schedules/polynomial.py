"""A power of a straight line, down to `lr_end`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lmray.schedules.base import Schedule


class Polynomial(Schedule):
    """Falls by a power."""

    power: Annotated[float, Field(gt=0.0)] = 1.0
    lr_end: Annotated[float, Field(ge=0.0)] = 1e-7
    """The rate after the last step; where the peak is lower, that is kept."""

    def rate(self, done: int, *, steps: int, warmup: int, peak: float) -> float:
        end = min(self.lr_end, peak)
        return end + (peak - end) * (1 - done / steps) ** self.power
