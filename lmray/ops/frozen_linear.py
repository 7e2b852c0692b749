"""Products with frozen weights, y = W x + b, plain or with W in the layout that the processor multiplies fastest.

oneDNN's blocked layout is that of its kernels; a plain matrix is brought into it in every product, which took 1.4 to
1.8 times as long for 1 to 128 rows in bfloat16 on a processor with AMX. Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class FrozenLinear:
    """Plain weights [O, I], bias [O] or None."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None):
        self.weight_OI, self.bias_O = weight_OI, bias_O

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        return F.linear(x_NI, self.weight_OI, self.bias_O)


class PackedLinear:
    """The same of weights that `can_pack` let pass, which are copied."""

    def __init__(self, plain: FrozenLinear):
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(plain.weight_OI)
        self._bias_O = plain.bias_O

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_NI, self._packed, self._bias_O, "none", [], "")


def can_pack(plain: FrozenLinear | PackedLinear) -> bool:
    """Whether there is a faster layout: frozen bfloat16 weights on a processor that computes with them."""
    if isinstance(plain, PackedLinear) or not torch.backends.mkldnn.is_available():
        return False
    weight_OI = plain.weight_OI
    is_bfloat16 = weight_OI.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight_OI.device.type == "cpu" and is_bfloat16
