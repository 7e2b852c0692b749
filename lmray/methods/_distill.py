"""Distillation of a masked model from itself without masks: the same weights are teacher and student.

Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, at temperature 1.
Differs from the paper in: the teacher is no second model, and learns with the student.
Shapes: N supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmray.data.batch import Batch
from lmray.models.supervised import supervised_logits
from lmray.ops.cross_entropy import cross_entropy_sum
from lmray.pruning.gates import Gates


def distilled(gates: Gates, weight: float) -> Callable[[torch.nn.Module, Batch], torch.Tensor]:
    """A loss: summed cross-entropy, and `weight` times the KL divergence of the model without masks to the one with
    them, in nats over the supervised tokens."""

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        training = model.training
        with torch.no_grad(), gates.off():
            if training:  # a search has its own say of which parts are
                model.eval()
            teacher_NV, _ = supervised_logits(model, batch.inputs, batch.labels_BT)
            if training:
                model.train()
        logits_NV, targets_N = supervised_logits(model, batch.inputs, batch.labels_BT)
        taught_NV, said_NV = (torch.log_softmax(one.float(), dim=-1) for one in (teacher_NV, logits_NV))
        apart = torch.nn.functional.kl_div(said_NV, taught_NV, reduction="sum", log_target=True)
        return cross_entropy_sum(logits_NV, targets_N) + weight * apart

    return loss
