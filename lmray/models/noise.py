"""Noise on embeddings while training: NEFTune.

Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv 2310.05914, algorithm 1: every number of
an embedded example of L tokens and D numbers gets uniform noise from [-1, 1] alpha / sqrt(L D).
Differs from the paper in: L is the example's own length, also where rows are padded or shared by several examples; so
an example gets the same noise on average however it is packed.

Shapes: B rows, T positions, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def noisy_embeddings(model: Any, alpha: float, lengths_BT: torch.Tensor) -> Iterator[None]:
    """Within the block what `model` embeds gets noise, from the global generator, but in evaluation mode. `lengths_BT`:
    tokens of the example that each token is of."""

    def add(_embedding: torch.nn.Module, _args: Any, embedded_BTD: torch.Tensor) -> torch.Tensor:
        if not model.training:
            return embedded_BTD
        scale_BT = alpha / torch.sqrt(lengths_BT * float(embedded_BTD.shape[-1]))
        noise_BTD = torch.empty_like(embedded_BTD).uniform_(-1, 1)
        return embedded_BTD + noise_BTD * scale_BT[..., None].to(embedded_BTD.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
