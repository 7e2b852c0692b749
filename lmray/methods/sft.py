"""Supervised fine-tuning: next-token cross-entropy on the supervised tokens (the assistant's turns).

Losses are taken at supervised positions only, and without holding all their logits. Runs on every rank.
Differs from the paper in: nothing; there is no one paper.
"""

from __future__ import annotations

import torch

from lmray.data.batch import Batch
from lmray.methods.base import Method, Objective
from lmray.models.supervised import supervised_loss


class Sft(Method):
    """Supervised fine-tuning."""

    def objectives(self) -> tuple[Objective, ...]:
        return (Objective("sft", sft_loss, lambda batch: batch.num_supervised),)


def sft_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy in nats over the batch's supervised tokens."""
    return supervised_loss(model, batch.inputs, batch.labels_BT)
