"""AdamW whose running means take eight bits a number, through `bitsandbytes`.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
Differs from the paper in: nothing.
"""

from __future__ import annotations

import torch

from lmray.optim._blocks import block_bytes
from lmray.optim.base import Groups, OptimizerConfig, Shapes, decayed


class Adamw8bit(OptimizerConfig):
    """AdamW in a quarter of the memory."""

    packages = ("bitsandbytes",)

    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from bitsandbytes.optim.adamw import AdamW8bit  # type: ignore[import-not-found]

        return AdamW8bit(decayed(groups, weight_decay), lr=learning_rate)

    def state_bytes(self, shapes: Shapes) -> int:
        return block_bytes(shapes, means=2)
