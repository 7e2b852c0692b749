"""Watches the numbers of a run: is it still sound, is it still getting better, which step was the best.

Decides from numbers that every rank has (sums over all ranks), so all ranks decide alike. Its state travels in the
checkpoint's `progress.json`: a resumed run decides as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from lmray.job import TrainArgs

WINDOW_STEPS = 50
"""The running median is over the last so many steps that were not themselves out of line."""
MIN_WINDOW_STEPS = 5
"""Before so many steps there is no median to compare with."""
DIVERGED_STEPS = 5
"""A loss out of line is an outlier; so many in a row are a divergence."""
MIN_RISE = 1.0
"""Nats/token above the median that a loss must rise at least: near zero, multiples mean nothing."""


@dataclass
class Watch:
    """The state of the watch after the steps it was told of."""

    losses: list[float] = field(default_factory=list)
    """Training losses in the window, oldest first."""
    streak: int = 0
    """Steps in a row, up to the last, whose loss was out of line."""
    best_step: int | None = None
    best_loss: float | None = None
    """Lowest held-out loss so far, and its step."""
    without_improvement: int = 0
    """Held-out evaluations since the last one that was better by more than the threshold."""

    def state(self) -> dict[str, Any]:
        """JSON types; `Watch(**state)` goes on from here."""
        return asdict(self)

    def step(self, metrics: Mapping[str, float], args: TrainArgs) -> str | None:
        """Takes in one optimizer step; says what is wrong with it, or None."""
        loss, norm = metrics["train.loss"], metrics["train.grad_norm"]
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
            return f"{what}; the step was not applied"
        limit = self.limit(args)
        if loss <= limit:
            self.streak, self.losses = 0, [*self.losses, loss][-WINDOW_STEPS:]
            return None
        self.streak += 1
        if self.streak < DIVERGED_STEPS:
            return None
        return (
            f"the loss is {loss:.4g}, and for {self.streak} steps was above {limit:.4g} "
            f"(running median {median(self.losses):.4g})"
        )

    def limit(self, args: TrainArgs) -> float:
        """The loss above which the next step is out of line."""
        if args.divergence_factor is None or len(self.losses) < MIN_WINDOW_STEPS:
            return math.inf
        middle = median(self.losses)
        return max(args.divergence_factor * middle, middle + MIN_RISE)

    def held_out(self, step: int, loss: float, args: TrainArgs, *, counts: bool = True) -> str | None:
        """Takes in a held-out loss, which may be the best where it `counts`; says what is wrong with it, or None."""
        if not math.isfinite(loss):
            return f"the held-out loss is {loss}"
        if not counts:
            return None
        improved = self.best_loss is None or self.best_loss - loss > args.early_stopping_threshold
        self.without_improvement = 0 if improved else self.without_improvement + 1
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss = step, loss
        return None

    def ends(self, args: TrainArgs) -> bool:
        """True once the held-out loss has not improved for as many evaluations as the job has patience."""
        return args.early_stopping_patience is not None and self.without_improvement >= args.early_stopping_patience
