"""Held-out loss and perplexity, over the supervised tokens of all held-out examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmray.tasks.base import Scored, Task


class Loss(Task):
    """`eval.loss` and `eval.perplexity`."""

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """`statistics` are an example's summed loss in nats and its number of supervised tokens."""
        total, count = (math.fsum(one.statistics[place] for one in scored) for place in (0, 1))
        return {"loss": total / count, "perplexity": math.exp(total / count)}
