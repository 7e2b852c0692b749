"""APOLLO: gradients scaled, channel by channel, by what AdamW does to a random projection of them.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270, algorithm 1, through `apollo-torch`.
Differs from the paper in: nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lmray.optim._projected import Projected, keep_projectors
from lmray.optim.base import Groups


class ApolloAdamw(Projected):
    """AdamW's scales from few dimensions, applied to whole gradients."""

    packages = ("apollo_torch", "bitsandbytes")
    options: ClassVar[dict[str, Any]] = {"proj": "random", "proj_type": "std", "scale_type": "channel"}

    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from apollo_torch.apollo import AdamW  # type: ignore[import-not-found]
        from apollo_torch.random_projector import GradientProjector  # type: ignore[import-not-found]

        split: Any = self.groups(groups, weight_decay)
        made = AdamW(split, lr=learning_rate)
        return keep_projectors(made, GradientProjector, ("ortho_matrix", "seed"))
