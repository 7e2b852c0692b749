"""Stochastic gradient descent, with momentum where asked for, through torch.

Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, equations 1 and 2.
Differs from the paper in: the learning rate multiplies the whole velocity, as in PyTorch.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from lmray.optim.base import Groups, OptimizerConfig, Shapes, decayed, num_parameters


class Sgd(OptimizerConfig):
    """Plain gradient steps."""

    elementwise = True

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(decayed(groups, weight_decay), lr=learning_rate, momentum=self.momentum)

    def state_bytes(self, shapes: Shapes) -> int:
        return 4 * num_parameters(shapes) if self.momentum else 0
