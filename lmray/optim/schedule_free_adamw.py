"""AdamW that needs no schedule: gradients are taken beside an average of the weights, which is measured and kept.

Defazio et al., "The Road Less Scheduled", arXiv 2405.15682, equations 3 to 5, through `schedulefree`. The average is in
place whenever no step is being taken. A warm-up still helps: `lr_scheduler_type: constant` with `warmup_ratio`.
Differs from the paper in: nothing.
"""

from __future__ import annotations

import torch

from lmray.optim.base import Groups, OptimizerConfig, Shapes, decayed, num_parameters


class ScheduleFreeAdamw(OptimizerConfig):
    """AdamW with an average instead of a schedule."""

    packages = ("schedulefree",)
    averages = True

    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree(decayed(groups, weight_decay), lr=learning_rate)

    def state_bytes(self, shapes: Shapes) -> int:
        return 8 * num_parameters(shapes)
