"""Full fine-tuning: every weight of the model is trained; what is kept is a whole model.

Differs from the paper in: nothing; there is no one paper.
"""

from __future__ import annotations

import torch

from lmray.adapters._whole import WholeModel


class Full(WholeModel):
    """All weights."""

    def attach(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        return self._open(model, list(model.parameters()))
