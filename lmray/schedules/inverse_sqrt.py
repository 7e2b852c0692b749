"""One over the square root of the step, whatever the number of steps. Vaswani et al., arXiv 1706.03762, equation 3.

Differs from the paper in: the peak is the job's learning rate.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from lmray.schedules.base import Schedule


class InverseSqrt(Schedule):
    """Falls ever more slowly, and needs no last step."""

    timescale: Annotated[int, Field(ge=1)] | None = None
    """Steps after which the rate, had it fallen from the first, would be the peak. Empty: the warm-up's, or 10000
    without one."""

    def rate(self, done: int, *, steps: int, warmup: int, peak: float) -> float:
        scale = self.timescale or warmup or 10_000
        return peak / math.sqrt((done + scale) / scale)
