"""AdamW over groups of parameters. Loshchilov & Hutter, arXiv 1711.05101, through torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def make_adamw(groups: Sequence[Mapping[str, Any]], *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Of an adapter's parameter groups. Decay reaches matrices only: biases and norms keep their size."""
    split = [
        {**group, "params": [one for one in group["params"] if (one.dim() > 1) == decays], "weight_decay": decay}
        for group in groups
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW([group for group in split if group["params"]], lr=learning_rate, fused=True)
