"""From the worth of single weights to that of units, comparable over layers and kinds.

`lmray.pruning.masks.project` keeps the units that are worth most a weight, so that is what a score says. Shapes: L
decoder layers, U units of a kind in a layer, B rows, T tokens, O outputs and I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from lmray.pruning.structure import KINDS, Kind, Part, Structure, linear_in

Rows = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Calibration rows of training data: ids and labels (-100 where no loss is taken), [B, T] each, without padding."""
Scores = dict[Kind, torch.Tensor]
"""[L, U] of each kind, float64: what a weight of a unit is worth on average, 0 or more."""


def read_rows(model: Any, rows: Rows) -> None:
    """Runs `model` over calibration `rows`."""
    for ids_BT, _ in rows:
        model(input_ids=ids_BT.to(model.device), use_cache=False)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there within the block, and no longer."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unit_scores(model: Any, structure: Structure, worth: Callable[[Any, Part], torch.Tensor | None]) -> Scores:
    """Scores of all units, from what `worth` says of every weight, [O, I], of the linear layer that a part lies in;
    None: its weights are not counted."""
    scores = {}
    for kind in KINDS:
        costs_U = torch.tensor(structure.sizes.costs(kind), dtype=torch.float64)
        rows = []
        for layer in structure.layers(model):
            worths_U = torch.zeros_like(costs_U)
            for part in structure.layout[kind].parts:
                worths_OI = worth(linear_in(layer, part.linear), part)
                if worths_OI is not None:
                    sums = worths_OI.detach().double().cpu().sum(1 if part.side == "rows" else 0)
                    worths_U.index_add_(0, structure.sizes.unit_of(part), sums)
            rows.append(worths_U / costs_U)
        scores[kind] = torch.stack(rows)
    return scores


def relative(scores: Scores, structure: Structure) -> Scores:
    """`scores` with a mean of 1 over the weights of each layer and kind: for worths that say which units of a layer
    matter more, and nothing of one layer beside another."""
    found = {}
    for kind, scores_LU in scores.items():
        costs_U = torch.tensor(structure.sizes.costs(kind), dtype=torch.float64)
        means_L1 = (scores_LU * costs_U).sum(1, keepdim=True) / costs_U.sum()
        found[kind] = scores_LU / means_L1.clamp(min=1e-30)
    return found
