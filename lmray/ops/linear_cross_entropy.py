"""Cross-entropy of a linear head from its inputs, a chunk of rows at a time: all N x V logits are never held at once.

The gradient with regard to the inputs (and to the head, where it is trained) is made with the loss, while a chunk's
logits are there, as in Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009,
section 4, and Hsu et al., "Liger Kernel", arXiv 2410.10989, section 3.2. With l the logits of a row, m their maximum,
e = exp(l - m), s = sum(e) and t the target: loss = log s - (l_t - m); dl = (e - s [i = t]) / s, whose division waits
until the row is D wide.
Differs from the papers in: chunks are of rows and chosen by their bytes; plain PyTorch instead of a GPU's kernels.

Shapes: N rows, M rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Target of a row that counts nothing."""
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits held at once: on a CPU few enough to stay near the caches, on a GPU enough to fill it."""


def chunk_rows(num_vocabulary: int, device: str) -> int:
    """Rows of a chunk on `device` (`cpu`, `cuda`)."""
    return max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * num_vocabulary))


def linear_cross_entropy_sum(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    num_chunk_rows: int | None = None,
) -> torch.Tensor:
    """Summed negative log-likelihood in nats of `targets_N` under the logits `hidden @ weight.T + bias`, a float32
    scalar. Rows whose target is IGNORED count nothing. Products are of the weight's type, sums float32."""
    rows = num_chunk_rows or chunk_rows(len(weight_VD), weight_VD.device.type)
    return _LinearCrossEntropy.apply(hidden_ND.to(weight_VD.dtype), weight_VD, bias_V, targets_N.split(rows))  # type: ignore[return-value]


@torch.no_grad()
def linear_cross_entropy_per_token(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    num_chunk_rows: int | None = None,
) -> torch.Tensor:
    """The same of each row, (N,), without a gradient."""
    rows = num_chunk_rows or chunk_rows(len(weight_VD), weight_VD.device.type)
    chunks = _chunks(hidden_ND.to(weight_VD.dtype), weight_VD, bias_V, targets_N.split(rows))
    return torch.cat([losses_M for _, losses_M, _, _ in chunks])


def _chunks(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets: Sequence[torch.Tensor]
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each chunk of `targets`: where it lies, its losses (M,), e - s [i = t] (M, V) and 1 / s (M, 1), the last 0 for
    IGNORED."""
    with torch.autocast(hidden_ND.device.type, enabled=False):
        stop = 0
        for targets_M in targets:
            stop, given_M1 = stop + len(targets_M), targets_M[:, None]
            place = slice(stop - len(targets_M), stop)
            targets_M1, counted_M1 = given_M1.clamp(min=0), given_M1 != IGNORED
            exp_MV = _above_maximum(hidden_ND[place], weight_VD, bias_V)
            target_M1 = exp_MV.gather(1, targets_M1)
            sum_M1 = exp_MV.exp_().sum(-1, keepdim=True)
            losses_M = torch.where(counted_M1, sum_M1.log() - target_M1, 0.0)[:, 0]
            exp_MV.scatter_add_(1, targets_M1, -sum_M1)
            yield place, losses_M, exp_MV, counted_M1 / sum_M1


def _above_maximum(hidden_MD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    """l - m in float32."""
    logits_MV = torch.mm(hidden_MD, weight_VD.T) if bias_V is None else torch.addmm(bias_V, hidden_MD, weight_VD.T)
    highest_M1 = logits_MV.amax(-1, keepdim=True)
    return logits_MV.float().sub_(highest_M1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        dhidden_ND = torch.empty_like(hidden_ND) if of_hidden else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if of_weight else None
        dbias_V = torch.zeros_like(bias_V, dtype=torch.float32) if of_bias and bias_V is not None else None
        for place, losses_M, dlogits_MV, share_M1 in _chunks(hidden_ND, weight_VD, bias_V, targets):
            loss += losses_M.sum()
            if dbias_V is not None:
                dbias_V += torch.mv(dlogits_MV.T, share_M1[:, 0])
            low_MV = dlogits_MV.to(weight_VD.dtype)
            if dhidden_ND is not None:
                dhidden_ND[place] = torch.mm(low_MV, weight_VD) * share_M1
            if dweight_VD is not None:
                dweight_VD += torch.mm(low_MV.T, (hidden_ND[place] * share_M1).to(low_MV.dtype))
        ctx.save_for_backward(dhidden_ND, dweight_VD, dbias_V)
        ctx.types = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dhidden_ND, dweight_VD, dbias_V = ctx.saved_tensors
        weight_type, bias_type = ctx.types
        return (
            None if dhidden_ND is None else dhidden_ND.mul_(grads[0]),
            None if dweight_VD is None else dweight_VD.mul_(grads[0]).to(weight_type),
            None if dbias_V is None else dbias_V.mul_(grads[0]).to(bias_type),
            None,
        )
