"""A unit is worth what it brings into the residual stream: the weights of its columns, each times the norm of what
comes in there.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), arXiv 2306.11695, equation 1;
for whole structures as in An et al. (FLAP), arXiv 2312.11983, where it is called Wanda-sp: `o_proj` and `down_proj`
alone are weighed, whose columns the units are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lmray.pruning.importance.base import Rows, Scores, read_rows, relative, unit_scores
from lmray.pruning.structure import KINDS, Part, Structure, linear_in


@torch.no_grad()
def wanda_sp(model: Any, structure: Structure, rows: Rows) -> Scores:
    """Scores of all units of `model` on calibration `rows`, relative to their layer and kind."""
    norms: dict[Any, torch.Tensor] = {}
    for layer in structure.layers(model):
        for kind in KINDS:
            for part in structure.layout[kind].parts:
                if part.side == "columns":
                    linear = linear_in(layer, part.linear)
                    norms[linear] = torch.zeros(linear.in_features, dtype=torch.float64)
    read_rows(model, rows, {linear: _adds_squares(one) for linear, one in norms.items()})

    def worth(linear: Any, part: Part) -> torch.Tensor | None:
        if part.side == "rows":
            return None
        return linear.weight.double().abs() * norms[linear].sqrt().to(linear.weight.device)

    return relative(unit_scores(model, structure, worth), structure)


def _adds_squares(squares_I: torch.Tensor) -> Callable[..., None]:
    def add(module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        squares_I.add_(inputs[0].double().flatten(0, -2).pow(2).sum(0).cpu())

    return add
