"""Held-out loss, the same arithmetic as in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmray.data.batch import Packed, collate
from lmray.models.precision import computing
from lmray.models.supervised import supervised_logits
from lmray.ops.cross_entropy import cross_entropy_sum


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, rows: Sequence[Packed], *, batch_size: int, pad_token_id: int, device: str
) -> float:
    """Mean loss in nats over the supervised tokens of `rows`, which must hold at least one."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(rows), batch_size):
        batch = collate(rows[first : first + batch_size], pad_token_id=pad_token_id).to(device)
        with computing(model):
            total += float(cross_entropy_sum(*supervised_logits(model, batch.inputs, batch.labels_BT)))
        count += batch.num_supervised
    model.train(was_training)
    return total / count
