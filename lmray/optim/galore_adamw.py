"""GaLore: AdamW in the space of the gradient's leading singular vectors, for whole matrices in little memory.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507, algorithm 2,
through `galore-torch`.
Differs from the paper in: nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from lmray.optim._projected import Projected, keep_projectors
from lmray.optim.base import Groups


class GaloreAdamw(Projected):
    """AdamW on projected gradients."""

    packages = ("galore_torch", "bitsandbytes")
    options: ClassVar[dict[str, Any]] = {"proj_type": "std"}
    scale: Annotated[float, Field(gt=0.0)] = 0.25
    """Of the projected steps: the paper's alpha."""

    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from galore_torch.adamw import AdamW  # type: ignore[import-not-found]
        from galore_torch.galore_projector import GaLoreProjector  # type: ignore[import-not-found]

        split: Any = self.groups(groups, weight_decay)
        made = AdamW(split, lr=learning_rate, no_deprecation_warning=True)
        return keep_projectors(made, GaLoreProjector, ("ortho_matrix",))
