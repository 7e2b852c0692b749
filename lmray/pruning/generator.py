"""The pruning-decision generator: a small network that says of every unit whether it is kept, trained beside the
weights.

Lu et al., "All-in-One Tuning and Structural Pruning for Domain-Specific LLMs" (ATP), arXiv 2412.14426; the Gumbel
sigmoid is DISP-LLM's, arXiv 2410.11988. It reads one fixed embedding a layer, so that what it learns is the decisions
themselves and how those of the layers hang together. Shapes: L layers, U units, E width.

Differs from the paper in: logits have no offset, since units are kept from a level on that meets the budget
(`lmray.pruning.search`); the noise is drawn from a generator of its own, of seed and step, and never when decisions are
final.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from lmray.pruning.structure import KINDS, Kind, Sizes

WIDTH, HEADS, INNER, DEPTH = 64, 4, 256, 2
TEMPERATURE = 0.4
MEDIAN = -math.log(math.log(2))
"""Of the Gumbel distribution."""
FAINT = 0.1
"""What is left of heads that start from chance once they are told what to say."""


class Generator(nn.Module):
    """Scores of all units, [L, U] of each kind: of two units the one with the higher score is worth more."""

    def __init__(self, sizes: Sizes, *, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            embeddings_LE = torch.empty(sizes.layers, WIDTH)
            nn.init.orthogonal_(embeddings_LE)
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
            self.norm = nn.LayerNorm(WIDTH)
            self.heads = nn.ParameterDict(
                {kind: _head(sizes.layers, sizes.units(kind)) for kind in KINDS}  # one a layer and kind, no bias
            )
        self.register_buffer("embeddings_LE", embeddings_LE)

    def mixed(self) -> torch.Tensor:
        """[L, E]: what is read of every layer, with the others in sight."""
        return self.norm(self.encoder(self.get_buffer("embeddings_LE")[None])[0])

    def forward(self) -> dict[Kind, torch.Tensor]:
        mixed_LE = self.mixed()
        return {kind: torch.einsum("le,lue->lu", mixed_LE, self.heads[kind]) for kind in KINDS}

    @torch.no_grad()
    def say(self, scores: Mapping[Kind, torch.Tensor]) -> None:
        """Sets the heads so that these are its scores. Across what they read of a layer they stay, faintly: along it
        alone, the encoder's gradient would be that of what its norm undoes, rounding, which Adam makes steps of."""
        mixed_LE = self.mixed()
        inverse_LE = mixed_LE / mixed_LE.square().sum(1, keepdim=True)
        for kind in KINDS:
            self.heads[kind] *= FAINT
            missing_LU = scores[kind] - torch.einsum("le,lue->lu", mixed_LE, self.heads[kind])
            self.heads[kind] += missing_LU[:, :, None] * inverse_LE[:, None]


def _head(layers: int, units: int) -> nn.Parameter:
    weight = torch.empty(layers, units, WIDTH)
    nn.init.uniform_(weight, -(WIDTH**-0.5), WIDTH**-0.5)  # as `nn.Linear` starts
    return nn.Parameter(weight)


def draw(scores: dict[Kind, torch.Tensor], noise: torch.Generator | None) -> dict[Kind, torch.Tensor]:
    """z + g, g from the Gumbel distribution less its median, so that noise removes as often as it adds; no `noise`:
    g = 0."""
    if noise is None:
        return scores
    drawn = {}
    for kind in KINDS:
        uniform = torch.rand(scores[kind].shape, generator=noise)
        drawn[kind] = scores[kind] - torch.log(-torch.log(uniform + 1e-10) + 1e-10) - MEDIAN
    return drawn


def soften(drawn: dict[Kind, torch.Tensor]) -> dict[Kind, torch.Tensor]:
    """Soft decisions between 0 and 1, with gradient: sigmoid(drawn / T)."""
    return {kind: torch.sigmoid(one / TEMPERATURE) for kind, one in drawn.items()}


def harden(soft: dict[Kind, torch.Tensor]) -> dict[Kind, torch.Tensor]:
    """1 from a half on, else 0."""
    return {kind: (one >= 0.5).float() for kind, one in soft.items()}
