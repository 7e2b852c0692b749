"""A unit is worth what it brings into the residual stream: the weights of its columns, each times the norm of what
comes in there.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), arXiv 2306.11695, equation 1;
for whole structures as in An et al. (FLAP), arXiv 2312.11983, where it is called Wanda-sp: `o_proj` and `down_proj`
alone are weighed, whose columns the units are. Shapes: L decoder layers, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lmray.pruning.importance.base import Rows, Scores, hooked, read_rows, relative, unit_scores
from lmray.pruning.structure import KINDS, Kind, Part, Structure, linear_in

Squares = dict[Kind, torch.Tensor]
"""[L, I] of each kind, float64 on the CPU: of every input of the layers whose columns the units are, the sum of squares
over tokens."""


def wanda_sp(model: Any, structure: Structure, rows: Rows) -> Scores:
    """Scores of all units of `model` on calibration `rows`, relative to their layer and kind."""
    squares = no_inputs(structure)
    with torch.no_grad(), adding_inputs(model, structure, squares):
        read_rows(model, rows)
    return scores_of(model, structure, squares)


def no_inputs(structure: Structure) -> Squares:
    """Of no tokens."""
    sizes = structure.sizes
    widths = {kind: len(sizes.unit_of(_columns(structure, kind))) for kind in KINDS}
    return {kind: torch.zeros(sizes.layers, widths[kind], dtype=torch.float64) for kind in KINDS}


@contextmanager
def adding_inputs(
    model: Any, structure: Structure, squares: Squares, tokens: Callable[[], torch.Tensor | None] | None = None
) -> Iterator[None]:
    """Within the block, what `model` reads is added to `squares`. `tokens` says of which of what it is reading: [B, T]
    bool; None: of none, as where layers run again for their gradients."""

    def add(kind: Kind, number: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            read_BTI = inputs[0].detach()
            chosen_BT = tokens() if tokens else torch.ones(read_BTI.shape[:2], dtype=torch.bool)
            if chosen_BT is not None:
                read_NI = read_BTI[chosen_BT.to(read_BTI.device)]
                squares[kind][number] += torch.linalg.vector_norm(read_NI, dim=0, dtype=torch.float64).cpu().square()

        return hook

    handles = [
        linear_in(layer, _columns(structure, kind).linear).register_forward_pre_hook(add(kind, number))
        for number, layer in enumerate(structure.layers(model))
        for kind in KINDS
    ]
    with hooked(handles):
        yield


@torch.no_grad()
def scores_of(model: Any, structure: Structure, squares: Squares) -> Scores:
    """Scores of all units of `model`, plain or with an adapter, which is not counted."""
    norms = {
        linear_in(layer, _columns(structure, kind).linear): squares[kind][number].sqrt()
        for number, layer in enumerate(structure.layers(model))
        for kind in KINDS
    }

    def worth(linear: Any, part: Part) -> torch.Tensor | None:
        if linear not in norms:
            return None
        weight = getattr(linear, "base_layer", linear).weight
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return weight.double().abs() * norms[linear].to(weight.device)

    return relative(unit_scores(model, structure, worth), structure)


def _columns(structure: Structure, kind: Kind) -> Part:
    """The part by which units of `kind` come into the residual stream."""
    (part,) = (part for part in structure.layout[kind].parts if part.side == "columns")
    return part
