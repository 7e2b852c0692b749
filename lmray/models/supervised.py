"""Losses where they are taken only: at positions whose next token is supervised.

The head is the widest layer of a small model (V tokens). The model's own forward runs, and its head is handed the
supervised rows alone. Where nothing follows the head (`lmray.models.head`), it returns their loss, chunk by chunk, in
place of logits; else it returns their logits, and whatever follows (soft caps, scales) stays the architecture's own.

Shapes: B rows, T positions, D hidden width, N supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lmray.models.head import plain_head
from lmray.ops.cross_entropy import cross_entropy_per_token, cross_entropy_sum
from lmray.ops.linear_cross_entropy import linear_cross_entropy_per_token, linear_cross_entropy_sum

if TYPE_CHECKING:
    from collections.abc import Mapping

IGNORED = -100
"""Label of a token that no loss is taken on, as everywhere in PyTorch."""


def supervised_loss(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], labels_BT: torch.Tensor
) -> torch.Tensor:
    """Summed cross-entropy in nats over the supervised tokens: a float32 scalar, with gradient."""
    if (head := plain_head(model)) is None:
        return cross_entropy_sum(*supervised_logits(model, inputs, labels_BT))
    return _from_head(model, head, inputs, labels_BT, linear_cross_entropy_sum)


def supervised_losses(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], labels_BT: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy in nats of every supervised token, (N,), row by row; without gradient."""
    if (head := plain_head(model)) is None:
        return cross_entropy_per_token(*supervised_logits(model, inputs, labels_BT)).detach()
    return _from_head(model, head, inputs, labels_BT, linear_cross_entropy_per_token)


def _from_head(
    model: torch.nn.Module,
    head: torch.nn.Linear,
    inputs: Mapping[str, torch.Tensor],
    labels_BT: torch.Tensor,
    loss: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """What `loss` makes of the head's inputs and weight. Taken inside the head's own forward, where a sharded weight is
    whole."""
    targets_BT = labels_BT[:, 1:]
    picked_BT = targets_BT != IGNORED
    targets_N = targets_BT[picked_BT]

    def forward(hidden_BTD: torch.Tensor) -> torch.Tensor:
        return loss(_predicting(hidden_BTD, picked_BT), head.weight, targets_N, head.bias)

    head.forward = forward  # type: ignore[method-assign]
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        del head.forward


def supervised_logits(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], labels_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs `model` on `inputs` (`input_ids`, `position_ids`); returns (logits_NV, targets_N).

    `labels_BT[b, t]` is the token at `t`, or IGNORED; the logits that predict it are those of position `t - 1`.
    """
    targets_BT = labels_BT[:, 1:]
    picked_BT = targets_BT != IGNORED

    def pick(_head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (_predicting(args[0], picked_BT).unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(pick)
    try:
        logits_1NV = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits_1NV[0], targets_BT[picked_BT]


def _predicting(hidden_BTD: torch.Tensor, picked_BT: torch.Tensor) -> torch.Tensor:
    """(N, D): of the positions before those picked, which are all but the first; an adapter's virtual tokens stand
    before these."""
    own_BTD = hidden_BTD[:, -picked_BT.shape[1] - 1 : -1]
    return own_BTD[picked_BT]
