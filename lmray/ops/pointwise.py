"""What stands between the matrix products of a decoder layer, call by call or compiled into one kernel each.

Shapes: N tokens, I hidden width, E heads of which the first T turn, D head width, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F


def rms_norm(x_NI: torch.Tensor, weight_I: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm (arXiv 1910.07467, equation 4)."""
    return F.rms_norm(x_NI, weight_I.shape, weight_I, eps)


def add_rms_norm(
    x_NI: torch.Tensor, more_NI: torch.Tensor, weight_I: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and its norm."""
    x_NI = x_NI + more_NI
    return x_NI, rms_norm(x_NI, weight_I, eps)


def rotate(x_NTD: torch.Tensor, cos_N1D: torch.Tensor, sin_N1D: torch.Tensor) -> None:
    """Rotary positions (arXiv 2104.09864, equation 34), in place; the first half of the sines is negated."""
    rolled_NTD = x_NTD.roll(x_NTD.shape[-1] // 2, -1)
    x_NTD.mul_(cos_N1D).addcmul_(rolled_NTD, sin_N1D)


def gate(gate_NF: torch.Tensor, up_NF: torch.Tensor, activation: Callable[..., Any]) -> torch.Tensor:
    """The gated input of an MLP's last product (arXiv 2002.05202, equation 5)."""
    return activation(gate_NF).mul_(up_NF)


@dataclass(frozen=True)
class Pointwise:
    """The four, as they are called."""

    rms_norm: Callable[..., torch.Tensor] = rms_norm
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]] = add_rms_norm
    rotate: Callable[..., None] = rotate
    gate: Callable[..., torch.Tensor] = gate

    def compiled(self) -> Pointwise:
        """The same for any number of tokens, each compiled when it is first called."""
        return Pointwise(**{one.name: torch.compile(getattr(self, one.name), dynamic=True) for one in fields(self)})
