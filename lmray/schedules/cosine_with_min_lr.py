"""Half a cosine to a lowest rate above zero. Loshchilov & Hutter, "SGDR", arXiv 1608.03983, equation 5.

Differs from the paper in: no restarts.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from lmray.schedules.base import Schedule


class CosineWithMinLr(Schedule):
    """A cosine that ends above zero."""

    min_lr_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """The lowest rate, as a share of the peak."""

    def rate(self, done: int, *, steps: int, warmup: int, peak: float) -> float:
        share = 0.5 * (1 + math.cos(math.pi * done / steps))
        return peak * (self.min_lr_rate + (1 - self.min_lr_rate) * share)
