"""How long a run may take: floating point operations over what the machine does a second.

A trained parameter costs 6 operations a token (2 forward, 4 backward: Kaplan et al., arXiv 2001.08361, section 2.1);
a frozen one 4, for no gradient of it is taken. Attention adds 12 T Q a token and layer (T tokens of a row, Q width
of the queries), the head the same a weight and supervised token.
"""

from __future__ import annotations

from lmray.models.shape import ModelShape

FORMULA = "4 per frozen and 6 per trained parameter and token, 12 T Q per token and layer for attention, head apart"
EFFICIENCY = (0.1, 0.25, 0.5)
"""Lowest, likely and highest share of the speed of plain matrix products that a training step reaches."""


def step_flops(shape: ModelShape, *, tokens: float, supervised: float, row_tokens: float) -> float:
    """Operations of one optimizer step over `tokens`, of which `supervised` reach the head."""
    in_base = 4 + 2 * shape.trained_fraction
    matrices = in_base * (shape.base - shape.embedding) + 6 * shape.added
    attention = 12 * shape.layers * row_tokens * shape.query_width
    return tokens * (matrices + attention) + supervised * in_base * shape.hidden * shape.vocabulary


def forward_flops(shape: ModelShape, *, tokens: float) -> float:
    """Operations of one pass without a gradient."""
    return tokens * 2 * (shape.base - shape.embedding + shape.added)


def seconds(flops: float, flops_per_s: float) -> tuple[float, float, float]:
    """Shortest, likely and longest time, at the efficiencies above."""
    low, likely, high = EFFICIENCY
    return tuple(flops / (flops_per_s * share) for share in (high, likely, low))  # type: ignore[return-value]
