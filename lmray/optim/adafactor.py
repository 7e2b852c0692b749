"""Adafactor: AdamW's second moment as a product of a row and a column, and no first moment.

Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv 1804.04235, algorithm 4, through
`transformers`, with the settings of its Trainer.
Differs from the paper in: steps have the job's learning rate, neither relative to the step's number nor to the weights'
size.
"""

from __future__ import annotations

from math import prod

import torch
from transformers.optimization import Adafactor as _Adafactor

from lmray.optim.base import Groups, OptimizerConfig, Shapes, decayed


class Adafactor(OptimizerConfig):
    """Adaptive steps in next to no memory."""

    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        split = decayed(groups, weight_decay)
        return _Adafactor(split, lr=learning_rate, scale_parameter=False, relative_step=False)

    def state_bytes(self, shapes: Shapes) -> int:
        return sum(4 * (shape[-2] + shape[-1] if len(shape) > 1 else prod(shape)) for shape in shapes)
