"""Root-mean-square norm with a frozen weight, y = w x / sqrt(mean(x^2) + eps), by few passes over x.

Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4. Shapes: N tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm over the last dimension, computed in float32, in the type of `x_ND`. `weight_D` gets no gradient."""
    return _RmsNorm.apply(x_ND, weight_D, eps)  # type: ignore[return-value]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        size_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, dtype=torch.float32)
        rate_N1 = torch.rsqrt(size_N1.square_().div_(x_ND.shape[-1]).add_(eps))
        ctx.save_for_backward(x_ND, weight_D, rate_N1)
        return (x_ND * rate_N1).to(x_ND.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_ND, weight_D, rate_N1 = ctx.saved_tensors
        g_ND = (grads[0] * weight_D).float()
        inner_N1 = (g_ND * x_ND).sum(-1, keepdim=True)
        share_N1 = inner_N1.mul_(rate_N1.square()).div_(-x_ND.shape[-1])
        return g_ND.addcmul_(x_ND.float(), share_N1).mul_(rate_N1).to(x_ND.dtype), None, None
