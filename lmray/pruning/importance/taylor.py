"""A unit is worth what the loss is expected to change by without it: the first term of its Taylor series.

Ma et al., "LLM-Pruner", arXiv 2305.11627, equation 3 to first order: |w * dL/dw|, summed over the coupled weights. L is
the loss of all calibration rows, so scores of different layers and kinds are in one unit.
"""

from __future__ import annotations

from typing import Any

import torch

from lmray.pruning.importance.base import Rows, Scores, unit_scores
from lmray.pruning.structure import KINDS, Structure, linear_in


def taylor(model: Any, structure: Structure, rows: Rows) -> Scores:
    """Scores of all units of `model` on calibration `rows`, in nats a supervised token and weight. Parameters are given
    back as frozen as they came, without gradients."""
    weights = {
        id(linear_in(layer, part.linear).weight)
        for layer in structure.layers(model)
        for kind in KINDS
        for part in structure.layout[kind].parts
    }
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in frozen:
            parameter.requires_grad_(id(parameter) in weights)
            parameter.grad = None
        _backward(model, rows)
        return unit_scores(model, structure, lambda linear, part: (linear.weight.double() * linear.weight.grad).abs())
    finally:
        for parameter, needed in frozen.items():
            parameter.requires_grad_(needed)
            parameter.grad = None


def _backward(model: Any, rows: Rows) -> None:
    """Gradients of the mean loss over all supervised tokens of `rows`."""
    total = sum(int((labels_BT[:, 1:] >= 0).sum()) for _, labels_BT in rows)
    for ids_BT, labels_BT in rows:
        logits = model(input_ids=ids_BT.to(model.device), use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted = labels_BT[:, 1:].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        (loss / total).backward()
