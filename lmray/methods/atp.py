"""ATP: tuning and structural pruning in one run, the masks decided by a generator that learns beside the weights.

Lu et al., "All-in-One Tuning and Structural Pruning for Domain-Specific LLMs", arXiv 2412.14426. Every step a generator
is moved by the loss on rows set aside for it, LoRA weights are tuned under the masks it then draws, and the LoRA slices
of what is masked are shrunk by the proximal step of a group lasso. In the second part of the run the masks are final.
Runs on every rank.
Differs from the paper in: whole key-value groups and channels of the MLP are removed, not dimensions of heads, so that
stock classes load what is left (`lmray.pruning.structure`); slices reach zero exactly; masks meet the budget in every
step (`lmray.pruning.search`), and the final ones, by default all, are drawn without noise; the rows that masks are
searched on are training rows, and none that anything is measured on.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from lmray.errors import ConfigError
from lmray.methods._pruning import Pruning
from lmray.methods.base import Ranks
from lmray.pruning.masks import Budget
from lmray.pruning.search import Decider, Search, SearchArgs, stages_to


class Atp(Pruning):
    """Joint tuning and structural pruning. What is kept is a smaller whole model."""

    search_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training examples that masks are searched on, and no weight is trained on."""
    freeze_after: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of the steps after which masks are final."""
    schedule: Literal["at once", "progressive"] = "at once"
    """`progressive`: units are removed in stages, of which each takes at most a third of what is left."""
    gate: Literal["deterministic", "gumbel"] = "deterministic"
    """`deterministic`: decisions are taken without noise (arXiv 2603.08065). `gumbel`: they are drawn, as in the paper,
    so that other ones are tried; with one seed that was worse (`tests/bench/RESULTS.md`)."""
    generator_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Of the generator's AdamW, falling to zero. None: such that a search of any length changes decisions as much."""
    proximal: Annotated[float, Field(ge=0.0)] = 5e4
    """At the end of the search, LoRA slices of removed units lose this times the learning rate, shared among layers;
    exponentially less before."""

    @property
    def set_aside(self) -> float:
        return self.search_fraction

    @property
    def in_steps(self) -> bool:
        return self.schedule == "progressive"

    def searched(self, steps: int) -> int:
        return math.floor(self.freeze_after * steps)

    def check(self, model: Any, *, steps: int) -> None:
        super().check(model, steps=steps)
        if not self.searched(steps):
            found = f"{self.freeze_after:g} of {steps} step(s) leaves none to search masks in"
            allowed = f"1 / {steps} or more" if steps > 1 else "a run of at least 2 steps"
            hint = "raise `method.freeze_after`, or train for more steps"
            raise ConfigError("method.freeze_after", found, allowed=allowed, hint=hint)

    def decider(self, budget: Budget, ranks: Ranks, *, steps: int, seed: int) -> Decider:
        args = SearchArgs(
            steps=self.searched(steps),
            learning_rate=self.generator_learning_rate,
            noisy=self.gate == "gumbel",
            proximal=self.proximal,
            stages=stages_to(self.remaining) if self.in_steps else 1,
            seed=seed,
        )
        return Search(budget, args, ranks)
