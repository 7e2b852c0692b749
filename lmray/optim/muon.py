"""Muon: momentum whose singular values are set to one, for matrices; AdamW for everything else. Both through torch.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is Scalable for LLM
Training", arXiv 2502.16982, equation 4, whose scale makes AdamW's learning rates and decay fit both.
Differs from the papers in: embeddings and heads that are trained are matrices like any other.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from lmray.optim.base import Groups, OptimizerConfig, Shapes, decayed, num_parameters


class Muon(OptimizerConfig):
    """Orthogonal momentum for matrices, AdamW for the rest."""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95

    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return _MuonAdamw(decayed(groups, weight_decay), learning_rate, self.momentum)

    def state_bytes(self, shapes: Shapes) -> int:
        matrices = num_parameters([shape for shape in shapes if len(shape) == 2])
        return 8 * num_parameters(shapes) - 4 * matrices


class _MuonAdamw(torch.optim.Optimizer):
    """Two optimizers as one: they share its groups and its state."""

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, momentum: float):
        by_kind = [
            [{**group, "params": found} for group in groups if (found := [p for p in group["params"] if chosen(p)])]
            for chosen in (_is_matrix, lambda parameter: not _is_matrix(parameter))
        ]
        makers = (
            lambda found: torch.optim.Muon(found, lr=learning_rate, momentum=momentum, adjust_lr_fn="match_rms_adamw"),
            lambda found: torch.optim.AdamW(found, lr=learning_rate, fused=True),
        )
        self.parts = [make(found) for make, found in zip(makers, by_kind, strict=True) if found]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups, part.state, start = self.param_groups[start:stop], self.state, stop

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # puts new groups and a new state in place of those that are shared
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self.parts:
            part.step()


def _is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.dim() == 2
