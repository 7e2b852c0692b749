"""Cross-entropy as a sum, never a mean: the learner divides by the token count of all ranks and micro-batches.

Shapes: N supervised tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy_sum(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Summed negative log-likelihood in nats, computed in float32 whatever the logits' type. Returns a scalar."""
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def cross_entropy_per_token(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target in nats, computed in float32 whatever the logits' type. Returns (N,)."""
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
