"""The peak for most of the run, then down. Hu et al., "MiniCPM", arXiv 2404.06395, equation 1.

Differs from the paper in: the decay is a cosine unless the job says otherwise.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from lmray.schedules.base import Schedule

SHAPES = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


class WarmupStableDecay(Schedule):
    """Stays, then falls."""

    decay_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Share of the steps after the warm-up over which the rate falls."""
    decay_type: Literal["cosine", "linear", "1-sqrt"] = "cosine"
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """The rate after the last step, as a share of the peak."""

    def rate(self, done: int, *, steps: int, warmup: int, peak: float) -> float:
        falling = max(1, round(self.decay_ratio * steps))
        progress = max(0, done - (steps - falling)) / falling
        return peak * (self.min_lr_ratio + (1 - self.min_lr_ratio) * SHAPES[self.decay_type](progress))
