"""SwiGLU, silu(gate) * up, keeping gate and up only. Shazeer, arXiv 2002.05202, equation 6.

Shapes: N tokens, F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def swiglu(both_NE: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [N, F], of gate and up side by side in `both_NE`, E = 2 F."""
    return _Swiglu.apply(both_NE)  # type: ignore[return-value]


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both_NE: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both_NE)
        gate_NF, up_NF = both_NE.chunk(2, dim=-1)
        return F.silu(gate_NF).mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (both_NE,), (dy_NF,) = ctx.saved_tensors, grads
        gate_NF, up_NF = both_NE.chunk(2, dim=-1)
        dboth_NE = torch.empty(both_NE.shape, dtype=both_NE.dtype, device=both_NE.device)
        dgate_NF, dup_NF = dboth_NE.chunk(2, dim=-1)
        torch.mul(dy_NF, F.silu(gate_NF), out=dup_NF)
        dgate_NF.copy_(torch.ops.aten.silu_backward(dy_NF * up_NF, gate_NF))
        return dboth_NE
