"""Frozen linear layers that share an input, each with a LoRA side path, as two products forward and five backward.

For layers i with frozen W_i (O_i x I), trained A_i (r x I), B_i (O_i x r) and scale s_i: y_i = W_i x + s_i B_i A_i x
(arXiv 2106.09685, equation 3). All W_i and A_i are rows of one matrix, so x is multiplied once; the s_i B_i are blocks
of one block-diagonal matrix. The frozen weights get no gradient, so only x and A x are kept for the backward pass.

Shapes: N tokens, I inputs, O outputs of all layers together, R ranks of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LoraGroup:
    """The layers that share an input."""

    stacked_MI: torch.Tensor
    """The frozen weights, then room for the A_i: M = O + R rows."""
    spread_OR: torch.Tensor
    """Block-diagonal: s_i B_i where rows of layer i meet its ranks, 0 elsewhere."""
    bias_O: torch.Tensor | None
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def num_outputs(self) -> int:
        return sum(self.sizes)

    def fill(self, factors: Sequence[torch.Tensor]) -> None:
        """Copies A_1, B_1, A_2, B_2, ... into their places."""
        row = rank = 0
        first_rank = self.num_outputs
        for size, width, scale, a_rI, b_Or in zip(
            self.sizes, self.ranks, self.scales, factors[::2], factors[1::2], strict=True
        ):
            self.stacked_MI[first_rank + rank : first_rank + rank + width].copy_(a_rI)
            self.spread_OR[row : row + size, rank : rank + width] = b_Or * scale
            row, rank = row + size, rank + width


def make_group(
    weights_OI: Sequence[torch.Tensor],
    biases_O: Sequence[torch.Tensor | None],
    ranks: Sequence[int],
    scales: Sequence[float],
) -> LoraGroup:
    """A group from the layers' frozen weights, which are copied."""
    total, width = sum(len(weight) for weight in weights_OI), weights_OI[0].shape[1]
    stacked = weights_OI[0].new_zeros(total + sum(ranks), width)
    torch.cat([weight.detach() for weight in weights_OI], out=stacked[:total])
    bias = None
    if any(one is not None for one in biases_O):
        parts = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights_OI, biases_O, strict=True)]
        bias = torch.cat(parts)
    sizes = tuple(len(weight) for weight in weights_OI)
    return LoraGroup(stacked, stacked.new_zeros(total, sum(ranks)), bias, sizes, tuple(ranks), tuple(scales))


def lora_linear(x_NI: torch.Tensor, group: LoraGroup, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The group's outputs side by side, [N, O], in the type of its frozen weights. `factors`: A_1, B_1, A_2, ...,
    trained, in any floating type."""
    return _LoraLinear.apply(x_NI, group, *factors)  # type: ignore[return-value]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, group: LoraGroup, *factors: torch.Tensor) -> torch.Tensor:
        group.fill(factors)
        both_NM = torch.mm(x_NI, group.stacked_MI.T)
        y_NO, u_NR = both_NM[:, : group.num_outputs], both_NM[:, group.num_outputs :]
        y_NO.addmm_(u_NR, group.spread_OR.T)
        if group.bias_O is not None:
            y_NO += group.bias_O
        ctx.save_for_backward(x_NI, u_NR.contiguous())
        ctx.group, ctx.types = group, [factor.dtype for factor in factors]
        return y_NO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy_NO,) = grads
        (x_NI, u_NR), group = ctx.saved_tensors, ctx.group
        du_NR = torch.mm(dy_NO, group.spread_OR)
        dx_NI = None
        if ctx.needs_input_grad[0]:
            dx_NI = torch.mm(dy_NO, group.stacked_MI[: group.num_outputs])
            dx_NI.addmm_(du_NR, group.stacked_MI[group.num_outputs :])
        da_RI, dspread_OR = torch.mm(du_NR.T, x_NI), torch.mm(dy_NO.T, u_NR)
        factors: list[torch.Tensor] = []
        row = rank = 0
        for size, width, scale in zip(group.sizes, group.ranks, group.scales, strict=True):
            factors += [da_RI[rank : rank + width], dspread_OR[row : row + size, rank : rank + width] * scale]
            row, rank = row + size, rank + width
        return dx_NI, None, *(one.to(dtype) for one, dtype in zip(factors, ctx.types, strict=True))
