"""Half a cosine to zero after the last step. Loshchilov & Hutter, "SGDR", arXiv 1608.03983, equation 5.

Differs from the paper in: no restarts.
"""

from __future__ import annotations

import math

from lmray.schedules.base import Schedule


class Cosine(Schedule):
    """Falls slowly, then fast, then slowly."""

    def rate(self, done: int, *, steps: int, warmup: int, peak: float) -> float:
        return peak * 0.5 * (1 + math.cos(math.pi * done / steps))
