"""Learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, *, steps: int, peak: float, warmup_ratio: float, shape: Literal["constant", "linear", "cosine"]
) -> float:
    """Rate of optimizer step `step` (1 to `steps`): a linear rise over the warm-up, then `shape`, to zero after the
    last."""
    warmup = round(warmup_ratio * steps)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    if shape == "constant":
        return peak
    return peak * (1 - progress) if shape == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))
