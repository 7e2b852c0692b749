"""Logits where they are needed only: at positions whose next token is supervised.

The head is the widest layer of a small model (V tokens); the model's own forward runs unchanged, and a hook hands its
head the supervised rows alone, so that whatever follows the head (soft caps, scales) stays the architecture's own.

Shapes: B rows, T positions, D hidden width, N supervised tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

IGNORED = -100
"""Label of a token that no loss is taken on, as everywhere in PyTorch."""


def supervised_logits(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], labels_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs `model` on `inputs` (`input_ids`, `position_ids`); returns (logits_NV, targets_N).

    `labels_BT[b, t]` is the token at `t`, or IGNORED; the logits that predict it are those of position `t - 1`.
    """
    targets_BT = labels_BT[:, 1:]
    picked_BT = targets_BT != IGNORED

    def pick(_head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BTD = args[0]
        own_BTD = hidden_BTD[:, -labels_BT.shape[1] :]  # without an adapter's virtual tokens
        return (own_BTD[:, :-1][picked_BT].unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(pick)
    try:
        logits_1NV = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits_1NV[0], targets_BT[picked_BT]
