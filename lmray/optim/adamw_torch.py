"""AdamW: steps of a running mean of gradients over a running mean of their squares, and decay of its own.

Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2, through torch, fused.
Differs from the paper in: nothing; decay is multiplied by the learning rate, as everywhere since.
"""

from __future__ import annotations

import torch

from lmray.optim.base import Groups, OptimizerConfig, Shapes, decayed, num_parameters


class AdamwTorch(OptimizerConfig):
    """AdamW by PyTorch."""

    elementwise = True

    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(decayed(groups, weight_decay), lr=learning_rate, fused=True)

    def state_bytes(self, shapes: Shapes) -> int:
        return 8 * num_parameters(shapes)
