"""Lion: steps of one size, along the signs of a running mean of gradients, through `bitsandbytes`.

Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2. Its learning rates are
three to ten times smaller than AdamW's.
Differs from the paper in: nothing.
"""

from __future__ import annotations

import torch

from lmray.optim.base import Groups, OptimizerConfig, Shapes, decayed, num_parameters


class Lion(OptimizerConfig):
    """Sign steps in half of AdamW's memory."""

    packages = ("bitsandbytes",)

    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from bitsandbytes.optim.lion import Lion32bit  # type: ignore[import-not-found]

        return Lion32bit(decayed(groups, weight_decay), lr=learning_rate)

    def state_bytes(self, shapes: Shapes) -> int:
        return 4 * num_parameters(shapes)
